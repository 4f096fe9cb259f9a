"""What a pruning method is: a name, the kinds it prunes, and one function per module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.linalg.grams import Gram, Regression
from composable.models.surgery import units_to_remove


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


#: What a method may ask for beside the weights of a module, see `Evidence`.
Need = Literal["inputs", "states", "scores", "seed"]


@dataclass(frozen=True)
class Evidence:
    """What is known of one module beside its weights; a method gets what it `needs`.

    Attributes:
        inputs: second moments of what enters a linear on the calibration texts; of an attention
            what enters its output projection, of an ffn what enters its down projection.
        states: of a block of layers, moments of what enters it with what it adds as the target, on
            the calibration texts and on the held-out ones.
        scores: importance of every unit of the module, (units,) float64; higher is kept.
        seed: of random numbers, another for every module.
    """

    inputs: Gram | None = None
    states: tuple[Regression, Regression] | None = None
    scores: Tensor | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        name: the word used in files and options.
        kinds: kinds of modules it can prune.
        reference: paper or program it follows.
        prune: (dense module, its description, rate, evidence) -> decision. The rate is above 0 and
            below 1, or 1 for those that put something in the module's place: rate 0 is untouched,
            and without such a method rate 1 is removal, done by surgery.
        needs: fields of `Evidence` without which it cannot decide.
        replaces: it puts something in the place of a block of layers, at rate 1 and no other.
    """

    name: str
    kinds: tuple[str, ...]
    reference: str
    prune: Callable[[nn.Module, Module, float, Evidence], Pruned]
    needs: tuple[Need, ...] = ()
    replaces: bool = False


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
    if module.whole_groups:
        groups = kept_units(grouped.sum(1), rate)
        return [group * size + head for group in groups for head in range(size)]
    return [
        group * size + head
        for group, scores in enumerate(grouped)
        for head in kept_units(scores, rate)
    ]


def keep_best(importance: Tensor, module: Module, rate: float) -> Pruned:
    """Keep the heads or neurons of the highest importance, (units,), of a module."""
    if module.kind == "attention":
        return Pruned(kept_units=kept_heads(importance, module, rate))
    return Pruned(kept_units=kept_units(importance, rate))


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
