"""Finished parts of a least-squares run, one file each, so that an interrupted run goes on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from composable import files


@dataclass(frozen=True)
class Fit:
    """What became of a problem, or of a variant.

    Attributes:
        tensors: for a problem `weight` (rows, dense columns) and `bias`; for a variant those that
            changed, by name.
        facts: mean squared errors `train_before`, `train`, `before`, `after` (the last two on
            held-out texts), `norm`, the mean square of the dense output there, and `seconds`.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, float]


class Store:
    """Finished parts of a run, one safetensors file each, so that an interrupted run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, name: Any, fits: dict[str, Fit]) -> None:
        """Keep the fits of one part."""
        tensors = {
            f"{key}/{part}": tensor.clone(memory_format=torch.contiguous_format)
            for key, fit in fits.items()
            for part, tensor in fit.tensors.items()
        }
        facts = {key: fit.facts for key, fit in fits.items()}
        content = safetensors.torch.save(tensors, {"facts": json.dumps(facts)})
        with files.atomic_write(self._path(name)) as file:
            file.write(content)

    def load(self, name: Any) -> dict[str, Fit] | None:
        """Return the fits of a part, None where it was not finished."""
        try:
            with safetensors.safe_open(self._path(name), "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                fits = {key: Fit({}, values) for key, values in facts.items()}
                for name in file.keys():  # noqa: SIM118 (no dict)
                    key, _, part = name.partition("/")
                    fits[key].tensors[part] = file.get_tensor(name)
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return None
        return fits

    def _path(self, name: Any) -> Path:
        return self.folder / f"{files.digest_of(name)[:24]}.safetensors"
