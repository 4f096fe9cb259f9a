"""A variant that learns to imitate its dense module."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from composable.families import Family, Module
from composable.formats.bundle import Variant
from composable.models.surgery import adapt, keep_units, put


class FeedForward(nn.Module):
    """An ffn by itself: down(activation(up(x))), or down(activation(gate(x)) * up(x)).

    Its linears are copies of those in `holder`, under the same names; these may lie in the layer
    itself. The family names the activation.
    """

    def __init__(self, holder: nn.Module, module: Module, family: Family):
        super().__init__()
        for _, path in module.parts:
            self._add_parents(path)
            put(self, path, copy.deepcopy(holder.get_submodule(path)))
        self._roles = dict(module.parts)
        parent, _, child = family.activation.rpartition(".")
        self._activation: list[Any] = [getattr(holder.get_submodule(parent), child)]

    def _add_parents(self, path: str) -> None:
        """Add the modules that a path goes through."""
        names = path.split(".")[:-1]
        for end in range(1, len(names) + 1):
            place = ".".join(names[:end])
            if place not in dict(self.named_modules()):
                put(self, place, nn.Module())

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., hidden)."""
        part = {role: self.get_submodule(path) for role, path in self._roles.items()}
        up: Tensor = part["up"](hidden)
        active = self._activation[0](part["gate"](hidden) if "gate" in part else up)
        output: Tensor = part["down"](active * up if "gate" in part else active)
        return output


class Student(nn.Module):
    """A variant that learns to give its dense module's output from its dense module's input.

    Attributes:
        part: the pruned module as it is now.
        best: as it was at its lowest validation error.
        names: parameters of `part` that learn.
        masks: parameter name within `part` -> boolean tensor, True where the weight stays.
    """

    def __init__(self, variant: Variant, module: Module, family: Family, model: nn.Module):
        super().__init__()
        holder = model.get_submodule(module.holder)
        if module.kind == "ffn":
            self.part: nn.Module = FeedForward(holder, module, family)
        else:
            self.part = copy.deepcopy(holder)
        if variant.kept_units is not None:
            keep_units(self.part, module, variant.kept_units)
        if module.kind == "attention" and variant.kept_units is not None:
            adapt(self.part, module, family, variant.kept_units)
        self._output = module.output if module.parts else ""
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

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the pruned module, up to its last linear: what follows is the layer's."""
        return output_of(self.part, self._output, *args, **kwargs)

    def best_output(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do as `forward`, with the weights at the lowest validation error."""
        return output_of(self.best, self._output, *args, **kwargs)

    def keep(self) -> None:
        """Remember the present weights as the best."""
        self.best.load_state_dict(self.part.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Weights at the lowest validation error, on the CPU."""
        return {name: self.best.get_parameter(name).detach().cpu() for name in self.names}


def output_of(part: nn.Module, last: str, *args: Any, **kwargs: Any) -> Tensor:
    """Run a module and return what its child `last` gives; with "" what it gives itself.

    Some attentions add their input and normalise, some return a tuple: the output of the projection
    is one thing in all of them.
    """
    if not last:
        found: Tensor = part(*args, **kwargs)
        return found
    seen: list[Tensor] = []
    with part.get_submodule(last).register_forward_hook(lambda _, __, out: seen.append(out)):
        part(*args, **kwargs)
    return seen[-1]
