"""A short training of modules that lost units, on recorded calls of the dense ones."""

import logging
import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from composable import files
from composable.calibration.recorded_calls import (
    Call,
    RecordedModule,
    mean_error,
    output_moments,
    output_values,
)
from composable.formats.bundle import Variant
from composable.linalg import kernels
from composable.linalg.grams import Regression
from composable.models.checkpoint import Checkpoint
from composable.variants.students import Student

log = logging.getLogger("composable")
Key = TypeVar("Key", bound=Hashable)
BETAS = (0.8, 0.99)  # a few hundred steps are too short for Adam's usual long memory
WARMUP = 0.125  # share of all steps
SMALLEST = 1e-3  # mean size of weights below which steps do not get smaller; as Adafactor's


@dataclass(frozen=True)
class Settings:
    """How modules that lost units are trained.

    Attributes:
        epochs: passes over the recorded training texts.
        batch_size: samples per step; of an ffn, as many tokens as so many samples have on
            average. Many small steps did better than few large ones.
        lr: peak size of a step relative to the root mean square of the dense weight, as
            Adafactor's: q, k, v and o are of very different size. After linear warm-up it
            decays linearly.
        patience: epochs without a lower held-out error than in an epoch before, after which a
            variant stops; 0 never stops. The start does not count: while steps are large, the
            error may lie above that of a refit, and fall below it when they are small.
        seed: of the order of the batches.
        device: where all runs.
        dtype: of autocast while ffns train, float32 or bfloat16; errors are measured in float32.
        budget: bytes that recorded calls may take; modules that do not fit wait for another
            pass of the dense model.
    """

    epochs: int = 4
    batch_size: int = 16
    lr: float = 0.02
    patience: int = 2
    seed: int = 42
    device: str = "cpu"
    dtype: str = "float32"
    budget: int = 4 << 30


@dataclass(frozen=True)
class Trained:
    """What became of a variant.

    Attributes:
        tensors: as in the variant it started from, at the lowest held-out error.
        history: mean squared error on the held-out texts, per token and feature, of the start and
            after every epoch.
        training_loss: mean squared error in the epoch with the lowest held-out error, while the
            weights moved, unless none was better than the start.
        moments: of the inputs of the last linear, as trained, with the dense outputs as targets,
            on the training texts; where they were asked for.
    """

    tensors: dict[str, Tensor]
    history: list[float]
    training_loss: float
    moments: Regression | None = None

    @property
    def error(self) -> float:
        """The lowest held-out error; not a number if the start has none."""
        return self.history[best_epoch(self.history)]

    @property
    def is_better(self) -> bool:
        """Whether some epoch was better than the start."""
        return best_epoch(self.history) > 0


def best_epoch(history: Sequence[float]) -> int:
    """Return the epoch with the lowest error; 0 is the start."""
    return min(range(len(history)), key=lambda i: (math.isnan(x := history[i]), x))


def train(
    dense: Checkpoint,
    starts: Mapping[Key, Variant],
    recorded: RecordedModule,
    settings: Settings,
    wants_moments: Collection[Key] = (),
) -> dict[Key, Trained]:
    """Train all linears of variants of a module to give the dense output from the dense input.

    A loop of its own, not `train.run`: the dense model runs once for all epochs, and then there
    are dozens of tiny models that share nothing, each with an end of its own. All variants of the
    module train side by side; what comes out for one depends on no other.

    Args:
        dense: the dense model, within `recorded_modules`.
        starts: any key -> variant of the module; what its masks leave out stays 0.
        recorded: the module and its calls.
        settings: how.
        wants_moments: keys of those that get `moments`.

    Returns:
        The same keys -> what became of the variants.
    """
    dtype = getattr(torch, settings.dtype) if recorded.module.kind == "ffn" else torch.float32
    running = {}
    for key, start in starts.items():
        student = Student(start, recorded.module, dense.family, dense.model).to(settings.device)
        student.eval().mask_gradients()
        running[key] = _Training(student, dtype)
    holder = dense.model.get_submodule(recorded.module.holder)
    steps = settings.epochs * len(recorded.train)
    optimizer, schedule = _optimizer(running.values(), holder, steps, settings.lr)
    for training in running.values():
        training.note(mean_error(training.student, recorded.held_out), settings.patience)
    for epoch in range(settings.epochs):
        live = [training for training in running.values() if not training.is_stopped]
        if not live:
            break
        totals = [torch.zeros((), dtype=torch.float64, device=settings.device) for _ in live]
        for index in _order(len(recorded.train), (settings.seed, recorded.module.name, epoch)):
            for training, total in zip(live, totals, strict=True):
                total += training.add_gradient(recorded.train[index])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        for training, total in zip(live, totals, strict=True):
            training.losses.append(float(total) / output_values(recorded.train))
            training.note(mean_error(training.student, recorded.held_out), settings.patience)
            if not math.isfinite(training.history[-1]):
                log.warning("%s: a variant diverged; the best epoch is kept.", recorded.module.name)
    return {k: training.result(recorded, k in wants_moments) for k, training in running.items()}


