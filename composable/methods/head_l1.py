"""Head-wise l1: the attention heads with the smallest projections go."""

import torch
from torch import Tensor, nn

from composable.errors import ShapeError
from composable.families import Module
from composable.methods.base import Method, Pruned
from composable.solver import Gram
from composable.surgery import units_to_remove


def head_importance(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Rank attention heads by the l1 norm of their projections.

    Args:
        q: projection weight, (heads * head_size, hidden).
        k: as q.
        v: as q.
        heads: number of heads; must divide the first dimension.

    Returns:
        Importance per head, shape (heads,), float64; higher is kept.

    Raises:
        ShapeError: the rows do not divide into `heads`.

    Source: composability reference, head-wise l1; summed over q, k and v, biases left out.
    """
    for weight in (q, k, v):
        if heads < 1 or weight.shape[0] % heads:
            raise ShapeError(f"{weight.shape[0]} rows do not divide into {heads} heads.")
    # float64, so that the ranking does not depend on the order of summation
    return sum(weight.detach().double().abs().reshape(heads, -1).sum(1) for weight in (q, k, v))  # type: ignore[return-value]


def kept_heads(importance: Tensor, rate: float) -> list[int]:
    """Ascending ids of the heads that stay; of equal heads the lower index goes first."""
    order = torch.sort(importance, stable=True).indices
    return sorted(order[units_to_remove(len(importance), rate) :].tolist())


def _prune(attention: nn.Module, module: Module, rate: float, inputs: Gram | None = None) -> Pruned:
    q, k, v = (attention.get_parameter(f"{module.part(role)}.weight") for role in "qkv")
    return Pruned(kept_heads=kept_heads(head_importance(q, k, v, module.heads), rate))


HEAD_L1 = Method(
    name="head_l1",
    kinds=("attention",),
    reference="Michel et al. 2019 (arXiv 1905.10650) for heads as units; l1 as in Han et al. 2015",
    prune=_prune,
)
