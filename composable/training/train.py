"""The one place that sets up transformers.Trainer: loss, optimizer, checkpoints, resume."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor

from composable import files, tasks
from composable.devices import select_device, select_dtype
from composable.errors import UserError
from composable.linalg import kernels
from composable.models.checkpoint import Checkpoint, unique_tensors
from composable.models.surgery import apply_masks
from composable.tasks.samples import identity_of
from composable.training.callbacks import (
    EarlyStop,
    FindBest,
    LengthSampler,
    Masks,
    Progress,
    SetEpoch,
    Stats,
    best_of,
    rounded_epoch,
    rows_of,
)

log = logging.getLogger("composable")
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
        dtype: of autocast, or auto, see `select_dtype`; weights stay float32.
        resume: continue from a checkpoint of the same run.
        checkpoint_dir: folder under which the run keeps its checkpoints.
        report_to: none, tensorboard or wandb.
        warmup: share of all steps that warm up.
        clip: gradient norm above which gradients are scaled down; 0 never.
        smoothing: label smoothing.
        final_lr: share of `lr` that the last step still has.
        workers: processes that prepare batches.
        compile: whether torch compiles the model.
        steps: optimizer steps after which training ends, and the schedule with it; 0: `epochs` say.
        optimizer: adafactor, with steps relative to the size of each matrix; or adamw.
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
    workers: int = 0
    compile: bool = False
    steps: int = 0
    optimizer: str = "adafactor"

    def resolved(self) -> "Options":
        """Name the device and the dtype that auto stands for."""
        device = select_device(self.device)
        return replace(self, device=device, dtype=select_dtype(self.dtype, device))

    def identity(self) -> dict[str, Any]:
        """Return those options on which the result depends."""
        free = ("resume", "checkpoint_dir", "report_to", "workers")
        return {key: value for key, value in asdict(self).items() if key not in free}


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
    folder: Path

    def clean_up(self) -> None:
        """Remove the checkpoints of this run."""
        if self.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

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


class Trainer(transformers.Trainer):
    """transformers' Trainer with our sampler, optimizer, loss and validation.

    Args:
        step: (model, batch) -> sums of the losses of a batch and the numbers of things summed;
            the loss is the sum of the means.
        measure: (model, batch) -> values and counts of every sample, each (batch, ...).
        options: settings.
        sizes: lengths of every training sample, see `LengthSampler`.
    """

    def __init__(self, *, step: Any, measure: Any, options: Options, sizes: Any, **kwargs: Any):
        self._step, self._measure, self._options, self._sizes = step, measure, options, sizes
        super().__init__(**kwargs)
        # T5 ignores num_items_in_batch and Trainer counts labels from the second on: we count
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load our batches as they are; accelerate would fill up the last with other samples."""
        assert self.train_dataset is not None
        size, seed = self._options.batch_size, self._options.seed
        process, world = self.args.process_index, self.args.world_size
        return DataLoader(
            self.train_dataset,
            batch_sampler=LengthSampler(self._sizes, size, seed, process, world),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            num_workers=self._options.workers,
            persistent_workers=self._options.workers > 0,
        )

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Compute in bfloat16; accelerate would copy what the model returns to float32."""
        if self._options.dtype == "bfloat16":
            return kernels.autocast(self._options.device, torch.bfloat16)
        return super().autocast_smart_context_manager(cache_enabled)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make Adafactor with relative update sizes, or AdamW, over all that has a gradient."""
        if self.optimizer is None:
            assert self.model is not None
            learned = [p for p in self.model.parameters() if p.requires_grad]
            lr = self._options.lr
            if self._options.optimizer == "adamw":
                self.optimizer = torch.optim.AdamW(learned, lr, weight_decay=0.0)
            else:
                self.optimizer = Adafactor(learned, lr, scale_parameter=True, relative_step=False)
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

            target: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the batch of all processes, so that two processes equal one."""
        total, count = self._step(model, inputs)
        world = self.accelerator.num_processes
        if world > 1:  # the gradients will be averaged over the processes
            count = self.accelerator.reduce(count.detach().clone(), "sum")
            total = total * world
        return (total / count.clamp(min=1)).sum()

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Measure a validation batch sample by sample; the mean is taken over all of them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            values, counts = self._measure(model, inputs)
        return None, values.double(), counts.double()

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: transformers walks through all modules for it, in every step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the weights by their own names; save_pretrained takes old ones for ViTs."""
        if self.args.should_save:
            assert self.model is not None
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in unique_tensors(self.model.state_dict())
            }
            save_file(tensors, folder / COMPLETE[0], metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Let nothing be missing but the other names of tied weights."""
        assert self.model is not None
        state = self.model.state_dict()
        found = {t.data_ptr() for name, t in state.items() if name not in load_result.missing_keys}
        lost = [n for n in load_result.missing_keys if state[n].data_ptr() not in found]
        lost = [name for name in lost if state[name].numel()] + list(load_result.unexpected_keys)
        if lost:
            raise UserError(
                f"{self.args.output_dir}: a checkpoint does not fit the model ({lost[0]}); delete "
                "the folder, or start without resume."
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk can be all three
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.args.output_dir}: a checkpoint could not be written ({reason}); check the "
                "space left and the permissions, or choose another checkpoint_dir."
            ) from error


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
    training, validation, collate = data
    options = options.resolved()
    samples = {"data": [identity_of(training), identity_of(validation)]}
    folder = _run_folder(options, identity | samples, label)
    start = {name: t.clone() for name, t in model.state_dict().items()} if keeps_best else {}
    for parameter in model.parameters():
        if not parameter.numel():  # of an attention without heads; never has a gradient
            parameter.requires_grad_(False)
    try:
        trainer = Trainer(
            step=functions[0],
            measure=functions[1],
            options=options,
            sizes=training.sizes,  # type: ignore[attr-defined]
            model=model,
            args=_arguments(options, folder, keeps_best),
            train_dataset=training,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=summarise or mean_of_samples,
            callbacks=[Stats(stats), EarlyStop(options.early_stop), Masks(masks), SetEpoch(),
                       FindBest(), Progress(label), *callbacks],
        )  # fmt: skip
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"these training options do not work here: {error}") from error
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
    latest = _latest_checkpoint(folder, trainer.args.world_size) if options.resume else None
    if latest is None and trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    resumed = None
    if latest:
        state = _state_of(latest)
        resumed = rounded_epoch(state["epoch"])
        log.info("%s: continuing after epoch %g (%s)", label, resumed, latest)
        control = state["stateful_callbacks"]["TrainerControl"]["args"]
        if control["should_training_stop"]:  # Trainer would forget it and take one more step
            trainer.args.num_train_epochs, trainer.args.max_steps = int(resumed), -1
    for name in ("transformers.trainer", "transformers.trainer_utils"):
        # its remarks that tied weights are not stored twice, and on the age of checkpoints
        logging.getLogger(name).setLevel(logging.ERROR)
    with kernels.for_cpu(model, options.device, max(map(max, training.sizes)), trains=True):  # type: ignore[attr-defined]
        if options.compile:
            model.compile(dynamic=True)
        trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        model._compiled_call_impl = None
    rows = rows_of(trainer.state)
    best = best_of([row["validation_loss"] for row in rows])
    if keeps_best and best == 0:
        log.warning("%s: no epoch was better than the start; the start is kept.", label)
        model.load_state_dict(start)
    model.to("cpu").eval()
    apply_masks(model, masks)
    return Outcome(rows, rows[best]["epoch"], resumed, trainer.is_world_process_zero(), folder)


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
        save_total_limit=1,
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


def _run_folder(options: Options, identity: dict[str, Any], label: str) -> Path:
    """Folder of this very run: another input or option has another folder."""
    described = {**options.identity(), **identity, "torch": torch.__version__}
    folder = options.checkpoint_dir / f"{label}-{files.digest_of(described)[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _latest_checkpoint(folder: Path, world_size: int) -> Path | None:
    """Newest checkpoint that was written to its end; Trainer would take a half-written one."""
    found = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.rpartition("-")[2]))
    for path in reversed(found):
        if _is_complete(path, world_size):
            return path
        log.warning("%s was cut off while being written and is left out.", path)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _is_complete(path: Path, world_size: int) -> bool:
    suffixes = [""] if world_size == 1 else [f"_{i}" for i in range(world_size)]
    names = [f"rng_state{suffix}.pth" for suffix in suffixes]
    if not all((path / name).is_file() for name in (*COMPLETE, *names)):
        return False
    try:
        state = _state_of(path)
    except (OSError, ValueError):  # with several processes another one may be removing it
        return False
    if state.get("global_step") != int(path.name.rpartition("-")[2]):
        return False
    best = state.get("best_global_step")
    return not best or (path.with_name(f"checkpoint-{best}") / "model.safetensors").is_file()


def _state_of(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text())
    return state
