"""Unstructured l1: the weights of smallest absolute value go, per matrix."""

from torch import Tensor, nn

from composable.families import Module
from composable.methods.base import Evidence, Method, Pruned, keep_highest, weights_to_remove


def keep_mask(weight: Tensor, rate: float) -> Tensor:
    """Mark the weights that stay when the smallest go.

    Args:
        weight: any shape.
        rate: fraction removed, 0 to 1.

    Returns:
        Boolean tensor of the same shape with exactly floor(n * rate + 0.5) zeros; of equal weights
        the one with the lower index goes first.

    Source: torch.nn.utils.prune.l1_unstructured with the integer amount; biases are left alone.
    """
    count = weights_to_remove(weight.numel(), rate)
    return keep_highest(weight.detach().double().abs(), count).cpu()


def _prune(linear: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    weight = linear.get_parameter("weight")
    return Pruned(mask=keep_mask(weight, rate))


L1 = Method(
    name="l1",
    kinds=("linear",),
    reference="Han et al. 2015, Learning both Weights and Connections (arXiv 1506.02626)",
    prune=_prune,
)
