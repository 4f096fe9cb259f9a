"""Dense attentions with their calls on all texts, as many at a time as fit into memory."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from composable.calibration.recorded_calls import Call, groups, record_calls
from composable.calibration.second_moments import eval_mode
from composable.families import Module
from composable.linalg import kernels
from composable.models.checkpoint import Checkpoint

#: Batches of the training texts and of the held-out texts, from a collator.
Batches = tuple[Sequence[Mapping[str, Tensor]], Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class RecordedAttention:
    """A dense attention and what it was called with.

    Attributes:
        module: its description.
        train: its calls on the training texts.
        held_out: its calls on the held-out texts.
        seconds: its part of the time that the recording took.
    """

    module: Module
    train: list[Call]
    held_out: list[Call]
    seconds: float


@contextmanager
def record(
    dense: Checkpoint, modules: Sequence[Module], batches: Batches, device: str, budget: int
) -> Iterator[Iterator[RecordedAttention]]:
    """Run the dense model and record the calls of attentions, one after the other.

    Within this context the model is on the device, without dropout, and computes as suits the
    device; copies of its parts do so too.

    Args:
        dense: the dense model; left as it is.
        modules: the attentions.
        batches: to run.
        device: where the model runs and the calls lie.
        budget: bytes that calls may take; attentions that do not fit wait for another pass.

    Yields:
        An iterator over the attentions. The calls of each are freed when the next one is asked for.
    """
    model: Any = dense.model
    before = next(model.parameters()).device
    firsts = [dense.family.valid_tokens(model, part[0]) for part in batches]
    longest = max(mask.shape[1] for masks in firsts for mask in masks.values())
    try:
        model.to(device)
        with eval_mode(model), kernels.for_cpu(model, device, longest, trains=True):
            yield _attentions(dense, modules, batches, device, budget)
    finally:
        model.to(before)


def _attentions(
    dense: Checkpoint, modules: Sequence[Module], batches: Batches, device: str, budget: int
) -> Iterator[RecordedAttention]:
    by_name = {module.name: module for module in modules}

    def calls_of(names: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Call]:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        valid = dense.family.valid_tokens(dense.model, moved)
        some = [by_name[name] for name in names]
        return record_calls(dense.model, dense.family, some, moved, valid)

    longest = batches[0][0]
    repeats = sum(_tokens(batch) for part in batches for batch in part) / _tokens(longest)
    for names in groups(calls_of(list(by_name), longest), by_name, repeats, budget):
        started = time.perf_counter()
        calls: dict[str, tuple[list[Call], list[Call]]] = {name: ([], []) for name in names}
        for split, part in enumerate(batches):
            for batch in part:
                for name, call in calls_of(names, batch).items():
                    calls[name][split].append(call)
        seconds = (time.perf_counter() - started) / len(names)
        for name, (train, held_out) in calls.items():
            yield RecordedAttention(by_name[name], train, held_out, seconds)
            train.clear()
            held_out.clear()


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch with its padding."""
    return sum(tensor.numel() for tensor in batch.values())
