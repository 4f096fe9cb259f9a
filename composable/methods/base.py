"""What a pruning method is: a name, the kinds it prunes, and one function per module."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.solver import Gram


@dataclass
class Pruned:
    """What a method decides about one module at one rate; tensors follow from it.

    Attributes:
        kept_heads: ascending head ids that stay (attentions).
        mask: boolean, True where the weight stays, the shape of the weight (linears).
        tensors: parameters the method changed, by name relative to the module; others are taken
            from the dense module.
    """

    kept_heads: list[int] | None = None
    mask: Tensor | None = None
    tensors: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        name: the word used in files and options.
        kinds: kinds of modules it can prune.
        reference: paper or program it follows.
        prune: (dense module, its description, rate, inputs) -> decision; rate is above 0 and below
            1, since rate 0 is untouched and rate 1 is removal, done by surgery for all. `inputs`
            are the statistics of what enters the linear (of an attention: its output projection)
            in the dense model, None where none were collected.
        uses_inputs: it cannot decide without `inputs`.
    """

    name: str
    kinds: tuple[str, ...]
    reference: str
    prune: Callable[[nn.Module, Module, float, Gram | None], Pruned]
    uses_inputs: bool = False


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
