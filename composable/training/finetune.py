"""Model-level fine-tuning from a model file to a model file."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from torch import nn

from composable import files, tasks
from composable.formats.stats_file import stats_csv
from composable.models import checkpoint, cost
from composable.models.checkpoint import Checkpoint
from composable.models.structure import to_json
from composable.tasks.base import warn_if_far_worse
from composable.tasks.splits import short_name
from composable.training import train
from composable.training.heal import Heal, prepare
from composable.training.options import Options

log = logging.getLogger("composable")


def tune_model(
    composed: Checkpoint,
    output: Path,
    stats: Path,
    training: Options,
    label: str,
    data: str | None = None,
    limit: int | None = None,
    heal: Heal | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Fine-tune a whole model on the training split and write it.

    Weights are trained in float32, and written as the file had them; pruned ones stay zero.

    Args:
        composed: the model, composed or dense.
        output: model file to write.
        stats: CSV to write.
        training: settings.
        label: name of the run.
        data: see `tasks.base.Task.read`, as for `limit`.
        limit: samples of each split.
        heal: which weights learn; None: all.

    Returns:
        The closing report.
    """
    heal = heal or Heal()
    training = dataclasses.replace(training, optimizer=heal.optimizer)
    task = tasks.by_name(composed.info["task"])
    training = with_defaults(training.resolved(), batch_size=task.batch_size, lr=heal.lr)
    corpora, stored = corpora_of(composed, data, limit), composed.model.dtype
    identity = {
        "model": checkpoint.fingerprint_of(composed.config, composed.model.state_dict()),
        "masks": checkpoint.fingerprint_of({}, composed.masks),
        "structure": to_json(composed.structure),
        "heal": heal.identity(),
    }
    composed.info |= task.learned(composed, corpora[0])
    composed.model.float()
    finish = prepare(composed, heal)
    learning = sum(p.numel() for p in composed.model.parameters() if p.requires_grad)
    outcome = train.run(
        composed.model,
        composed.masks,
        train.data_of(composed, corpora),
        task.functions(training.smoothing),
        training,
        identity,
        stats,
        label=label,
    )
    finish()
    report = {
        **outcome.report(),
        **({} if heal.how == "full" else {"heal": heal.how, "learning_parameters": learning}),
        "stats": str(stats),
        "data": corpora[0].name,
        "dtype": training.dtype,
    }
    # wall time and paths stay out of the file: same input, same bytes
    free = ("training_seconds", "resumed_from_epoch", "stats")
    named = {"data": short_name(corpora[1].name)}
    facts = {k: v for k, v in {**training.identity(), **report, **named}.items() if k not in free}
    if outcome.is_main:
        warn_if_far_worse(composed.info, report["validation_loss"], named["data"])
    composed.info["history"].append({label: facts})
    if outcome.is_main:
        nn.Module.to(composed.model, stored)
        if composed.is_dense:  # with other weights it is another dense model
            state = composed.model.state_dict()
            composed.fingerprint = checkpoint.fingerprint_of(composed.config, state)
        checkpoint.save(output, composed)
        files.write_text(stats, stats_csv(outcome.rows))
        outcome.clean_up()
    return {
        "wrote": str(output),
        **report,
        "parameters": cost.parameters(composed.model),
        "nonzero_parameters": cost.nonzero_parameters(composed.model),
    }


def with_defaults(training: Options, **defaults: Any) -> Options:
    """Fill in the options that were not given."""
    open_ones = {key: value for key, value in defaults.items() if getattr(training, key) is None}
    return dataclasses.replace(training, **open_ones)


def corpora_of(model: Checkpoint, data: str | None, limit: int | None) -> tuple[Any, Any]:
    """Read the training and the validation split for the model's task."""
    task, default = tasks.by_name(model.info["task"]), model.info.get("data")
    return task.read(data, default, "train", limit), task.read(data, default, "valid", limit)
