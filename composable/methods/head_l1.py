"""Head-wise l1: the attention heads with the smallest projections go."""

from torch import Tensor, nn

from composable.errors import ShapeError
from composable.families import Module
from composable.methods.base import Evidence, Method, Pruned, kept_heads


def head_importance(q: Tensor, k: Tensor, v: Tensor, heads: int, groups: int = 0) -> Tensor:
    """Rank attention heads by the l1 norm of their projections.

    Args:
        q: projection weight, (heads * head_size, hidden).
        k: (groups * head_size, hidden).
        v: as k.
        heads: number of heads; must divide the first dimension.
        groups: number of key/value heads, by default as many; each counts in equal parts for the
            heads that read it.

    Returns:
        Importance per head, shape (heads,), float64; higher is kept.

    Raises:
        ShapeError: the rows do not divide into `heads` or `groups`, or these not into each other.

    Source: composability reference, head-wise l1; summed over q, k and v, biases left out.
    """
    groups = groups or heads
    for weight, count in ((q, heads), (k, groups), (v, groups)):
        if count < 1 or weight.shape[0] % count:
            raise ShapeError(f"{weight.shape[0]} rows do not divide into {count} heads.")
    if heads % groups:
        raise ShapeError(f"{heads} heads do not divide into {groups} groups.")
    # float64, so that the ranking does not depend on the order of summation
    own = q.detach().double().abs().reshape(heads, -1).sum(1)
    shared = sum(w.detach().double().abs().reshape(groups, -1).sum(1) for w in (k, v))
    return own + (shared * groups / heads).repeat_interleave(heads // groups)  # type: ignore[operator,union-attr]


def importance_of(attention: nn.Module, module: Module) -> Tensor:
    """Rank the heads of an attention, see `head_importance`."""
    q, k, v = (attention.get_parameter(f"{module.part(role)}.weight") for role in "qkv")
    return head_importance(q, k, v, module.units, module.groups)


def _prune(attention: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    return Pruned(kept_units=kept_heads(importance_of(attention, module), module, rate))


HEAD_L1 = Method(
    name="head_l1",
    kinds=("attention",),
    reference="Michel et al. 2019 (arXiv 1905.10650) for heads as units; l1 as in Han et al. 2015",
    prune=_prune,
)
