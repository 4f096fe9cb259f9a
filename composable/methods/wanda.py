"""Wanda: the weights with the smallest product of size and input norm go, by row or by matrix."""

import torch
from torch import Tensor

from composable.methods.base import weights_to_remove
from composable.methods.inputs import input_scale, mask_method, mask_of_scores


def wanda_scores(weight: Tensor, power: Tensor) -> Tensor:
    """Rank weights by what their absence alone changes at the output, on average.

    Args:
        weight: (rows, n).
        power: mean square of each input, shape (n,).

    Returns:
        abs(weight) * sqrt(power), (rows, n), float64; higher is kept.

    Source: Sun et al. 2023, equation 1.
    """
    scale = input_scale(power.double())
    return weight.detach().to(scale).abs() * scale


def wanda_mask(weight: Tensor, power: Tensor, rate: float) -> Tensor:
    """Mark the weights that stay: in every row those of the highest scores.

    Args:
        weight: (rows, n).
        power: mean square of each input, or a multiple, (n,).
        rate: fraction removed, 0 to 1.

    Returns:
        Boolean (rows, n) with exactly floor(rows * n * rate + 0.5) zeros, in the first rows perhaps
        one more than in the others; of equal weights of a row the lower index goes first.
    """
    each, more = divmod(weights_to_remove(weight.numel(), rate), len(weight))
    ranks = wanda_scores(weight, power).sort(dim=1, stable=True).indices.argsort(dim=1)
    gone = each + (torch.arange(len(weight), device=ranks.device) < more)
    return ranks >= gone[:, None]


def _power(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return sums of squares, which rank as means do; the last one may be of a bias."""
    return matrix.diagonal()[: weight.shape[1]]


WANDA = mask_method(
    "wanda",
    "Sun et al. 2023, A Simple and Effective Pruning Approach (arXiv 2306.11695)",
    lambda weight, matrix, rate: wanda_mask(weight, _power(weight, matrix), rate),
)
# not the paper's, but leaves less error after the refit: docs/training.md
WANDA_MATRIX = mask_method(
    "wanda_matrix",
    f"{WANDA.reference}, compared over the whole matrix",
    mask_of_scores(lambda weight, matrix: wanda_scores(weight, _power(weight, matrix))),
)
