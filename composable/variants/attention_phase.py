"""A short training of head-pruned attentions on recorded calls of the dense model's."""

import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from composable import files, progress
from composable.calibration.batching import Texts
from composable.calibration.recorded_calls import (
    Call,
    Recorder,
    groups,
    mean_error,
    output_moments,
    output_values,
)
from composable.calibration.second_moments import eval_mode
from composable.errors import UserError
from composable.families import Module
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
DTYPES = ("float32", "bfloat16")
HELD_OUT_BATCH = 64  # samples; of no influence on the result


@dataclass(frozen=True)
class Settings:
    """How attentions are trained.

    Attributes:
        epochs: passes over the recorded training texts.
        batch_size: samples per step; many small steps did better than few large ones.
        lr: peak size of a step relative to the root mean square of the dense weight, as
            Adafactor's: q, k, v and o are of very different size. After linear warm-up it
            decays linearly.
        patience: epochs without a lower held-out error before a variant stops; 0 never stops.
        seed: of the order of the batches.
        device: where all runs.
        dtype: of recorded states: float32, or bfloat16 for half the memory. Training itself is
            in float32.
        budget: bytes that recorded calls may take; attentions that do not fit wait for another
            pass of the dense model.
    """

    epochs: int = 4
    batch_size: int = 16
    lr: float = 0.08
    patience: int = 2
    seed: int = 42
    device: str = "cpu"
    dtype: str = "float32"
    budget: int = 4 << 30


@dataclass
class Trained:
    """What became of a variant.

    Attributes:
        tensors: as in the variant it started from, at the lowest held-out error.
        error_before: squared error over squared dense output on the held-out texts.
        error_after: the same, at the lowest.
        training_loss: mean squared error in the epoch with the lowest held-out error, per token
            and feature; while the weights moved, unless none was better than the start.
        history: mean squared error on the held-out texts, of the start and after every epoch.
        seconds: its part of the time; the recording counts in equal parts.
        moments: of the inputs of `o`, as trained, with the dense outputs as targets, on the
            training and on the held-out texts; where they were asked for.
    """

    tensors: dict[str, Tensor]
    error_before: float
    error_after: float
    training_loss: float
    history: list[float]
    seconds: float = 0.0
    moments: tuple[Regression, Regression] | None = None


def run(
    dense: Checkpoint,
    starts: Mapping[Key, Variant],
    corpora: tuple[Any, Any],
    settings: Settings,
    wants_moments: Collection[Key] = (),
    on_done: Callable[[Key, Trained], None] | None = None,
    skip: Collection[Key] = (),
) -> dict[Key, Trained]:
    """Train q, k, v and o of attention variants to give the dense output from the dense input.

    A loop of its own, not `train.run`: the dense model runs once for all epochs, and then there
    are dozens of tiny models that share nothing, each with an end of its own. What comes out for
    a variant depends on no other variant and no grouping.

    Args:
        dense: the dense model; left as it is.
        starts: any key -> variant of an attention; what its masks leave out stays 0.
        corpora: training and held-out texts of the model's task.
        settings: how.
        wants_moments: keys of those that get `moments`.
        on_done: called for every variant as soon as it is trained.
        skip: keys to leave out, because they were trained before.

    Returns:
        The variants that were trained, in the order of the modules.

    Raises:
        UserError: states cannot be recorded in that type.
    """
    if settings.dtype not in DTYPES:
        raise UserError(
            f"--dtype {settings.dtype}: attentions are trained on states that were recorded in "
            f"{' or '.join(DTYPES)}; use one of them."
        )
    wanted: dict[str, dict[Key, Variant]] = {}
    for key, start in starts.items():
        if key not in skip:
            wanted.setdefault(start.module, {})[key] = start
    modules = [m for m in dense.family.modules(dense.model) if m.name in wanted]
    results: dict[Key, Trained] = {}
    if not modules:
        return results
    sizes = (settings.batch_size, HELD_OUT_BATCH)
    parts = [Texts(dense, corpus) for corpus in corpora]
    texts = [part.batches(settings.device, rows) for part, rows in zip(parts, sizes, strict=True)]
    with _prepared(dense, settings.device, texts):
        lessons = _Lessons(dense, modules, texts, settings)
        bar = tqdm(modules, "attend", unit="module", disable=not progress.shows_progress())
        for module in bar:
            done = _teach(dense, module, wanted[module.name], lessons, settings, wants_moments)
            results |= done
            if on_done is not None:
                for key, trained in done.items():
                    on_done(key, trained)
    return results