@dataclass
class _Training:
    """A variant in training.

    Attributes:
        student: its weights, present and best.
        dtype: of autocast while it trains.
        history: mean squared error on the held-out texts, of the start and after every epoch.
        losses: mean squared error on the training texts, while the weights moved, of every epoch.
        is_stopped: it trains no more.
    """

    student: Student
    dtype: torch.dtype = torch.float32
    history: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    is_stopped: bool = False

    def add_gradient(self, call: Call) -> Tensor:
        """Add the gradient of the mean squared error to the weights; return the squared error."""
        with kernels.autocast(call.target.device, self.dtype):
            output: Tensor = self.student(*call.args, **call.kwargs)
        difference = call.difference(output.detach())
        square = difference.square().sum()
        # what autograd would make of the loss, in one operation instead of six
        gradient = difference.mul_(2 / (call.valid.tokens * difference.shape[-1]))
        output.backward(gradient.to(output.dtype))
        return square

    def note(self, error: float, patience: int) -> None:
        """Note the held-out error: keep the best weights, stop where there is no more to gain."""
        if not self.history or error < min(self.history):
            self.student.keep()
        self.history.append(error)
        trained = self.history[1:]
        epochs_since = len(trained) - 1 - best_epoch(trained) if trained else 0
        self.is_stopped = not math.isfinite(error) or 0 < patience <= epochs_since

    def result(self, recorded: RecordedModule, wants_moments: bool) -> Trained:
        """Return the best weights."""
        best, student, calls = best_epoch(self.history), self.student, recorded.train
        loss = self.losses[best - 1] if best else mean_error(student.best_output, calls)
        moments = output_moments(student.best, recorded.module, calls) if wants_moments else None
        return Trained(student.tensors(), self.history, loss, moments)


def _optimizer(
    running: Iterable[_Training], holder: nn.Module, steps: int, lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make one AdamW for all variants; it works weight by weight, so they stay apart."""
    by_name: dict[str, list[nn.Parameter]] = {}
    for training in running:
        for name in training.student.names:
            by_name.setdefault(name, []).append(training.student.part.get_parameter(name))
    learned = [
        {"params": weights, "lr": lr * max(_size(holder.get_parameter(name)), SMALLEST)}
        for name, weights in by_name.items()
    ]
    # tiny losses have tiny gradients: eps must not be felt
    optimizer = torch.optim.AdamW(learned, betas=BETAS, eps=1e-12, weight_decay=0.0, fused=True)
    total = max(1, steps)
    warm = max(1, int(total * WARMUP))

    def factor(step: int) -> float:
        return min((step + 1) / warm, (total - step) / max(1, total - warm))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _size(weight: Tensor) -> float:
    """Root mean square."""
    return float(weight.detach().square().mean().sqrt()) if weight.numel() else 0.0


def _order(count: int, seed: Any) -> list[int]:
    """Shuffle 0 .. count - 1, as a function of the seed."""
    generator = torch.Generator().manual_seed(int(files.digest_of(seed)[:12], 16))
    return torch.randperm(count, generator=generator).tolist()
