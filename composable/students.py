"""A variant that learns to imitate its dense module."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from composable.surgery import keep_heads

if TYPE_CHECKING:
    from composable.bundle import Variant
    from composable.families import Family, Module


class Student(nn.Module):
    """A variant that learns to give its dense module's output from its dense module's input.

    Attributes:
        part: the pruned module as it is now.
        best: as it was at its lowest validation error.
        names: parameters of `part` that learn.
        masks: parameter name within `part` -> boolean tensor, True where the weight stays.
    """

    def __init__(self, variant: "Variant", module: "Module", family: "Family", dense: nn.Module):
        super().__init__()
        self.part = copy.deepcopy(dense)
        if variant.kept_heads is not None:
            keep_heads(self.part, module, variant.kept_heads)
            family.adapt_attention(self.part, variant.kept_heads)
        self.part.requires_grad_(False)
        self.names = sorted(variant.tensors)
        for name, tensor in variant.tensors.items():
            parameter = self.part.get_parameter(name)
            parameter.data = tensor.to(parameter.device, copy=True)
            parameter.requires_grad_(True)
        self.best = copy.deepcopy(self.part).requires_grad_(False)
        self.masks: dict[str, Tensor] = variant.masks

    def mask_gradients(self) -> None:
        """Leave masked weights out of the training: without decay a zero without gradient stays."""
        for name, mask in self.masks.items():
            weight = self.part.get_parameter(name)
            kept = mask.to(weight.device)
            weight.register_hook(lambda grad, kept=kept: torch.where(kept, grad, 0.0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pruned module."""
        return self.part(*args, **kwargs)

    def keep(self) -> None:
        """Remember the present weights as the best."""
        self.best.load_state_dict(self.part.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Weights at the lowest validation error, on the CPU."""
        return {name: self.best.get_parameter(name).detach().cpu() for name in self.names}