def _teach(
    dense: Checkpoint,
    module: Module,
    starts: Mapping[Key, Variant],
    lessons: "_Lessons",
    settings: Settings,
    wants_moments: Collection[Key],
) -> dict[Key, Trained]:
    """Train the variants of one attention; its recorded calls are free again afterwards."""
    calls = lessons.take(module.name)
    started = time.perf_counter() - lessons.seconds
    pupils = _train(dense, module, starts, calls, settings)
    norm = max(mean_error(None, calls[1]), 1e-30)
    results = {
        key: _result(pupil, module, calls, norm, key in wants_moments)
        for key, pupil in pupils.items()
    }
    for trained in results.values():
        trained.seconds = (time.perf_counter() - started) / len(results)
    return results


@contextmanager
def _prepared(
    dense: Checkpoint, device: str, texts: list[list[dict[str, Tensor]]]
) -> Iterator[None]:
    """Put the model on a device, without dropout, to compute as suits it; its copies do so too."""
    model: Any = dense.model
    before = next(model.parameters()).device
    firsts = [dense.family.valid_tokens(model, batches[0]) for batches in texts]
    longest = max(mask.shape[1] for masks in firsts for mask in masks.values())
    try:
        model.to(device)
        with eval_mode(model), kernels.for_cpu(model, device, longest, trains=True):
            yield
    finally:
        model.to(before)


