"""Wanda: the weights with the smallest product of size and input norm go, per matrix."""

from torch import Tensor

from composable.methods.inputs import input_scale, mask_method, mask_of_scores


def wanda_scores(weight: Tensor, power: Tensor) -> Tensor:
    """Rank weights by what their absence alone changes at the output, on average.

    Args:
        weight: (rows, n).
        power: mean square of each input, shape (n,).

    Returns:
        abs(weight) * sqrt(power), (rows, n), float64; higher is kept.

    Source: Sun et al. 2023, equation 1, compared over the whole matrix rather than per row.
    """
    scale = input_scale(power.double())
    return weight.detach().to(scale).abs() * scale


WANDA = mask_method(
    "wanda",
    "Sun et al. 2023, A Simple and Effective Pruning Approach (arXiv 2306.11695)",
    # sums of squares rank as means do; the last one may be of a bias
    mask_of_scores(
        lambda weight, matrix: wanda_scores(weight, matrix.diagonal()[: weight.shape[1]])
    ),
)
