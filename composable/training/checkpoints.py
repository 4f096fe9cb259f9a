"""Checkpoints of trainings: the newest that is whole, which are kept, what each must have."""

import json
import logging
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState

from composable import files, runs
from composable.errors import FormatError, UserError
from composable.formats.stats_file import COLUMNS

log = logging.getLogger("composable")
MODEL, STATE, STEPS = "model.safetensors", "trainer_state.json", ("optimizer.pt", "scheduler.pt")
KEPT = 2  # the newest, and one for the case that it is damaged; and the best


def newest(folder: Path, processes: int) -> Path | None:
    """Newest checkpoint that is whole, as is the best one it knows of; others are removed."""
    for path in reversed(_all(folder)):
        try:
            _check(path, processes)
        except FormatError as error:
            log.warning("%s %s and is left out.", path, error)
            runs.remove(path)
        else:
            return path
    return None


def rotate(folder: Path, best: int | None) -> None:
    """Remove all checkpoints but the newest and the one of step `best`."""
    for path in _all(folder)[:-KEPT]:
        if _step_of(path) != best:
            runs.remove(path)


def state_of(path: Path) -> dict[str, Any]:
    """Read what Trainer keeps beside tensors."""
    text = (path / STATE).read_text()
    state: dict[str, Any] = json.loads(text, object_pairs_hook=files.unique_keys)
    return state


def random_states(processes: int) -> list[str]:
    """Names of the files with the random states of all processes."""
    return [f"rng_state{_of(number, processes)}.pth" for number in range(processes)]


def check_best(best: Path) -> None:
    """Refuse the best checkpoint where it was damaged while the training went on."""
    try:
        runs.check_seal(best)
    except FormatError as error:
        raise UserError(
            f"{best}: has the best weights, and {error}; run the same command again, which goes on "
            "from what is whole."
        ) from error


@contextmanager
def reading(path: Path, *names: str) -> Iterator[None]:
    """Check files of a checkpoint once more after the block that reads them.

    Raises:
        UserError: they changed meanwhile, or do not fit the model.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:  # torch's message says how to execute them
        raise does_not_fit(path, "it holds Python objects, which are never executed") from error
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError),
        SafetensorError,
    ) as error:
        raise does_not_fit(path, str(error).strip().partition("\n")[0]) from error
    try:
        runs.check_seal(path, names)
    except FormatError as error:
        raise UserError(
            f"{path}: {error} since it was chosen; run the same command again."
        ) from error


def does_not_fit(path: Path, reason: str) -> UserError:
    """Make the error about a checkpoint that is whole and yet of no use."""
    return UserError(
        f"{path}: a checkpoint does not fit the model ({reason}); delete the folder, or start "
        "without resume."
    )


def _all(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest last."""
    found = [path for path in folder.iterdir() if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _of(number: int, processes: int) -> str:
    return "" if processes == 1 else f"_{number}"


def _check_history(history: Any) -> None:
    """Raise ValueError, or an error of Python, unless it holds rows as a training adds them."""
    rows = [entry["stats"] for entry in history if "stats" in entry]
    for row in rows:
        numbers = [row[name] for name in COLUMNS]
        if row["training_loss"] is None:
            numbers.remove(None)
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a number of its rows is not finite")
    epochs = [row["epoch"] for row in rows]
    if epochs != sorted(set(epochs)) or epochs[:1] not in ([], [0]):
        raise ValueError("its epochs do not ascend from 0")
    for entry in history:
        math.isfinite(entry.get("loss", 0) + entry.get("learning_rate", 0))


def _check(path: Path, processes: int) -> None:
    """Raise FormatError, with a part of a sentence, unless a run can go on from `path`."""
    runs.check_seal(path)
    if lost := [n for n in (MODEL, STATE, *STEPS, *random_states(processes))
                if not (path / n).is_file()]:  # fmt: skip
        raise FormatError(f"is damaged ({lost[0]} is missing)")
    try:
        state = state_of(path)
        step, best = state["global_step"], state.get("best_global_step")
        if step != _step_of(path) or not isinstance(best, int | None):
            raise FormatError(f"is damaged ({STATE} is of step {step})")
        _check_history(state["log_history"])
        TrainerState(**state)  # which Trainer makes of it, and knows no other keys
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError) as error:
        raise FormatError(f"is damaged ({STATE} is not readable)") from error
    if best and best != step:
        try:
            runs.check_seal(path.with_name(f"checkpoint-{best}"))
        except FormatError as error:
            raise FormatError(f"needs checkpoint-{best}, which {error},") from error
