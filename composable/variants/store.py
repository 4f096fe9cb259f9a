"""Finished parts of a least-squares run, one file each, so that an interrupted run goes on."""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from composable import files, runs
from composable.errors import FormatError

log = logging.getLogger("composable")


@dataclass(frozen=True)
class Fit:
    """Weights that a variant may take, and how well they do.

    Attributes:
        tensors: those that differ from the pruned variant's, by name.
        train: mean squared error of the module's output, per token and feature, on the
            calibration texts; None of weights as pruned that "ls" is better than.
        held_out: the same on the held-out texts.
        norm: mean square of the dense module's output there.
        seconds: spent on these weights.
        largest_coefficient: largest |T| of `solver.Solution`; None: it lost no whole units.
    """

    tensors: dict[str, Tensor]
    train: float | None
    held_out: float
    norm: float
    seconds: float = 0.0
    largest_coefficient: float | None = None


#: How weights came about ("pruned", "ls", "trained") -> the fit.
Fits = dict[str, Fit]


def best(fits: Fits) -> str:
    """Choose by the error on the held-out texts; of equal ones the first, as pruned."""
    return min(fits, key=lambda kind: fits[kind].held_out)


class Store:
    """Finished parts of a run, one sealed file each, so that an interrupted run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, part: str, found: dict[str, Fits]) -> None:
        """Keep the fits of one part, by any names without spaces or slashes."""
        fits = {f"{name} {kind}": fit for name, some in found.items() for kind, fit in some.items()}
        tensors = {
            f"{key}/{name}": tensor.clone(memory_format=torch.contiguous_format)
            for key, fit in fits.items()
            for name, tensor in fit.tensors.items()
        }
        facts = {key: {**vars(fit), "tensors": _shapes(fit)} for key, fit in fits.items()}
        described = json.dumps(facts).encode()
        size = len(described).to_bytes(8, "little")
        content = safetensors.torch.save(tensors)
        runs.write_sealed(self._path(part), size + described + content)

    def load(self, part: str, wanted: Collection[tuple[str, str]]) -> dict[str, Fits] | None:
        """Return the fits of a part, None where it was not finished or is damaged.

        Args:
            part: as it was saved.
            wanted: name and kind of every fit that it has, and no others.
        """
        path = self._path(part)
        try:
            content = runs.read_sealed(path)
            begin = 8 + int.from_bytes(content[:8], "little")
            found: dict[str, Fits] = {}
            described = json.loads(content[8:begin])
            if {tuple(key.split(" ")) for key in described} != {*wanted}:
                raise ValueError("other fits")
            for key, facts in described.items():
                name, kind = key.split(" ")
                found.setdefault(name, {})[kind] = _fit(facts)
            for key, tensor in safetensors.torch.load(content[begin:]).items():
                fit, _, own = key.partition("/")
                name, kind = fit.split(" ")
                found[name][kind].tensors[own] = tensor
            shapes = {key: facts["tensors"] for key, facts in described.items()}
            if shapes != {f"{n} {k}": _shapes(fit) for n in found for k, fit in found[n].items()}:
                raise ValueError("other tensors")
            if any(fits[best(fits)].train is None for fits in found.values()):
                raise ValueError("the best weights have no error on the calibration texts")
        except FileNotFoundError:
            return None
        except (
            *(FormatError, SafetensorError, LookupError, TypeError, ValueError, AttributeError),
            RecursionError,
        ) as error:
            reason = error if isinstance(error, FormatError) else "is not what was written"
            log.warning("%s %s and is computed anew.", path, reason)
            runs.remove(path)
            return None
        return found

    def _path(self, part: str) -> Path:
        return self.folder / f"{files.digest_of(part)[:24]}.part"


def _shapes(fit: Fit) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a fit."""
    return {name: [*tensor.shape] for name, tensor in fit.tensors.items()}


def _fit(facts: dict[str, Any]) -> Fit:
    """Make a fit without tensors; a ValueError where what is no number should be one."""
    fit = Fit(**{**facts, "tensors": {}})
    may_lack = (fit.train, fit.largest_coefficient)
    numbers = [fit.held_out, fit.norm, fit.seconds, *(x for x in may_lack if x is not None)]
    if not all(type(number) is float for number in numbers):
        raise ValueError("other facts")
    return fit
