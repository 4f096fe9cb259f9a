"""The one place that sets up transformers.Trainer: masks, early stopping, checkpoints, stats.csv."""

import csv
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor

from composable import cli, files
from composable.errors import UserError
from composable.surgery import apply_masks

log = logging.getLogger("composable")
STATS_HEADER = (
    "epoch",
    "training_loss",
    "validation_loss",
    "training_seconds",
    "validation_seconds",
    "learning_rate",
)
#: Files a checkpoint of one process must have; Trainer accepts silently that some are missing.
COMPLETE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


@dataclass(frozen=True)
class Options:
    """Settings of a training, as the scripts' options give them.

    Attributes:
        epochs: passes over the training data at most.
        batch_size: sentences per optimizer step, over all processes.
        lr: peak learning rate, after linear warm-up; linear decay to 0 at the last epoch.
        early_stop: epochs without a lower validation loss before training stops; 0 never stops.
        seed: of the sampler and of dropout.
        device: auto, cpu, cuda or cuda:N.
        dtype: of autocast; weights stay float32.
        resume: continue from a checkpoint of the same run.
        checkpoint_dir: folder under which the run keeps its checkpoints.
        report_to: none, tensorboard or wandb.
        warmup: share of all steps that warm up.
        clip: gradient norm above which gradients are scaled down; 0 never.
        smoothing: label smoothing.
        final_lr: share of `lr` that the last step still has.
    """

    epochs: int
    batch_size: int
    lr: float
    early_stop: int
    seed: int = 42
    device: str = "auto"
    dtype: str = "float32"
    resume: bool = True
    checkpoint_dir: Path = Path("checkpoints")
    report_to: str = "none"
    warmup: float = 0.05
    clip: float = 1.0
    smoothing: float = 0.0
    final_lr: float = 0.0

    def identity(self) -> dict[str, Any]:
        """Return those options on which the result depends."""
        free = ("resume", "checkpoint_dir", "report_to")
        return {key: value for key, value in asdict(self).items() if key not in free}


@dataclass
class Outcome:
    """What a training did.

    Attributes:
        rows: the stats, one per epoch; epoch 0 is the state before training.
        best_epoch: the epoch whose weights the model has now.
        resumed_from: epoch of the checkpoint it continued from, or None.
        is_main: whether this process writes the files.
        folder: the run's checkpoints; to be removed when the results are safe.
    """

    rows: list[dict[str, Any]]
    best_epoch: int
    resumed_from: int | None
    is_main: bool
    folder: Path
    extra: dict[str, Any] = field(default_factory=dict)

    def write_stats(self, path: Path) -> None:
        """Write the stats CSV."""
        files.write_text(path, stats_csv(self.rows))

    def clean_up(self) -> None:
        """Remove the checkpoints of this run."""
        if self.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        """Summarise for the closing JSON report."""
        losses = [row["validation_loss"] for row in self.rows]
        return {
            "epochs": self.rows[-1]["epoch"],
            "best_epoch": self.best_epoch,
            "validation_loss_start": losses[0],
            "validation_loss": losses[self.best_epoch],
            "training_seconds": round(sum(row["training_seconds"] for row in self.rows), 3),
            "resumed_from_epoch": self.resumed_from,
        }


