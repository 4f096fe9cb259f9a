"""transformers.Trainer with our sampler, loss and validation, and checkpoints that are sealed."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.optimization import Adafactor

from composable import runs
from composable.errors import UserError
from composable.linalg import kernels
from composable.models.checkpoint import unique_tensors
from composable.training import checkpoints
from composable.training.callbacks import OURS, LengthSampler, Stats
from composable.training.options import Options

PAUSE = 600.0  # seconds between checkpoints within an epoch where save_steps says nothing
SHARE = 20  # or so many times the seconds that the last one took, if that is more


class Trainer(transformers.Trainer):
    """transformers' Trainer with our sampler, optimizer, loss and validation.

    Args:
        step: (model, batch) -> sums of the losses of a batch and the numbers of things summed;
            the loss is the sum of the means.
        measure: (model, batch) -> values and counts of every sample, each (batch, ...).
        options: settings.
        sizes: lengths of every training sample, see `LengthSampler`.
        stats: the callback that measures the seconds of an epoch.
    """

    def __init__(
        self, *, step: Any, measure: Any, options: Options, sizes: Any, stats: Stats, **kwargs: Any
    ):
        self._step, self._measure, self.options, self._sizes = step, measure, options, sizes
        self._stats = stats
        self._resumed: Path | None = None
        self._unfinished: dict[str, Any] = {}
        self._saved_at, self._pause = time.monotonic(), PAUSE
        self._validation_is_due = False
        super().__init__(**kwargs)
        # T5 ignores num_items_in_batch and Trainer counts labels from the second on: we count
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load our batches as they are; accelerate would fill up the last with other samples."""
        assert self.train_dataset is not None
        size, seed = self.options.batch_size, self.options.seed
        process, world = self.args.process_index, self.args.world_size
        return DataLoader(
            self.train_dataset,
            batch_sampler=LengthSampler(self._sizes, size, seed, process, world),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            num_workers=self.options.workers,
            persistent_workers=self.options.workers > 0,
            generator=torch.Generator(),  # it draws the more often the fewer workers there are
        )

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Compute in bfloat16; accelerate would copy what the model returns to float32."""
        if self.options.dtype == "bfloat16":
            return kernels.autocast(self.options.device, torch.bfloat16)
        return super().autocast_smart_context_manager(cache_enabled)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make Adafactor with relative update sizes, or AdamW, over all that has a gradient."""
        if self.optimizer is None:
            assert self.model is not None
            learned = [p for p in self.model.parameters() if p.requires_grad]
            lr = self.options.lr
            if self.options.optimizer == "adamw":
                self.optimizer = torch.optim.AdamW(learned, lr, weight_decay=0.0)
            else:
                self.optimizer = Adafactor(learned, lr, scale_parameter=True, relative_step=False)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule: linear warm-up, then linear decay."""
        if self.lr_scheduler is None:
            warm = max(1, int(num_training_steps * self.options.warmup))
            final = self.options.final_lr

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
            save_file(tensors, folder / checkpoints.MODEL, metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Let nothing be missing but the other names of tied weights."""
        assert self.model is not None
        state = self.model.state_dict()
        found = {t.data_ptr() for name, t in state.items() if name not in load_result.missing_keys}
        lost = [n for n in load_result.missing_keys if state[n].data_ptr() not in found]
        lost = [name for name in lost if state[name].numel()] + list(load_result.unexpected_keys)
        if lost:
            raise checkpoints.does_not_fit(Path(str(self.args.output_dir)), lost[0])

    # Checkpoints. Each is written before the validation that may follow it, so that a validation
    # which is interrupted is repeated, and nothing else. What `state` does not hold is kept beside
    # it: whether a validation was due, and the sums of an epoch that was not over.

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that `checkpoints.newest` has found whole."""
        self._resumed = checkpoint
        with self._reading(checkpoints.STATE):
            kept = checkpoints.state_of(checkpoint)["stateful_callbacks"][OURS]
            self._unfinished = {
                "validation_is_due": bool(kept["validation_is_due"]),
                "loss": float(kept["losses"][self.args.process_index]),
                "logged_step": int(kept["logged_step"]),
            }
        self._validation_is_due = self._unfinished["validation_is_due"]
        self.args.eval_on_start = self._validation_is_due
        self.train(resume_from_checkpoint=str(checkpoint))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._validation_is_due, self.control.should_evaluate = self.control.should_evaluate, False
        self.control.should_save |= self._is_time_to_save()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._validation_is_due:
            self.control.should_evaluate = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _is_time_to_save(self) -> bool:
        """Whether a checkpoint is due within an epoch."""
        step, every = self.state.global_step, self.options.save_steps
        if step % -(-len(self._sizes) // self.options.batch_size) == 0:
            return False  # the end of an epoch has its own, which is written after this
        if step >= self.state.max_steps:
            return False
        if every is not None:
            return every > 0 and step % every == 0
        # the clocks of several processes would not agree
        return self.args.world_size == 1 and time.monotonic() - self._saved_at > self._pause

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started, is_main = time.monotonic(), self.is_world_process_zero()
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            if is_main:
                runs.remove(folder)
            kept: Any = self.state.stateful_callbacks
            kept[OURS] = {
                "validation_is_due": self._validation_is_due,
                "losses": self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist(),
                "logged_step": self._globalstep_last_logged,
                "seconds": self._stats.elapsed(),
            }
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # until all have written their random states
            if is_main:
                runs.seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk can be all three
            if is_main:
                runs.remove(folder)  # makes room; the one before it is whole
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.args.output_dir}: a checkpoint could not be written ({reason}); check the "
                "space left and the permissions, or choose another checkpoint_dir."
            ) from error
        if is_main:
            checkpoints.rotate(folder.parent, self.state.best_global_step)
        self._saved_at = time.monotonic()
        self._pause = max(PAUSE, SHARE * (self._saved_at - started))

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best:  # its checkpoint is already there
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        return is_best

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        with self._reading(checkpoints.STATE):
            return super()._init_training_state(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._reading(checkpoints.MODEL):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._reading(*checkpoints.STEPS):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with self._reading("scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self._unfinished.get("validation_is_due"):  # else it is loaded, see `_evaluate`
            with self._reading(*checkpoints.random_states(self.args.world_size)):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        checkpoints.check_best(best)
        with checkpoints.reading(best, checkpoints.MODEL):
            super()._load_best_model()

    def _evaluate(self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False) -> Any:
        is_late = skip_scheduler and self._resumed is not None
        if is_late:  # it was due after the checkpoint, with the random states of then
            with self._reading(*checkpoints.random_states(self.args.world_size)):
                super()._load_rng_state(str(self._resumed))
        metrics = super()._evaluate(trial, ignore_keys, skip_scheduler=skip_scheduler)
        if is_late:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Go through an epoch, or the rest of it; through none after a resume that was the end."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._unfinished:
            self._tr_loss += self._unfinished["loss"]
            self._globalstep_last_logged = self._unfinished["logged_step"]
        torch.empty((), dtype=torch.int64).random_()  # once an epoch, as a loader without workers
        super()._run_epoch(*args, **kwargs)
        self._unfinished = {}

    def _reading(self, *names: str) -> AbstractContextManager[None]:
        """See `checkpoints.reading`; nothing where no checkpoint is read."""
        return checkpoints.reading(self._resumed, *names) if self._resumed else nullcontext()
