"""Module-level fine-tuning by gradient: all variants beside their dense modules in one pass."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from composable.errors import UserError
from composable.formats.bundle import Variant
from composable.models.checkpoint import Checkpoint
from composable.training import train
from composable.training.options import Options
from composable.variants.distillation import Distillation
from composable.variants.result import Result


def _step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared errors and tokens, each (students,); a student's gradient is as if it were alone."""
    errors, _, counts = model(**batch)
    return errors.sum(0), counts.sum(0)


def _measure(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per sentence: (batch, 2 * students) squared errors and squared outputs, and tokens."""
    errors, norms, counts = model(**batch)
    return torch.cat([errors, norms], 1), torch.cat([counts, counts], 1)


class KeepBest(TrainerCallback):
    """Notes every student's error after each validation, keeps its best weights, stops it in time.

    See `Distillation.update`.
    """

    def __init__(self, model: Distillation, patience: int):
        self.model, self.patience = model, patience
        self.errors = torch.zeros(len(model.students), dtype=torch.float64)
        self.norms = torch.ones(len(model.students), dtype=torch.float64)

    def summarise(self, prediction: Any) -> dict[str, float]:
        """Mean error per student; the loss is their sum.

        A student that has stopped, or whose error is no number any more, counts with its lowest:
        what one student does must not end the training of the others.
        """
        means = prediction.predictions.sum(0) / np.maximum(prediction.label_ids.sum(0), 1)
        errors, self.norms = (torch.from_numpy(half) for half in np.split(means, 2))
        best, stopped = self.model.best_error.cpu(), torch.tensor(self.model.is_stopped)
        self.errors = torch.where(stopped, best, errors)
        return {"loss": float(torch.where(errors.isfinite(), self.errors, best).sum())}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume: see from the buffers who had stopped."""
        self.model.refresh(self.patience)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the students once per epoch."""
        if round(state.epoch or 0) > int(self.model.epochs_seen):
            self.model.update(self.errors, self.norms, self.patience)
        if all(self.model.is_stopped):
            control.should_training_stop = True


def tune(
    dense: Checkpoint,
    variants: list[Variant],
    corpora: tuple[Any, Any],
    options: Options,
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
    learning = [variant for variant in variants if variant.learns]
    if not learning:
        count = len(variants)
        return Result(variants, kept=[None] * count, seconds=[0.0] * count, rows=[], report={})
    model = Distillation(dense, learning)
    callback = KeepBest(model, options.early_stop)
    identity = {
        "model": dense.fingerprint,
        "variants": [variant.digest for variant in learning],
        "patience": options.early_stop,
    }
    outcome = train.run(
        model,
        model.masks(),
        train.data_of(dense, corpora),
        (_step, _measure),
        dataclasses.replace(options, early_stop=0, clip=0.0),
        identity,
        stats,
        label="block",
        callbacks=(callback,),
        summarise=callback.summarise,
        keeps_best=False,
    )
    tuned = dict(zip(map(id, learning), _tuned(learning, model), strict=True))
    results = [tuned.get(id(variant), (variant, None)) for variant in variants]
    spent = sum(row["training_seconds"] + row["validation_seconds"] for row in outcome.rows)
    report = outcome.report()
    del report["best_epoch"]  # every variant has its own
    return Result(
        variants=[variant for variant, _ in results],
        kept=[kept for _, kept in results],
        seconds=[spent / len(learning) if variant.learns else 0.0 for variant in variants],
        rows=outcome.rows,
        report=report,
        is_main=outcome.is_main,
        folder=outcome.folder,
    )


def _tuned(learning: list[Variant], model: Distillation) -> Iterator[tuple[Variant, str | None]]:
    """Put the students' best weights into copies of their variants; say whether they are new."""
    for index, variant in enumerate(learning):
        first, best = float(model.first_error[index]), float(model.best_error[index])
        norm = max(float(model.dense_norm[index]), 1e-30)
        stats = {**variant.stats, "error_before": first / norm, "error_after": best / norm}
        tensors = model.students[index].tensors()
        for name, mask in variant.masks.items():
            tensors[name] = torch.where(mask, tensors[name], 0.0)
        kept = "trained" if best < first else "pruned"
        yield dataclasses.replace(variant, tensors=tensors, stats=stats), kept
