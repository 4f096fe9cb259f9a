"""Scores of blocks of layers: the .npz that rank_importance.py writes, and choices made by them."""

import io
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable.config import POLICIES
from composable.errors import ConfigError, FormatError, UserError
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


def starts(values: NDArray[np.float64], size: int, protected: Collection[int] = ()) -> list[int]:
    """List the first layers that a block of `size` layers may have."""
    layers = len(values)
    return [
        first
        for first in range(layers - size + 1)
        if not set(range(first, first + size)) & set(protected)
    ]


def best_block(
    distances: Distances, size: int, protected: Collection[int] = (), offset: bool = False
) -> tuple[int, float]:
    """Find the block of `size` layers that changes its input least.

    Args:
        distances: of a stack.
        size: layers of the block.
        protected: layers that must stay.
        offset: look at the row of size + 1, as the program short-transformers does.

    Returns:
        First layer, the lowest of equal ones, and its distance.

    Raises:
        ConfigError: there is no such block, or it was not measured.
    """
    layers = distances.layers
    if not 1 <= size < layers:
        raise ConfigError(
            f"{size} of {layers} layers to drop: at least one goes and one stays; choose 1 to "
            f"{layers - 1}."
        )
    row = distances.values[size - 1 + offset]
    found = [
        first for first in starts(distances.values, size, protected) if not np.isnan(row[first])
    ]
    if not found:
        raise ConfigError(
            f"no block of {size} layers: the protected layers {sorted(protected)} leave none, or "
            "none was measured."
        )
    first = min(found, key=lambda first: row[first])
    return first, float(row[first])


def block_table(
    distances: Distances, threshold: float | None = None, offset: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the best block of every size, where its distance is at most `threshold`."""
    for size in range(1, distances.layers):
        if np.isnan(distances.values[size - 1 + offset]).all():
            continue
        first, score = best_block(distances, size, offset=offset)
        if threshold is None or score <= threshold:
            yield {"block_size": size, "first": first, "last": first + size - 1, "score": score}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a block table as Markdown."""
    lines = ["| Block size | Removed layers | Score (avg dist) |", "|---|---|---|"]
    lines += [f"| {r['block_size']} | {r['first']}-{r['last']} | {r['score']:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Choice:
    """Which layers of a stack go.

    Attributes:
        policy: "block": the contiguous block that changes its input least (Gromov et al. 2024);
            "singles": the layers that do so one by one (ShortGPT); "deepest": the last ones but the
            very last (the simple heuristic of Gromov et al.); "iterative": in the order measured.
        scores: for all policies but "deepest".
        stack: whose layers; None where there is one alone.
        metric: of the scores; None: the first of the file.
        protected: layers that must stay.
        offset: see `best_block`.
    """

    policy: str = "block"
    scores: Scores | None = None
    stack: str | None = None
    metric: str | None = None
    protected: Collection[int] = ()
    offset: bool = False

    def layers(self, count: int, total: int) -> list[int]:
        """Choose.

        Args:
            count: how many layers go.
            total: layers of the stack.

        Returns:
            Their numbers, ascending; [] for a count of 0.

        Raises:
            ConfigError: so many cannot go, or something was asked for that the policy does not
                look at.
            UserError: the scores do not have what the policy needs.
        """
        self._check(total)
        if count == 0:
            return []
        if self.policy == "block":
            first, _ = best_block(self._distances(total), count, self.protected, self.offset)
            return list(range(first, first + count))
        order = self._order(total)
        if not 1 <= count < total or count > len(order):
            raise ConfigError(
                f"{count} of {total} layers to drop: {min(len(order), total - 1)} can go by the "
                f"policy {self.policy} with {len(set(self.protected))} protected."
            )
        return sorted(order[:count])

    def _check(self, total: int) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy}: unknown; known are {', '.join(POLICIES)}.")
        check_protected(self.protected, total)
        if self.offset and self.policy != "block":
            raise ConfigError(f"--reference-offset: not for the policy {self.policy}, only block.")
        if self.metric and self.policy == "deepest":
            raise ConfigError(f"--metric {self.metric}: the policy deepest looks at no scores.")

    def _order(self, total: int) -> list[int]:
        """Layers that may go, the first to go first."""
        if self.policy == "deepest":
            return [layer for layer in reversed(range(total - 1)) if layer not in self.protected]
        found = self._distances(total)
        if self.policy == "singles":
            first = starts(found.values, 1, self.protected)
            return sorted(first, key=found.values[0].item)
        assert self.scores is not None
        removal = self.scores.removal(found.stack)
        if self.metric not in (None, removal.metric):
            raise ConfigError(
                f"--metric {self.metric}: the order of removal was measured by {removal.metric}."
            )
        if set(self.protected) != set(removal.protected):
            raise ConfigError(
                f"--protect {_listed(self.protected)}: the order of removal was measured with "
                f"{_listed(removal.protected)} protected; rank_importance.py --iterative has "
                "--protect, too."
            )
        return removal.order

    def _distances(self, total: int) -> Distances:
        if self.scores is None:
            raise UserError(
                f"the policy {self.policy} needs --scores, a file of rank_importance.py."
            )
        # the order of removal may be by another metric than the first
        found = self.scores.of(self.stack, None if self.policy == "iterative" else self.metric)
        if found.layers != total:
            raise ConfigError(
                f"the scores are of {found.layers} layers, the {self.stack or 'model'} has "
                f"{total}; measure this model."
            )
        return found


def check_protected(protected: Collection[int], total: int) -> None:
    """Refuse layers that do not exist.

    Raises:
        ConfigError: there is one.
    """
    if unknown := [layer for layer in protected if not 0 <= layer < total]:
        raise ConfigError(f"--protect {unknown[0]}: expected layers from 0 to {total - 1}.")


def _listed(layers: Collection[int]) -> str:
    return ",".join(map(str, sorted(layers))) or "none"
