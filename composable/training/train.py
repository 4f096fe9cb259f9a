"""The one place that sets up transformers.Trainer: loss, optimizer, checkpoints, resume."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from composable import files, runs, tasks
from composable.errors import UserError
from composable.linalg import kernels
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import apply_masks
from composable.tasks.samples import identity_of
from composable.training import checkpoints
from composable.training.callbacks import (
    EarlyStop,
    FindBest,
    Masks,
    Progress,
    SetEpoch,
    Stats,
    best_of,
    rounded_epoch,
    rows_of,
)
from composable.training.options import Options
from composable.training.trainer import Trainer

log = logging.getLogger("composable")


@dataclass
class Outcome:
    """What a training did.

    Attributes:
        rows: the stats, one per epoch; epoch 0 is the state before training.
        best_epoch: the epoch whose weights the model has now; no whole number where `steps` ended
            in the middle of one.
        resumed_from: epoch of the checkpoint it continued from, or None.
        is_main: whether this process writes the files.
        folder: the run's checkpoints; to be removed when the results are safe.
    """

    rows: list[dict[str, Any]]
    best_epoch: float
    resumed_from: float | None
    is_main: bool
    folder: runs.RunFolder

    def clean_up(self) -> None:
        """Remove the checkpoints of this run."""
        self.folder.release(remove=True)

    def report(self) -> dict[str, Any]:
        """Summarise for the closing JSON report."""
        losses = {row["epoch"]: row["validation_loss"] for row in self.rows}
        return {
            "epochs": self.rows[-1]["epoch"],
            "best_epoch": self.best_epoch,
            "validation_loss_start": losses[0],
            "validation_loss": losses[self.best_epoch],
            "training_seconds": round(sum(row["training_seconds"] for row in self.rows), 3),
            "resumed_from_epoch": self.resumed_from,
        }


def run(
    model: nn.Module,
    masks: dict[str, Tensor],
    data: tuple[Dataset[Any], Dataset[Any], Callable[..., Any]],
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    options: Options,
    identity: dict[str, Any],
    stats: Path | None = None,
    label: str = "train",
    callbacks: tuple[TrainerCallback, ...] = (),
    summarise: Callable[[Any], dict[str, float]] | None = None,
    keeps_best: bool = True,
) -> Outcome:
    """Train `model` in place and leave it with the weights of its best epoch.

    Args:
        model: everything with `requires_grad` is trained.
        masks: parameter name -> boolean tensor, True where the weight stays.
        data: training set (with `sizes`), validation set, collator.
        functions: (step, measure), see `Trainer`.
        options: settings.
        identity: what else the result depends on (of the model and its masks); a checkpoint is
            continued only if this, the options and the samples of `data` are the same.
        stats: CSV that is rewritten after every epoch.
        label: name of the progress bar and of the checkpoint folder.
        callbacks: further callbacks.
        summarise: turns what `measure` gave for all samples into {"loss": ...}; by default the
            sum of the values over the sum of the counts.
        keeps_best: go back to the best epoch at the end; off where the model does so itself.

    Raises:
        UserError: the loss is not finite, the batch does not divide among the processes.
    """
    training, validation, _ = data
    options = options.resolved()
    samples = {"data": [identity_of(training), identity_of(validation)]}
    folder = _run_folder(options, identity | samples, label)
    start = {name: t.clone() for name, t in model.state_dict().items()} if keeps_best else {}
    for parameter in model.parameters():
        if not parameter.numel():  # of an attention without heads; never has a gradient
            parameter.requires_grad_(False)
    shown = Progress(label)
    try:
        trainer = _trainer(
            model, data, functions, options, folder.path, keeps_best, Stats(stats),
            (EarlyStop(options.early_stop), Masks(masks), SetEpoch(), FindBest(), shown,
             *callbacks),
            summarise or mean_of_samples,
        )  # fmt: skip
        resumed = _train(trainer, folder, label)
    except BaseException:
        folder.release()
        raise
    finally:
        shown.close()
    rows = rows_of(trainer.state)
    best = best_of([row["validation_loss"] for row in rows])
    if keeps_best and best == 0:
        log.warning(
            "%s: no epoch was better than the start, so the start is kept; lower lr (now %g), "
            "or give more training data.",
            *(label, options.lr),
        )
        model.load_state_dict(start)
    model.to("cpu").eval()
    apply_masks(model, masks)
    return Outcome(rows, rows[best]["epoch"], resumed, trainer.is_world_process_zero(), folder)


def _trainer(
    model: nn.Module,
    data: tuple[Dataset[Any], Dataset[Any], Callable[..., Any]],
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    options: Options,
    folder: Path,
    keeps_best: bool,
    stats: Stats,
    callbacks: tuple[TrainerCallback, ...],
    summarise: Callable[[Any], dict[str, float]],
) -> Trainer:
    training, validation, collate = data
    try:
        trainer = Trainer(
            step=functions[0],
            measure=functions[1],
            options=options,
            sizes=training.sizes,  # type: ignore[attr-defined]
            stats=stats,
            model=model,
            args=_arguments(options, folder, keeps_best),
            train_dataset=training,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=summarise,
            callbacks=[stats, *callbacks],
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"these training options do not work here: {error}") from error
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
    for name in ("transformers.trainer", "transformers.trainer_utils"):
        # its remarks that tied weights are not stored twice, and on the age of checkpoints
        logging.getLogger(name).setLevel(logging.ERROR)
    return trainer


def _train(trainer: Trainer, folder: runs.RunFolder, label: str) -> float | None:
    """Train to the end; return the epoch of the checkpoint it went on from, or None."""
    options, model = trainer.options, trainer.model
    assert model is not None
    found: list[Path | None] = [None]
    if trainer.is_world_process_zero():
        if options.resume:
            found = [checkpoints.newest(folder.path, trainer.args.world_size)]
        if found == [None]:
            folder.clear()
    latest = broadcast_object_list(found)[0]
    resumed = None
    if latest:
        with checkpoints.reading(latest, checkpoints.STATE):
            resumed = rounded_epoch(float(checkpoints.state_of(latest)["epoch"]))
        log.info("%s: continuing after epoch %g (%s)", label, resumed, latest)
    longest = max(map(max, trainer.train_dataset.sizes))  # type: ignore[union-attr]
    with kernels.for_cpu(model, options.device, longest, trains=True):
        if options.compile:
            model.compile(dynamic=True)
        if latest:
            trainer.resume(latest)
        else:
            trainer.train()
        model._compiled_call_impl = None
    return resumed


def data_of(model: Checkpoint, corpora: tuple[Any, Any]) -> tuple[Any, Any, Callable[..., Any]]:
    """Return the training set, the validation set (longest first) and the collator for `run`."""
    task = tasks.by_name(model.info["task"])
    return (
        task.dataset(corpora[0], model),
        task.dataset(corpora[1], model, is_sorted=True),
        task.collator(model),
    )


def _arguments(options: Options, folder: Path, keeps_best: bool) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % world:
        raise UserError(f"batch_size {options.batch_size} does not divide among {world} processes.")
    if options.dtype == "float16" and options.device == "cpu":  # accelerate would stay at float32
        raise UserError("dtype float16 trains on a GPU only; use bfloat16 or float32 on the CPU.")
    if options.report_to == "tensorboard":
        place = options.checkpoint_dir / "runs" / folder.name
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(place))
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        per_device_train_batch_size=options.batch_size // world,
        per_device_eval_batch_size=max(1, options.batch_size // world),
        learning_rate=options.lr,
        max_grad_norm=options.clip,
        seed=options.seed,
        fp16=options.dtype == "float16",
        use_cpu=options.device == "cpu",
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_total_limit=None,  # see `checkpoints.rotate`
        load_best_model_at_end=keeps_best,
        metric_for_best_model="loss" if keeps_best else None,
        greater_is_better=False,
        report_to=options.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=options.device == "cuda",
        dataloader_num_workers=options.workers,
        # students that stopped; a position bias whose attentions are all gone
        ddp_find_unused_parameters=True,
    )
    args._n_gpu = min(1, args.n_gpu)  # several GPUs are used through torchrun, never DataParallel
    return args


def mean_of_samples(prediction: Any) -> dict[str, float]:
    """Mean of all values, weighted by their counts."""
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


def _run_folder(options: Options, identity: dict[str, Any], label: str) -> runs.RunFolder:
    """Folder of this very run: another input or option has another folder."""
    described = {**options.identity(), **identity, "torch": torch.__version__}
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # each has its own random states
        described["processes"] = world
    path = options.checkpoint_dir / f"{label}-{files.digest_of(described)[:16]}"
    return runs.RunFolder(path, is_main=int(os.environ.get("RANK", "0")) == 0)
