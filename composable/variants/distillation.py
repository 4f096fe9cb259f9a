"""The frozen dense model with variants beside its modules, each of which learns from its own."""

from typing import Any

import torch
from torch import Tensor, nn

from composable.calibration.recorded_calls import watch
from composable.formats.bundle import Variant
from composable.models.checkpoint import Checkpoint
from composable.variants.students import Student


class Distillation(nn.Module):
    """The dense model as a frozen teacher, with all students beside their modules.

    The dense model is no submodule, so that checkpoints hold the students alone. What is known of
    each student (lowest error, epochs without a better one) lies in buffers: a resumed run has it.
    Students are made of variants that have tensors.
    """

    dense_norm: Tensor
    first_error: Tensor
    best_error: Tensor
    bad_epochs: Tensor
    epochs_seen: Tensor

    def __init__(self, dense: Checkpoint, variants: list[Variant]):
        super().__init__()
        family = dense.family
        modules = {module.name: module for module in family.modules(dense.model)}
        self._dense: list[Any] = [dense.model.requires_grad_(False)]
        self.family = family
        self.modules_of = [modules[variant.module] for variant in variants]
        # the same objects twice: with their type, and registered, so that they train
        self.students = [
            Student(variant, module, family, dense.model)
            for variant, module in zip(variants, self.modules_of, strict=True)
        ]
        self.parts = nn.ModuleList(self.students)
        count = len(variants)
        unknown = torch.full((count,), float("inf"), dtype=torch.float64)
        self.register_buffer("dense_norm", torch.ones(count, dtype=torch.float64))
        self.register_buffer("first_error", unknown.clone())
        self.register_buffer("best_error", unknown.clone())
        self.register_buffer("bad_epochs", torch.zeros(count, dtype=torch.long))
        self.register_buffer("epochs_seen", torch.tensor(-1))
        self.is_stopped = [False] * count
        self._sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._valid: dict[str, Tensor] = {}
        by_module: dict[str, list[int]] = {}
        for index, module in enumerate(self.modules_of):
            by_module.setdefault(module.name, []).append(index)
        for indices in by_module.values():
            self._hook(indices)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode; dropout stays off everywhere, for teacher and students see one input."""
        self.training = mode
        return self

    def masks(self) -> dict[str, Tensor]:
        """Masks of all students by parameter name."""
        return {
            f"parts.{index}.part.{name}": mask
            for index, student in enumerate(self.students)
            for name, mask in student.masks.items()
        }

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the dense model once and every student on its module's input.

        Returns:
            Squared error, squared dense output (both averaged over the features and summed over
            the valid tokens) and number of valid tokens, each (batch, students).
        """
        first = next(iter(batch.values()))
        dense = self._dense[0].to(first.device)
        self._valid = self.family.valid_tokens(dense, batch)
        self._sums = {}
        with torch.no_grad():
            self.family.run(dense, batch)
        nothing = first.new_zeros(len(first), dtype=torch.float32)
        empty = (nothing, nothing, nothing)
        columns = [self._sums.get(index, empty) for index in range(len(self.students))]
        errors, norms, counts = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        return errors, norms, counts

    def update(self, errors: Tensor, norms: Tensor, patience: int) -> None:
        """Note the validation error of every student; keep the best, stop those that ran out.

        Args:
            errors: (students,), float64.
            norms: squared dense output of each, on the same data.
            patience: epochs without a lower error before a student stops; 0 never stops.
        """
        if int(self.epochs_seen) < 0:
            self.first_error.copy_(errors)
            self.dense_norm.copy_(norms)
        for index, student in enumerate(self.students):
            if self.is_stopped[index]:
                continue
            if errors[index] < self.best_error[index]:
                self.best_error[index] = errors[index]
                self.bad_epochs[index] = 0
                student.keep()
            else:
                self.bad_epochs[index] += 1
        self.epochs_seen += 1
        self.refresh(patience)

    def refresh(self, patience: int) -> None:
        """Stop those students whose epochs without a lower error reach the patience."""
        for index, student in enumerate(self.students):
            self.is_stopped[index] = bool(patience) and int(self.bad_epochs[index]) >= patience
            if self.is_stopped[index]:
                student.part.requires_grad_(False)

    def _hook(self, indices: list[int]) -> None:
        """Compare some students with their dense module whenever it has run."""
        module = self.modules_of[indices[0]]

        def compare(args: Any, kwargs: Any, target: Tensor) -> None:
            valid = self._valid[module.stack]
            counts = valid.sum(1).float()
            norms = _sum_valid(target.float(), valid)
            for index in indices:
                if self.is_stopped[index]:
                    continue
                with torch.set_grad_enabled(self.training):
                    own = self.students[index](*args, **kwargs)
                    errors = _sum_valid(own.float() - target.float(), valid)
                self._sums[index] = (errors, norms, counts)

        watch(self._dense[0], self.family, module, compare)


def _sum_valid(difference: Tensor, valid: Tensor) -> Tensor:
    """Square, average over the features, sum over valid tokens: (batch,).

    Args:
        difference: (batch, length, features), or (batch * length, features).
        valid: (batch, length), bool.
    """
    squares = difference.square().mean(-1).view(valid.shape)
    return torch.where(valid, squares, 0.0).sum(1)
