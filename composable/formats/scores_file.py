"""Scores of blocks of layers: the .npz that rank_importance.py writes, and choices made by them."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable.errors import FormatError, UserError
from composable.files import atomic_write

FORMAT, VERSION = "composable.scores", "1"
METHOD = "layer_distance"


@dataclass(frozen=True, eq=False)
class Distances:
    """How much every block of layers of one stack changes its input, by one metric.

    Attributes:
        stack: "encoder" or "decoder"; "" in files of other programs.
        metric: name; "" in files of other programs.
        values: (layers, layers) float64 by block size - 1 and first layer; NaN where there is none.
        samples: of the calibration set; 0 where that is not known.
    """

    stack: str
    metric: str
    values: NDArray[np.float64]
    samples: int = 0

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        return len(self.values)


@dataclass(frozen=True)
class Removal:
    """An order in which layers leave one by one, each chosen when the ones before it had left.

    Attributes:
        stack: as in `Distances`.
        order: numbers of the layers in the dense model.
        scores: distance of each when it was chosen.
        metric: by which.
        protected: layers that had to stay.
    """

    stack: str
    order: list[int]
    scores: list[float]
    metric: str
    protected: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """What a file of scores holds.

    Attributes:
        distances: every stack by every metric; the first metric is the main one.
        removals: of the stacks, where they were measured.
        model: where the model came from.
        fingerprint: of the dense model; "" where it is not known.
    """

    distances: list[Distances]
    removals: list[Removal] = field(default_factory=list)
    model: str = ""
    fingerprint: str = ""

    def of(self, stack: str | None = None, metric: str | None = None) -> Distances:
        """Return the distances of a stack by a metric.

        Args:
            stack: None where there is one alone.
            metric: None: the first of the file.

        Raises:
            UserError: it is not there, or a model of two stacks leaves open which one is meant.
        """
        stacks = list(dict.fromkeys(one.stack for one in self.distances))
        if stack is None and len(stacks) > 1:
            raise UserError(f"the scores are of {' and '.join(stacks)}; say which with --stack.")
        here = [one for one in self.distances if one.stack in (stack or stacks[0], "")]
        if not here:
            raise UserError(f"no scores of the {stack}; the file has those of {stacks[0]}.")
        found = [one for one in here if metric in (None, one.metric)]
        if not found:
            names = ", ".join(one.metric or "one without a name" for one in here)
            raise UserError(f'no scores by "{metric}"; the file has {names}.')
        return found[0]

    def removal(self, stack: str) -> Removal:
        """Return the order of removal of a stack.

        Raises:
            UserError: it was not measured.
        """
        for one in self.removals:
            if one.stack == stack:
                return one
        raise UserError(
            f"the scores hold no order of removal of the {stack}; measure it with "
            "rank_importance.py --iterative N."
        )


def save(path: Path, scores: Scores) -> None:
    """Write a file of scores, whole or not at all; equal scores, equal bytes."""
    first = scores.distances[0]
    arrays: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "method": METHOD,
        "model": scores.model,
        "fingerprint": scores.fingerprint,
        # of the first, under the names that other programs read; they have 0 in unused cells
        "arr_0": np.nan_to_num(first.values),
        "result": np.nan_to_num(first.values),
        "valid": ~np.isnan(first.values),
        "stack": first.stack,
        "metric": first.metric,
        "count": first.samples,
        "n_layers": first.layers,
        "layer_indices": np.arange(first.layers),
        "stacks": np.array([one.stack for one in scores.distances]),
        "metrics": np.array([one.metric for one in scores.distances]),
        "counts": np.array([one.samples for one in scores.distances]),
    }
    arrays |= {f"result_{i}": one.values for i, one in enumerate(scores.distances)}
    for one in scores.removals:
        arrays[f"order_{one.stack}"] = np.array(one.order, dtype=np.int64)
        arrays[f"order_scores_{one.stack}"] = np.array(one.scores, dtype=np.float64)
        arrays[f"order_metric_{one.stack}"] = one.metric
        arrays[f"order_protected_{one.stack}"] = np.array(one.protected, dtype=np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def load(path: Path) -> Scores:
    """Read a file of scores, also one that short-transformers wrote (`arr_0` or `result` alone).

    Raises:
        FormatError: another file, a newer one, or damaged.
        OSError: it cannot be read.
    """
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("one array alone")
        with stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{path}: not a readable .npz file ({error}); give one that rank_importance.py wrote."
        ) from error
    try:
        return _parse(arrays)
    except (KeyError, ValueError, IndexError) as error:
        raise FormatError(
            f"{path}: not a file of scores ({error}); give one that rank_importance.py wrote."
        ) from error


def _parse(arrays: Mapping[str, NDArray[Any]]) -> Scores:
    if "format" not in arrays:
        found = arrays["result"] if "result" in arrays else arrays["arr_0"]
        return Scores([Distances("", "", _checked(_with_gaps(found)))])
    met = str(arrays["format"]), str(arrays["version"])
    if met != (FORMAT, VERSION):
        raise ValueError(f"format {' '.join(met)}, this program reads {FORMAT} {VERSION}")
    named = zip(arrays["stacks"], arrays["metrics"], arrays["counts"], strict=True)
    distances = [
        Distances(str(stack), str(metric), _checked(arrays[f"result_{i}"]), int(count))
        for i, (stack, metric, count) in enumerate(named)
    ]
    if not distances:
        raise ValueError("no distances")
    removals = [
        Removal(
            stack,
            [int(layer) for layer in arrays[f"order_{stack}"]],
            [float(score) for score in arrays[f"order_scores_{stack}"]],
            str(arrays[f"order_metric_{stack}"]),
            [int(layer) for layer in arrays[f"order_protected_{stack}"]],
        )
        for stack in dict.fromkeys(one.stack for one in distances)
        if f"order_{stack}" in arrays
    ]
    for one in removals:
        layers = next(each.layers for each in distances if each.stack == one.stack)
        if len(set(one.order)) < len(one.order) or not set(one.order) < set(range(layers)):
            raise ValueError(f"the order {one.order} is none of some of {layers} layers")
    return Scores(distances, removals, str(arrays["model"]), str(arrays["fingerprint"]))


def _with_gaps(values: NDArray[Any]) -> NDArray[Any]:
    """Put NaN into the cells that have no meaning, of files that have 0 there."""
    if values.ndim != 2 or len(values) != values.shape[-1]:
        return values
    rows, columns = np.indices(values.shape)
    return np.where(rows + columns < len(values), values, np.nan)


def _checked(values: NDArray[Any]) -> NDArray[np.float64]:
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"distances of shape {values.shape}, a square was expected")
    if values.dtype.kind != "f" or np.isinf(values).any():
        raise ValueError("distances that are no finite numbers")
    return values.astype(np.float64)
