"""What a pruning method is: a name, the kinds it prunes, and one function per module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.surgery import units_to_remove


@dataclass
class Pruned:
    """What a method decides about one module at one rate; tensors follow from it.

    Attributes:
        kept_units: ascending ids of the heads (attentions) or neurons (ffns) that stay.
        mask: boolean, True where the weight stays, the shape of the weight (linears).
        tensors: parameters the method changed, by name relative to the module; others are taken
            from the dense module.
        stats: what was measured in deciding, for the variant.
    """

    kept_units: list[int] | None = None
    mask: Tensor | None = None
    tensors: dict[str, Tensor] | None = None
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        name: the word used in files and options.
        kinds: kinds of modules it can prune.
        reference: paper or program it follows.
        prune: (dense module, its description, rate, inputs) -> decision; rate is above 0 and below
            1, since rate 0 is untouched and rate 1 is removal, done by surgery for all but those
            that put something in its place. `inputs` are the statistics of what enters the linear
            (of an attention: its output projection, of an ffn: its down projection) in the dense
            model, None where none were collected.
        uses_inputs: it cannot decide without `inputs`.
        uses_states: it replaces a block of layers (rate 1); its `inputs` are moments of the states
            before and after the block on calibration texts and on held-out ones.
    """

    name: str
    kinds: tuple[str, ...]
    reference: str
    prune: Callable[[nn.Module, Module, float, Any], Pruned]
    uses_inputs: bool = False
    uses_states: bool = False


def kept_units(importance: Tensor, rate: float) -> list[int]:
    """Ascending ids of the units that stay; of equal ones the lower index goes first.

    Args:
        importance: (units,); higher is kept.
        rate: fraction removed.
    """
    order = torch.sort(importance, stable=True).indices
    return sorted(order[units_to_remove(len(importance), rate) :].tolist())


def kept_heads(importance: Tensor, module: Module, rate: float) -> list[int]:
    """Ascending ids of the query heads that stay, as grouped queries allow.

    Args:
        importance: (heads,); higher is kept.
        module: an attention. Where several query heads read one key/value head, either whole
            groups leave, by the sums of their heads, or equally many heads from every group.
        rate: fraction removed, of the groups or of every group.
    """
    if module.groups == module.units:
        return kept_units(importance, rate)
    grouped = importance.view(module.groups, -1)
    size = grouped.shape[1]
    if module.by_groups:
        groups = kept_units(grouped.sum(1), rate)
        return [group * size + head for group in groups for head in range(size)]
    return [
        group * size + head
        for group, scores in enumerate(grouped)
        for head in kept_units(scores, rate)
    ]


def weights_to_remove(weights: int, rate: float) -> int:
    """Count the weights that go: floor(weights * rate + 0.5)."""
    return int(weights * rate + 0.5)


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Mark all but the `count` lowest scores; of equal ones the lower index goes first.

    Args:
        scores: any shape, any device; one that is not a number counts as the highest.
        count: how many go, 0 to all.

    Returns:
        Boolean tensor of the same shape and device with exactly `count` zeros.
    """
    mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if count:
        flat = torch.nan_to_num(scores.detach().flatten(), nan=torch.inf, posinf=torch.inf)
        # the count-th lowest value costs far less than a sort of all
        limit = flat.kthvalue(count).values
        gone = flat < limit
        ties = (flat == limit).nonzero().flatten()
        gone[ties[: count - int(gone.sum())]] = True
        mask.view(-1)[gone] = False
    return mask
