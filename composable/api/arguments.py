"""What the functions of the Python interface share: what they are given, and where they work."""

import contextlib
import copy
import dataclasses
import numbers
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from composable import devices
from composable.errors import UserError
from composable.formats import scores_file
from composable.formats.scores import Scores
from composable.models.checkpoint import Checkpoint
from composable.training.options import Options

#: Name of a module -> fraction to remove, or {"rate": fraction, "method": name}.
Configuration = Mapping[str, Any]
#: Texts, or the path of data of the model's task; None: what the model names.
Data = str | Path | Sequence[str] | None


def copy_of(model: Checkpoint) -> Checkpoint:
    """Copy a model, so that what happens to the copy leaves it as it is."""
    copied = copy.deepcopy(model.model)
    return dataclasses.replace(model, model=copied, info=copy.deepcopy(model.info))


@contextlib.contextmanager
def moved(model: Checkpoint, device: str) -> Iterator[Checkpoint]:
    """Lend a model to a device; afterwards it is where it was."""
    place = model.model.device
    try:
        model.model.to(devices.select_device(device))  # type: ignore[arg-type]
        yield model
    finally:
        model.model.to(place)  # type: ignore[arg-type]


@contextlib.contextmanager
def in_float32(model: Checkpoint, device: str, is_copied: bool = False) -> Iterator[Checkpoint]:
    """Lend a model in float32: a copy where it is in another dtype, or will be changed."""
    if is_copied or model.model.dtype != torch.float32:
        model = copy_of(model)
        model.model.float()
    with moved(model, device) as working:
        yield working


@contextlib.contextmanager
def scratch(folder: str | Path | None = None) -> Iterator[Path]:
    """Yield the folder, or a temporary one that is gone afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="composable-") as name:
        yield Path(name)


def training_options(
    folder: Path, epochs: int | None, batch_size: int | None, lr: float | None, **others: Any
) -> Options:
    """Make settings; what is None is filled in later."""
    positive("epochs", epochs)
    positive("batch_size", batch_size)
    if lr is not None and not lr > 0:
        raise UserError(f"lr {lr}: expected a number above 0.")
    chosen: Any = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    return Options(**chosen, **others, checkpoint_dir=folder).resolved()


def positive(name: str, value: int | None) -> int | None:
    """Return a number, or None; a UserError where it is below 1."""
    if value is not None and value < 1:
        raise UserError(f"{name} {value}: expected a number from 1.")
    return value


def require_dense(model: Checkpoint, purpose: str) -> None:
    """Raise UserError for a composed model where only a dense one makes sense."""
    if not model.is_dense:
        raise UserError(f"dense: is a composed model; {purpose} needs the dense one.")


def place_of(data: Data) -> Any:
    """Return data as the tasks know it: paths are str."""
    return str(data) if isinstance(data, Path) else data


def plain(value: Any) -> Any:
    """Turn numbers of NumPy, and dicts and lists of them, into what JSON has."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool | int)
    return float(value) if is_number else value


def scores_of(dense: Checkpoint, given: Scores | str | Path | None) -> Scores | None:
    """Read scores where they are a file, and compare them with the model."""
    if given is None:
        return None
    path = Path("scores") if isinstance(given, Scores) else Path(given)
    found = given if isinstance(given, Scores) else scores_file.load(path)
    found.require_model(dense.fingerprint, path)
    dense.require_reading(path, found.reading)
    return found