class LengthSampler(Sampler[int]):
    """Random order in which the sentences of a batch are about equally long.

    The order is a function of (seed, epoch) alone, so that a run continues exactly and all
    processes agree; transformers' group_by_length draws from the global generator instead.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = 50 * self.batch
        ordered = [
            index
            for start in range(0, len(order), pool)
            for index in sorted(order[start : start + pool], key=lambda i: -self.lengths[i])
        ]
        batches = [ordered[i : i + self.batch] for i in range(0, len(ordered), self.batch)]
        full = [batch for batch in batches if len(batch) == self.batch]
        rest = [batch for batch in batches if len(batch) < self.batch]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter([index for batch in shuffled + rest for index in batch])


class Trainer(transformers.Trainer):
    """transformers' Trainer with our sampler, optimizer, loss and validation.

    Args:
        step: (model, batch) -> sum of the losses of a batch and the number of things summed.
        measure: (model, batch) -> values and counts of every sample, each (batch, ...).
        options: settings.
        lengths: length of every training sample.
    """

    def __init__(
        self, *, step: Any, measure: Any, options: Options, lengths: list[int], **kwargs: Any
    ):
        self._step, self._measure, self._options, self._lengths = step, measure, options, lengths
        super().__init__(**kwargs)
        # T5 ignores num_items_in_batch and Trainer counts labels from the second on: we count
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthSampler(self._lengths, self._options.batch_size, self._options.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make Adafactor with relative update sizes over everything that has a gradient."""
        if self.optimizer is None:
            learned = [p for p in self.model.parameters() if p.requires_grad and p.numel()]
            self.optimizer = Adafactor(
                learned, lr=self._options.lr, scale_parameter=True, relative_step=False
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule: linear warm-up, then linear decay."""
        if self.lr_scheduler is None:
            warm = max(1, int(num_training_steps * self._options.warmup))
            final = self._options.final_lr

            def factor(step: int) -> float:
                if step < warm:
                    return (step + 1) / warm
                left = max(0.0, (num_training_steps - step) / max(1, num_training_steps - warm))
                return final + (1 - final) * left

            target = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the batch of all processes, so that two processes equal one."""
        total, count = self._step(model, inputs)
        world = self.accelerator.num_processes
        if world > 1:
            count = self.accelerator.reduce(count.detach().clone(), "sum") / world
        return total / count

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Measure a validation batch sample by sample; the mean is taken over all of them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            values, counts = self._measure(model, inputs)
        return None, values.double(), counts.double()


class Stats(TrainerCallback):
    """Keeps one row per epoch in the trainer's state (so a resumed run has all), and the CSV."""

    def __init__(self, path: Path | None):
        self.path, self.loss, self.lr, self.started, self.seconds = path, None, 0.0, 0.0, 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock before validation."""
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Pick up the training loss of the epoch."""
        if logs and "loss" in logs:
            self.loss, self.lr = logs["loss"], logs["learning_rate"]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Add the row of this epoch."""
        epoch = round(state.epoch or 0)
        rows = rows_of(state)
        if metrics is None or (rows and rows[-1]["epoch"] >= epoch):
            return  # a resumed run validates once more before it starts
        row = {
            "epoch": epoch,
            "training_loss": self.loss if epoch else None,
            "validation_loss": metrics["eval_loss"],
            "training_seconds": round(self.seconds, 3) if epoch else 0.0,
            "validation_seconds": round(metrics.get("eval_runtime", 0.0), 3),
            "learning_rate": self.lr if epoch else 0.0,
        }
        state.log_history.append({"stats": row})
        if self.path and state.is_world_process_zero:
            files.write_text(self.path, stats_csv(rows_of(state)))


class EarlyStop(TrainerCallback):
    """Stops after `patience` epochs without a lower validation loss, seen from the stats alone."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the last epochs with the best."""
        losses = [row["validation_loss"] for row in rows_of(state)]
        if losses and not math.isfinite(losses[-1]):
            raise UserError(
                f"validation loss became {losses[-1]} in epoch {len(losses) - 1}; use a lower --lr."
            )
        if self.patience and losses and len(losses) - 1 - best_of(losses) >= self.patience:
            control.should_training_stop = True


class Masks(TrainerCallback):
    """Keeps pruned weights exactly zero through every optimizer step."""

    def __init__(self, masks: dict[str, Tensor]):
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the gradients too, so that no statistic of the optimizer sees a pruned weight."""
        parameters = dict(kwargs["model"].named_parameters())
        device = next(iter(parameters.values())).device
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}
        for name, mask in self.masks.items():
            parameters[name].register_hook(lambda grad, mask=mask: torch.where(mask, grad, 0.0))
        apply_masks(kwargs["model"], self.masks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo what the step did to pruned weights."""
        apply_masks(kwargs["model"], self.masks)


class Progress(TrainerCallback):
    """A progress bar on stderr, and one line per epoch in the log."""

    def __init__(self, label: str):
        self.label, self.bar = label, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where a resumed run stands."""
        shown = cli.shows_progress() and state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            disable=not shown,
            mininterval=1,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the epoch."""
        rows = rows_of(state)
        if rows and state.is_world_process_zero:
            row = rows[-1]
            trained = "" if row["training_loss"] is None else f"trained {row['training_loss']:.4f}, "
            log.info(
                "%s: epoch %d: %svalidation loss %.4f (%.0f s)",
                self.label,
                row["epoch"],
                trained,
                row["validation_loss"],
                row["training_seconds"] + row["validation_seconds"],
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch; after a resume with several processes Trainer does not."""

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Find our sampler below the wrappers and set it."""
        sampler = train_dataloader
        while sampler is not None and not isinstance(sampler, LengthSampler):
            inner = (getattr(sampler, name, None) for name in ("batch_sampler", "sampler"))
            sampler = next((s for s in inner if s is not None and s is not sampler), None)
        if sampler is not None:
            sampler.set_epoch(int((state.epoch or 0) + 1e-6))


def rows_of(state: Any) -> list[dict[str, Any]]:
    """Rows of the stats that a trainer's state holds."""
    return [entry["stats"] for entry in state.log_history if "stats" in entry]


def best_of(losses: list[float]) -> int:
    """Index of the first lowest value."""
    return min(range(len(losses)), key=losses.__getitem__)


def stats_csv(rows: list[dict[str, Any]]) -> str:
    """Render the stats; a value that does not exist (training loss of epoch 0) is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(STATS_HEADER)
    for row in rows:
        writer.writerow("" if row[key] is None else row[key] for key in STATS_HEADER)
    return text.getvalue()


def select_device(device: str) -> str:
    """Turn the `--device` option into cpu or cuda, and hide all GPUs but the chosen one.

    Raises:
        UserError: no such device.
    """
    name, _, index = device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N.")
    if name == "cuda" and index and not torch.cuda.is_initialized():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", index)
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError(f"--device {device}: no CUDA device is available; use --device cpu.")
    return "cuda" if has_gpu and name != "cpu" else "cpu"


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
        data: training set (with `lengths`), validation set, collator.
        functions: (step, measure), see `Trainer`.
        options: settings.
        identity: what else the result depends on (fingerprints of the inputs); a checkpoint is
            continued only if this and the options are the same.
        stats: CSV that is rewritten after every epoch.
        label: name of the progress bar and of the checkpoint folder.
        callbacks: further callbacks.
        summarise: turns what `measure` gave for all samples into {"loss": ...}; by default the
            sum of the values over the sum of the counts.
        keeps_best: go back to the best epoch at the end; off where the model does so itself.

    Raises:
        UserError: the loss is not finite, the batch does not divide among the processes.
    """
    training, validation, collate = data
    device = select_device(options.device)
    folder = _run_folder(options, identity, label)
    start = {name: t.detach().clone() for name, t in model.state_dict().items()}
    trainer = Trainer(
        step=functions[0],
        measure=functions[1],
        options=options,
        lengths=training.lengths,  # type: ignore[attr-defined]
        model=model,
        args=_arguments(options, folder, device, keeps_best),
        train_dataset=training,
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=summarise or mean_of_samples,
        callbacks=[Stats(stats), EarlyStop(options.early_stop), Masks(masks), SetEpoch(),
                   Progress(label), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
    latest = _latest_checkpoint(folder, trainer.args.world_size) if options.resume else None
    if latest is None and trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    resumed = _epoch_of(latest)
    if latest:
        log.info("%s: continuing after epoch %d (%s)", label, resumed, latest)
    _silence_tied_weights()
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    rows = rows_of(trainer.state)
    best = best_of([row["validation_loss"] for row in rows])
    if keeps_best and best == 0:
        log.warning("%s: no epoch was better than the start; the start is kept.", label)
        model.load_state_dict(start)
    apply_masks(model, masks)
    model.to("cpu").eval()
    return Outcome(rows, best, resumed, trainer.is_world_process_zero(), folder)


def _arguments(options: Options, folder: Path, device: str, keeps_best: bool) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % world:
        raise UserError(f"--batch-size {options.batch_size} does not divide among {world} processes.")
    if options.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(options.checkpoint_dir / "runs"))
    try:
        args = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size // world,
            per_device_eval_batch_size=max(1, options.batch_size // world),
            learning_rate=options.lr,
            max_grad_norm=options.clip,
            seed=options.seed,
            bf16=options.dtype == "bfloat16",
            fp16=options.dtype == "float16",
            use_cpu=device == "cpu",
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="epoch",
            logging_strategy="epoch",
            logging_nan_inf_filter=False,
            save_total_limit=1,
            load_best_model_at_end=keeps_best,
            metric_for_best_model="loss",
            greater_is_better=False,
            report_to=options.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=device == "cuda",
            ddp_find_unused_parameters=not keeps_best,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"these training options do not work here: {error}") from error
    args._n_gpu = min(1, args.n_gpu)  # several GPUs are used through torchrun, never DataParallel
    return args


def mean_of_samples(prediction: Any) -> dict[str, float]:
    """Mean of all values, weighted by their counts."""
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


def _run_folder(options: Options, identity: dict[str, Any], label: str) -> Path:
    """Folder of this very run: another input or option has another folder."""
    described = {**options.identity(), **identity, "torch": torch.__version__}
    folder = options.checkpoint_dir / f"{label}-{files.digest_of(described)[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _latest_checkpoint(folder: Path, world_size: int) -> Path | None:
    """Newest checkpoint that was written to its end; Trainer would take a half-written one."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for path in reversed(found):
        if _is_complete(path, world_size):
            return path
        log.warning("%s was cut off while being written and is left out.", path)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _is_complete(path: Path, world_size: int) -> bool:
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    if not all((path / name).is_file() for name in (*COMPLETE, *names)):
        return False
    try:
        state = json.loads((path / "trainer_state.json").read_text())
    except ValueError:
        return False
    return state.get("global_step") == int(path.name.rpartition("-")[2])


def _epoch_of(path: Path | None) -> int | None:
    if path is None:
        return None
    return round(json.loads((path / "trainer_state.json").read_text())["epoch"])


def _silence_tied_weights() -> None:
    """Hide Trainer's remark that tied weights are not stored twice."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
