"""Wanda: the weights with the smallest product of size and input norm go, per matrix."""

from torch import Tensor, nn

from composable.families import Module
from composable.methods.base import Evidence, Method, Pruned, keep_highest, weights_to_remove
from composable.methods.inputs import input_scale, moments


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


def _prune(linear: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    weight = linear.get_parameter("weight")
    power = moments(linear, module, WANDA.name, evidence.inputs).diagonal()[: weight.shape[1]]
    # sums of squares rank as means do
    scores = wanda_scores(weight, power)
    return Pruned(mask=keep_highest(scores, weights_to_remove(weight.numel(), rate)).cpu())


WANDA = Method(
    name="wanda",
    kinds=("linear",),
    reference="Sun et al. 2023, A Simple and Effective Pruning Approach (arXiv 2306.11695)",
    prune=_prune,
    needs=("inputs",),
)
