"""What transformers.Trainer is given beside the model: order of the data, callbacks, the stats."""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback

from composable import files
from composable.errors import UserError
from composable.formats.stats_file import stats_csv
from composable.models.surgery import apply_masks
from composable.progress import Stage

log = logging.getLogger("composable")
#: Batches whose sentences are sorted together: more pad less, but meet the same neighbours again.
POOL = 100
#: Where a trainer's state keeps what is ours.
OURS = "composable"


class LengthSampler(Sampler[list[int]]):
    """Batches in random order, the sentences of a batch about equally long on both sides.

    The order is a function of (seed, epoch) alone, so that a run continues exactly and all
    processes agree; transformers' group_by_length draws from the global generator instead.

    Args:
        sizes: lengths of every sample on both sides, such as tokens of the target and the source.
        batch: samples of a batch, over all processes.
        seed: of the order.
        rank, world: which process of how many; each gets an equal share of every batch. Where the
            last batch has no equal shares every process takes all of it: the mean is the same.
    """

    def __init__(
        self, sizes: list[tuple[int, int]], batch: int, seed: int, rank: int = 0, world: int = 1
    ):
        self.sizes, self.batch, self.seed, self.epoch = sizes, batch, seed, 0
        self.rank, self.world = rank, world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.sizes), generator=generator).tolist()
        pool = POOL * self.batch
        ordered = [
            index
            for start in range(0, len(order), pool)
            for index in self._by_size(order[start : start + pool])
        ]
        batches = [ordered[i : i + self.batch] for i in range(0, len(ordered), self.batch)]
        full = [batch for batch in batches if len(batch) == self.batch]
        rest = [batch for batch in batches if len(batch) < self.batch]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        for batch in shuffled + rest:
            yield batch if len(batch) % self.world else batch[self.rank :: self.world]

    def _by_size(self, pool: list[int]) -> list[int]:
        """Sort by one side, cut into groups, sort those by the other: so both sides pad little."""
        first = sorted(pool, key=lambda i: -self.sizes[i][0])
        group = max(1, round(0.7 * math.sqrt(len(pool) / self.batch))) * self.batch
        return [
            index
            for start in range(0, len(first), group)
            for index in sorted(first[start : start + group], key=lambda i: -self.sizes[i][1])
        ]


class Stats(TrainerCallback):
    """Keeps one row per epoch in the trainer's state (so a resumed run has all), and the CSV."""

    def __init__(self, path: Path | None):
        self.path, self.seconds, self.started = path, 0.0, math.nan

    def elapsed(self) -> float:
        """Seconds of training in the epoch so far, also before an interruption."""
        now = time.perf_counter() - self.started
        return self.seconds + (0.0 if math.isnan(now) else now)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume: take over the seconds of an epoch that was not over."""
        self.seconds = state.stateful_callbacks.get(OURS, {}).get("seconds", 0.0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock before validation."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds, self.started = self.elapsed(), math.nan

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Add the row of this epoch."""
        assert metrics is not None
        epoch = rounded_epoch(state.epoch or 0)
        losses: list[dict[str, Any]] = [entry for entry in state.log_history if "loss" in entry]
        logged = losses[-1] if losses else {}
        loss = logged.get("loss", math.nan)
        row = {
            "epoch": epoch,
            "training_loss": loss if epoch and math.isfinite(loss) else None,
            "validation_loss": metrics["eval_loss"],
            "training_seconds": round(self.seconds, 3),
            "validation_seconds": round(metrics.get("eval_runtime", 0.0), 3),
            "learning_rate": logged.get("learning_rate", 0.0),
        }
        self.seconds = 0.0
        state.log_history.append({"stats": row})
        if self.path and state.is_world_process_zero:
            files.write_text(self.path, stats_csv(rows_of(state)))


class EarlyStop(TrainerCallback):
    """Stops after `patience` epochs without a lower validation loss, seen from the stats alone."""

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the last epochs with the best."""
        rows = rows_of(state)
        losses = [row["validation_loss"] for row in rows]
        if losses and not math.isfinite(losses[-1]):
            raise UserError(
                f"validation loss became {losses[-1]} in epoch {rows[-1]['epoch']}; use a lower lr."
            )
        if self.patience and losses and len(losses) - 1 - best_of(losses) >= self.patience:
            control.should_training_stop = True


class Masks(TrainerCallback):
    """Keeps pruned weights exactly zero.

    Where the gradient is zero Adafactor takes no step: it has neither momentum nor weight decay. So
    the gradients are masked, before their norm is taken and any statistic sees them; the weights
    once an epoch, to be safe.
    """

    def __init__(self, masks: dict[str, Tensor]):
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the weights, and the gradients from now on."""
        parameters = dict(kwargs["model"].named_parameters())
        device = next(iter(parameters.values())).device
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}
        for name, mask in self.masks.items():
            if parameters[name].requires_grad:
                # a product: where takes 6 times as long on a CPU
                parameters[name].register_hook(lambda grad, mask=mask: grad * mask)
        apply_masks(kwargs["model"], self.masks)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask the weights before they are measured and written."""
        apply_masks(kwargs["model"], self.masks)


class Progress(TrainerCallback):
    """Shows how far the training is, and each validation; logs one line per epoch."""

    def __init__(self, label: str):
        self.label = label
        self.training: Stage | None = None
        self.validation: Stage | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin where a resumed run stands."""
        at, steps = state.global_step, state.max_steps
        self.training = Stage(None, self.label, steps, unit="steps", initial=at)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        assert self.training is not None
        self.training.update(state.global_step - self.training.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Advance in a validation; the first one tells how long the others will take."""
        if self.validation is None:
            batches, is_part = len(eval_dataloader), bool(rows_of(state))
            self.validation = Stage(
                None, f"{self.label}, validation", batches, unit="batches", is_part=is_part
            )
        self.validation.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the validation, and log the epoch."""
        if self.validation is not None:
            self.validation.close()
            self.validation = None
        rows = rows_of(state)
        if rows and state.is_world_process_zero:
            row, loss = rows[-1], rows[-1]["training_loss"]
            said = f"validation loss {row['validation_loss']:.4f}"
            said = said if loss is None else f"trained {loss:.4f}, {said}"
            seconds = row["training_seconds"] + row["validation_seconds"]
            log.info("%s: epoch %g: %s (%.0f s)", self.label, row["epoch"], said, seconds)

    def close(self) -> None:
        """End, also where the training was broken off: what is printed next has its own line."""
        for stage in (self.validation, self.training):
            if stage is not None:
                stage.close()


class FindBest(TrainerCallback):
    """Finds the best checkpoint beside the last one, also where the folder was moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the path; Trainer would forget a path that is gone, and keep the last weights."""
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best)


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch, for Trainer does not know it."""

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Set it."""
        assert train_dataloader is not None
        train_dataloader.batch_sampler.set_epoch(int((state.epoch or 0) + 1e-6))


def rounded_epoch(epoch: float) -> float:
    """Round to 4 digits; a whole epoch is an int, as the stats show it."""
    rounded = round(epoch, 4)
    return int(rounded) if rounded == int(rounded) else rounded


def rows_of(state: Any) -> list[dict[str, Any]]:
    """Rows of the stats that a trainer's state holds."""
    return [entry["stats"] for entry in state.log_history if "stats" in entry]


def best_of(losses: list[float]) -> int:
    """Index of the first lowest value."""
    return min(range(len(losses)), key=losses.__getitem__)
