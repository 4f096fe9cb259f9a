"""The linear of a module that is refitted: itself, or the one that all its units flow into."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.formats.bundle import Variant
from composable.models.surgery import unit_rows


@dataclass(frozen=True)
class LastLinear:
    """A dense linear, and how its variants are written over all of its columns.

    Here a weight has the bias, where there is one, as a last column, as in `solver.refit`.

    Attributes:
        module: whose last linear it is: o of an attention, down of an ffn, a linear itself.
        weight: the dense one, (rows, n) float32 on the CPU.
        has_bias: whether the last column is a bias.
    """

    module: Module
    weight: Tensor
    has_bias: bool

    @classmethod
    def of(cls, model: nn.Module, module: Module) -> "LastLinear":
        """Read it from the dense model."""
        dense = dict(model.get_submodule(module.output_path).named_parameters())
        return cls(module, _joined(dense), "bias" in dense)

    @property
    def prefix(self) -> str:
        """What precedes `weight` and `bias` in the tensors of a variant."""
        return f"{self.module.output}." if self.module.parts else ""

    def read(self, variant: Variant) -> tuple[Tensor, Tensor]:
        """Spread the weights that a variant has over the columns of the dense linear.

        Returns:
            Weight (rows, n), 0 where the variant has none, and mask (rows, n), True where it has.
        """
        own, mask = self.own(variant)
        places = self._places(variant)
        weight, kept = torch.zeros_like(self.weight), torch.zeros(self.weight.shape).bool()
        weight[:, places], kept[:, places] = torch.where(mask, own, 0.0), mask
        return weight, kept

    def write(self, weight: Tensor, variant: Variant) -> dict[str, Tensor]:
        """Undo `read`: name weight and bias as the variant does, without the columns it lacks."""
        return self.named(weight[:, self._places(variant)])

    def named(self, weight: Tensor) -> dict[str, Tensor]:
        """Take a weight apart, and name weight and bias as a variant does."""
        if not self.has_bias:
            return {f"{self.prefix}weight": weight.contiguous()}
        parts = {"weight": weight[:, :-1], "bias": weight[:, -1]}
        return {f"{self.prefix}{name}": part.contiguous() for name, part in parts.items()}

    def unmasked(self, variant: Variant) -> Variant:
        """Return a variant with the dense weights where its own are masked."""
        name = f"{self.prefix}weight"
        if name not in variant.masks:
            return variant
        masks = {other: mask for other, mask in variant.masks.items() if other != name}
        own, mask = self.read(variant)
        tensors = self.write(torch.where(mask, own, self.weight), variant)
        return dataclasses.replace(variant, tensors=variant.tensors | tensors, masks=masks)

    def own(self, variant: Variant) -> tuple[Tensor, Tensor]:
        """Return the weight that a variant has, on its own columns, and where its mask keeps it."""
        names = [n for n in ("weight", "bias") if self.prefix + n in variant.tensors]
        weight = _joined({name: variant.tensors[self.prefix + name] for name in names})
        mask = torch.ones(weight.shape, dtype=torch.bool)
        if (part := variant.masks.get(f"{self.prefix}weight")) is not None:
            mask[:, : part.shape[1]] = part
        return weight, mask

    def _places(self, variant: Variant) -> Tensor:
        """Columns of the dense linear that the variant has."""
        n = self.weight.shape[1]
        if variant.kept_units is None:
            return torch.arange(n)
        columns = unit_rows(self.module, variant.kept_units)[self.module.output]
        return torch.cat([columns, torch.tensor([n - 1])]) if self.has_bias else columns


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """Append `bias`, where there is one, to `weight` as a last column; float32, on the CPU."""
    weight = tensors["weight"].detach().float().cpu()
    if "bias" not in tensors:
        return weight
    return torch.cat([weight, tensors["bias"].detach().float().cpu()[:, None]], 1)
