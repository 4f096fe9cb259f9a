"""Module-level fine-tuning: every variant beside its dense module, all in one pass, by gradient."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from composable.errors import UserError
from composable.formats.bundle import Variant
from composable.models.checkpoint import Checkpoint
from composable.training import train
from composable.variants.students import Student


class Classroom(nn.Module):
    """The dense model, frozen, with all students beside their modules.

    The dense model is no submodule, so that checkpoints hold the students alone. What is known of
    each student (lowest error, epochs without a better one) lies in buffers: a resumed run has it.

    Args:
        dense: the dense model.
        variants: those that have tensors.
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
        # the same objects twice: registered, so that they train, and with their type
        self.pupils = [
            Student(variant, module, family, dense.model)
            for variant, module in zip(variants, self.modules_of, strict=True)
        ]
        self.students = nn.ModuleList(self.pupils)
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
        self._hook_dense()

    def train(self, mode: bool = True) -> "Classroom":
        """Set the mode; dropout stays off everywhere, for teacher and students see one input."""
        self.training = mode
        return self

    def masks(self) -> dict[str, Tensor]:
        """Masks of all students by parameter name."""
        return {
            f"students.{index}.part.{name}": mask
            for index, student in enumerate(self.pupils)
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
        columns = [self._sums.get(index, empty) for index in range(len(self.pupils))]
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
        for index, student in enumerate(self.pupils):
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
        for index, student in enumerate(self.pupils):
            self.is_stopped[index] = bool(patience) and int(self.bad_epochs[index]) >= patience
            if self.is_stopped[index]:
                student.part.requires_grad_(False)

    def _hook_dense(self) -> None:
        """See what enters every dense module, and what its last linear gives."""
        by_module: dict[str, list[int]] = {}
        for index, module in enumerate(self.modules_of):
            by_module.setdefault(module.name, []).append(index)
        for indices in by_module.values():
            module = self.modules_of[indices[0]]
            holder = self._dense[0].get_submodule(module.holder)
            call = _Call()
            if module.kind == "ffn":  # its linears may lie among others: from the first to the last
                first, last = (holder.get_submodule(module.part(role)) for role in ("up", "down"))
                first.register_forward_pre_hook(call.see_inputs, with_kwargs=True)
                last.register_forward_hook(call.see_output)
                last.register_forward_hook(self._hook(indices, call), with_kwargs=True)
                continue
            if module.kind == "attention":
                holder.get_submodule(module.output).register_forward_hook(call.see_output)
            holder.register_forward_hook(self._hook(indices, call), with_kwargs=True)

    def _hook(self, indices: list[int], call: "_Call") -> Any:
        module = self.modules_of[indices[0]]

        def compare(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if module.kind == "attention":
                args, kwargs = self.family.replayed(args, kwargs, output)
            elif module.kind == "ffn":
                args, kwargs = call.inputs
            target = call.output if module.parts else output
            valid = self._valid[module.stack]
            counts = valid.sum(1).float()
            norms = _sum_valid(target.float(), valid)
            for index in indices:
                if self.is_stopped[index]:
                    continue
                with torch.set_grad_enabled(self.training):
                    imitation = self.pupils[index](*args, **kwargs)
                    errors = _sum_valid(imitation.float() - target.float(), valid)
                self._sums[index] = (errors, norms, counts)

        return compare


class _Call:
    """What a dense module was given, and what its last linear gave."""

    inputs: Any
    output: Any

    def see_inputs(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the arguments."""
        self.inputs = args, kwargs

    def see_output(self, part: nn.Module, args: Any, output: Any) -> None:
        """Keep the output."""
        self.output = output


def _sum_valid(difference: Tensor, valid: Tensor) -> Tensor:
    """Square, average over the features, sum over valid tokens: (batch,).

    Args:
        difference: (batch, length, features), or (batch * length, features).
        valid: (batch, length), bool.
    """
    squares = difference.square().mean(-1).view(valid.shape)
    return torch.where(valid, squares, 0.0).sum(1)


def _step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared errors and tokens, each (students,); a student's gradient is as if it were alone."""
    errors, _, counts = model(**batch)
    return errors.sum(0), counts.sum(0)


def _measure(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per sentence: (batch, 2 * students) squared errors and squared outputs, and tokens."""
    errors, norms, counts = model(**batch)
    return torch.cat([errors, norms], 1), torch.cat([counts, counts], 1)


class Report(TrainerCallback):
    """Takes the students' errors of every validation: keeps the best, stops who ran out.

    Args:
        room: the model that is trained.
        patience: see `Classroom.update`.
    """

    def __init__(self, room: Classroom, patience: int):
        self.room, self.patience = room, patience
        self.errors = torch.zeros(len(room.pupils), dtype=torch.float64)
        self.norms = torch.ones(len(room.pupils), dtype=torch.float64)

    def summarise(self, prediction: Any) -> dict[str, float]:
        """Mean error per student; the loss is their sum.

        A student that has stopped, or whose error is no number any more, counts with its lowest:
        what one student does must not end the training of the others.
        """
        means = prediction.predictions.sum(0) / np.maximum(prediction.label_ids.sum(0), 1)
        errors, self.norms = (torch.from_numpy(half) for half in np.split(means, 2))
        best, stopped = self.room.best_error.cpu(), torch.tensor(self.room.is_stopped)
        self.errors = torch.where(stopped, best, errors)
        return {"loss": float(torch.where(errors.isfinite(), self.errors, best).sum())}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume: see from the buffers who had stopped."""
        self.room.refresh(self.patience)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the students once per epoch."""
        if round(state.epoch or 0) > int(self.room.epochs_seen):
            self.room.update(self.errors, self.norms, self.patience)
        if all(self.room.is_stopped):
            control.should_training_stop = True


@dataclass
class Result:
    """What module-level fine-tuning by gradient made.

    Attributes:
        variants: in the order given, with `error_before` and `error_after` in their stats:
            squared error over squared dense output on the validation data.
        outcome: of the training; None where no variant has tensors.
    """

    variants: list[Variant]
    outcome: train.Outcome | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The stats, one per epoch."""
        return self.outcome.rows if self.outcome else []

    @property
    def seconds(self) -> list[float]:
        """Each variant's equal part of the training, for they are trained side by side."""
        trained = [variant.learns for variant in self.variants]
        total = sum(row["training_seconds"] + row["validation_seconds"] for row in self.rows)
        return [total / sum(trained) if one else 0.0 for one in trained]

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.outcome is None or self.outcome.is_main

    def report(self) -> dict[str, Any]:
        """Summarise for the closing JSON report."""
        summary = self.outcome.report() if self.outcome else {}
        summary.pop("best_epoch", None)  # every variant has its own
        return summary

    def clean_up(self) -> None:
        """Remove the checkpoints."""
        if self.outcome:
            self.outcome.clean_up()


def tune(
    dense: Checkpoint,
    variants: list[Variant],
    corpora: tuple[Any, Any],
    options: train.Options,
    stats: Path | None = None,
) -> Result:
    """Fine-tune all variants beside the frozen dense model, each with its own best epoch.

    Args:
        dense: the dense model; its hooks are left behind, do not use it afterwards.
        variants: of this model; those that are removed pass through.
        corpora: training and validation data of the model's task.
        options: `early_stop` is the patience of every variant by itself; gradients are never
            clipped, because a norm over all variants would couple them.
        stats: CSV of the summed losses.

    Raises:
        UserError: float16, a loss that is no number, data or options that do not fit.
    """
    if options.dtype == "float16":
        # its loss scaler skips the step of all variants for an overflow in one of them
        raise UserError("dtype float16 would couple the variants; use bfloat16 or float32.")
    pupils = [variant for variant in variants if variant.learns]
    if not pupils:
        return Result(variants, None)
    room = Classroom(dense, pupils)
    report = Report(room, options.early_stop)
    identity = {
        "model": dense.fingerprint,
        "variants": [variant.digest for variant in pupils],
        "patience": options.early_stop,
    }
    outcome = train.run(
        room,
        room.masks(),
        train.data_of(dense, corpora),
        (_step, _measure),
        dataclasses.replace(options, early_stop=0, clip=0.0),
        identity,
        stats,
        label="block",
        callbacks=(report,),
        summarise=report.summarise,
        keeps_best=False,
    )
    return Result(_collect(variants, pupils, room), outcome)


def _collect(variants: list[Variant], pupils: list[Variant], room: Classroom) -> list[Variant]:
    """Put the students' best weights into copies of their variants."""
    tuned = {}
    norms = room.dense_norm.clamp(min=1e-30)
    for index, variant in enumerate(pupils):
        stats = {
            **variant.stats,
            "error_before": float(room.first_error[index] / norms[index]),
            "error_after": float(room.best_error[index] / norms[index]),
        }
        tensors = room.pupils[index].tensors()
        for name, mask in variant.masks.items():
            tensors[name] = torch.where(mask, tensors[name], 0.0)
        tuned[id(variant)] = dataclasses.replace(variant, tensors=tensors, stats=stats)
    return [tuned.get(id(variant), variant) for variant in variants]
