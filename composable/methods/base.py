"""What a pruning method is: a name, the kinds it prunes, and one function per module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from composable.families import Module


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
        prune: (dense module, its description, rate, calibration) -> decision; rate is above 0 and
            below 1, since rate 0 is untouched and rate 1 is removal, done by surgery for all.
    """

    name: str
    kinds: tuple[str, ...]
    reference: str
    prune: Callable[[nn.Module, Module, float, Any], Pruned]