class _Lessons:
    """The recorded calls of all attentions, of as many at a time as fit into the budget.

    Attributes:
        seconds: that the recording took, for each attention.
    """

    seconds: float

    def __init__(
        self,
        dense: Checkpoint,
        modules: Sequence[Module],
        texts: list[list[dict[str, Tensor]]],
        settings: Settings,
    ):
        self._dense, self._texts, self._settings = dense, texts, settings
        self._modules = {module.name: module for module in modules}
        first = self._texts[0][0]
        calls = self._recorder(modules).record(*self._on_device(first))
        repeats = sum(_tokens(batch) for batches in self._texts for batch in batches)
        self._groups = groups(calls, self._modules, repeats / _tokens(first), settings.budget)
        self._calls: dict[str, tuple[list[Call], list[Call]]] = {}

    def take(self, name: str) -> tuple[list[Call], list[Call]]:
        """Give away an attention's calls on the training and on the held-out texts."""
        if name not in self._calls:
            group = next(group for group in self._groups if name in group)
            self._calls = {member: ([], []) for member in group}
            started = time.perf_counter()
            recorder = self._recorder([self._modules[member] for member in group])
            for split, batches in enumerate(self._texts):
                for batch in batches:
                    for member, call in recorder.record(*self._on_device(batch)).items():
                        self._calls[member][split].append(call)
            self.seconds = (time.perf_counter() - started) / len(group)
        return self._calls.pop(name)

    def _recorder(self, modules: Sequence[Module]) -> Recorder:
        dtype = getattr(torch, self._settings.dtype)
        return Recorder(self._dense.model, self._dense.family, modules, dtype)

    def _on_device(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        moved = {name: tensor.to(self._settings.device) for name, tensor in batch.items()}
        return moved, self._dense.family.valid_tokens(self._dense.model, moved)


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch with its padding."""
    return sum(tensor.numel() for tensor in batch.values())


@dataclass
class _Pupil:
    """A variant in training.

    Attributes:
        student: its weights, present and best.
        history: mean squared error on the held-out texts, of the start and after every epoch.
        losses: mean squared error on the training texts, while the weights moved, of every epoch.
        is_stopped: it learns no more.
    """

    student: Student
    history: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    is_stopped: bool = False

    def learn(self, inputs: tuple[tuple[Any, ...], dict[str, Any]], call: Call) -> Tensor:
        """Add the gradient of the mean squared error to the weights; return the squared error."""
        output: Tensor = self.student(*inputs[0], **inputs[1])
        difference = call.difference(output.detach())
        square = difference.square().sum()
        # what autograd would make of the loss, in one operation instead of six
        output.backward(difference.mul_(2 / (call.valid.tokens * difference.shape[-1])))
        return square

    def note(self, error: float, patience: int) -> None:
        """Take the held-out error: keep the best weights, stop where there is no more to gain."""
        if not self.history or error < min(self.history):
            self.student.keep()
        self.history.append(error)
        is_lost = not math.isfinite(error)
        self.is_stopped = is_lost or 0 < patience <= len(self.history) - 1 - self.best_epoch()

    def best_epoch(self) -> int:
        """Return the epoch whose weights are kept; 0 is the start."""
        return min(range(len(self.history)), key=lambda i: (math.isnan(x := self.history[i]), x))


def _result(
    pupil: _Pupil,
    module: Module,
    calls: tuple[list[Call], list[Call]],
    norm: float,
    wants_moments: bool,
) -> Trained:
    best, student = pupil.best_epoch(), pupil.student
    return Trained(
        tensors=pupil.student.tensors(),
        error_before=pupil.history[0] / norm,
        error_after=pupil.history[best] / norm,
        training_loss=pupil.losses[best - 1] if best else mean_error(student.best_output, calls[0]),
        history=pupil.history,
        moments=(
            output_moments(student.best, module, calls[0]),
            output_moments(student.best, module, calls[1]),
        )
        if wants_moments
        else None,
    )


def _train(
    dense: Checkpoint,
    module: Module,
    starts: Mapping[Key, Variant],
    calls: tuple[list[Call], list[Call]],
    settings: Settings,
) -> dict[Key, _Pupil]:
    """Train all variants of one attention side by side, each as if it were alone."""
    part = dense.model.get_submodule(module.name)
    pupils = {
        key: _Pupil(Student(start, module, dense.family, dense.model).to(settings.device).eval())
        for key, start in starts.items()
    }
    for pupil in pupils.values():
        pupil.student.mask_gradients()
    optimizer, schedule = _optimizer(pupils.values(), part, len(calls[0]), settings)
    values = output_values(calls[0])
    for pupil in pupils.values():
        pupil.note(mean_error(pupil.student, calls[1]), settings.patience)
    for epoch in range(settings.epochs):
        live = [pupil for pupil in pupils.values() if not pupil.is_stopped]
        totals = [torch.zeros((), dtype=torch.float64, device=settings.device) for _ in live]
        for index in _order(len(calls[0]), (settings.seed, module.name, epoch)) if live else ():
            inputs = calls[0][index].inputs()
            for pupil, total in zip(live, totals, strict=True):
                total += pupil.learn(inputs, calls[0][index])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        for pupil, total in zip(live, totals, strict=True):
            pupil.losses.append(float(total) / values)
            pupil.note(mean_error(pupil.student, calls[1]), settings.patience)
            if not math.isfinite(pupil.history[-1]):
                log.warning("%s: a variant diverged; the best epoch is kept.", module.name)
    return pupils


def _optimizer(
    pupils: Iterable[_Pupil], part: nn.Module, steps: int, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make one AdamW for all variants; it works weight by weight, so they stay apart."""
    by_name: dict[str, list[nn.Parameter]] = {}
    for pupil in pupils:
        for name in pupil.student.names:
            by_name.setdefault(name, []).append(pupil.student.part.get_parameter(name))
    learned = [
        {"params": weights, "lr": settings.lr * max(_size(part.get_parameter(name)), SMALLEST)}
        for name, weights in by_name.items()
    ]
    # tiny losses have tiny gradients: eps must not be felt
    optimizer = torch.optim.AdamW(learned, betas=BETAS, eps=1e-12, weight_decay=0.0, fused=True)
    total = max(1, settings.epochs * steps)
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
