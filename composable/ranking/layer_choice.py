"""Which layers go: by distances between layer states, by a policy and a number."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from composable.errors import ConfigError, UserError
from composable.formats import scores_file
from composable.formats.config import POLICIES, Configuration, Entry
from composable.formats.scores import BlockDistances, Scores
from composable.methods.linear_map import LINEAR_MAP
from composable.models.checkpoint import Checkpoint


def starts(values: NDArray[np.float64], size: int, protected: Collection[int] = ()) -> list[int]:
    """List the first layers that a block of `size` layers may have."""
    return [
        first
        for first in range(len(values) - size + 1)
        if not any(first <= layer < first + size for layer in protected)
    ]


def best_block(
    distances: BlockDistances, size: int, protected: Collection[int] = (), offset: bool = False
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


@dataclass(frozen=True)
class Choice:
    """Which layers of a stack go.

    Attributes:
        policy: "block": the contiguous block that changes its input least (Gromov et al. 2024);
            "singles": the layers that do so one by one (ShortGPT); "deepest": the last ones but the
            very last (the simple heuristic of Gromov et al.); "iterative": in the order measured.
        scores: for all policies but "deepest".
        stack: whose layers; None where there is one alone.
        distance: of the scores; None: the first of the file.
        protected: layers that must stay.
        offset: see `best_block`.
    """

    policy: str = "block"
    scores: Scores | None = None
    stack: str | None = None
    distance: str | None = None
    protected: Collection[int] = ()
    offset: bool = False

    def layers(self, count: int, total: int) -> list[int]:
        """Choose `count` of a stack's `total` layers to go.

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
            raise ConfigError(f"offset: not for the policy {self.policy}, only for block.")
        if self.distance and self.policy == "deepest":
            raise ConfigError(f"distance {self.distance}: the policy deepest looks at no scores.")

    def _order(self, total: int) -> list[int]:
        """Layers that may go, the first to go first."""
        if self.policy == "deepest":
            return [layer for layer in reversed(range(total - 1)) if layer not in self.protected]
        found = self._distances(total)
        if self.policy == "singles":
            first = starts(found.values, 1, self.protected)
            return sorted(first, key=found.values[0].item)
        assert self.scores is not None
        order = self.scores.order_of_layers(found.stack)
        if self.distance not in (None, order.distance):
            raise ConfigError(
                f"distance {self.distance}: the order of removal was measured by {order.distance}."
            )
        gone, protected = (
            [int(name.rpartition(".")[2]) for name in names]
            for names in (order.modules, order.protected)
        )
        if set(self.protected) != set(protected):
            raise ConfigError(
                f"protected layers {_listed(self.protected)}: the order of removal was measured "
                f"with {_listed(protected)} protected; measure it with the same ones."
            )
        return gone

    def _distances(self, total: int) -> BlockDistances:
        if self.scores is None:
            raise UserError(f"the policy {self.policy} needs scores, a file of rank_importance.py.")
        # the order of removal may be by another distance than the first
        found = self.scores.blocks(
            self.stack, None if self.policy == "iterative" else self.distance
        )
        if found.layers != total:
            raise ConfigError(
                f"the scores are of {found.layers} layers, the {self.stack or 'model'} has "
                f"{total}; measure this model."
            )
        return found


def check_protected(protected: Collection[int], total: int) -> None:
    """Refuse layers that do not exist.

    Raises:
        ConfigError: one of them does not exist.
    """
    if unknown := [layer for layer in protected if not 0 <= layer < total]:
        raise ConfigError(f"protected layer {unknown[0]}: expected 0 to {total - 1}.")


def _listed(layers: Collection[int]) -> str:
    return ",".join(map(str, sorted(layers))) or "none"


def configurations(
    dense: Checkpoint,
    cuts: Sequence[int | Sequence[int]],
    policy: str,
    scores: Path | None,
    stack: str | None,
    protect: Collection[int],
    linear_map: bool,
) -> list[Configuration]:
    """Choose layers as the options of config_generator.py say; most of them are of a `Choice`.

    For every configuration `cuts` say how many layers go, or their numbers. With `linear_map` a
    linear map comes in the place of every run of layers.

    Returns:
        The entries of the layers that go, for every configuration.

    Raises:
        ConfigError: so many cannot go, or not those.
        UserError: the scores do not have what is needed, or are of another model.
    """
    name, names = _layers(dense, stack)
    found = scores_file.load(scores) if scores else None
    if found and scores:
        found.require_model(dense.fingerprint, scores)
        dense.require_reading(scores, found.reading)
    check_protected(protect, len(names))
    choice = Choice(policy, found, name, protected=protect)
    chosen = [
        choice.layers(one, len(names)) if isinstance(one, int) else sorted(set(one)) for one in cuts
    ]
    for layer in {layer for layers in chosen for layer in layers}:
        if not 0 <= layer < len(names) or layer in protect:
            raise ConfigError(
                f"layer {layer}: expected one of the {name}'s layers 0 to {len(names) - 1} that is "
                "not protected."
            )
    return [layer_entries(names, layers, linear_map) for layers in chosen]


def _layers(dense: Checkpoint, stack: str | None) -> tuple[str, list[str]]:
    """Find the stack that is meant, and the names of its layers."""
    names: dict[str, list[str]] = {}
    for module in dense.family.modules(dense.model):
        if module.kind == "layer":
            names.setdefault(module.stack, []).append(module.name)
    if stack is None and len(names) > 1:
        raise ConfigError(f"the model has {' and '.join(names)}; name one of them as the stack.")
    if stack is not None and stack not in names:
        raise ConfigError(f"stack {stack}: this model has only {' and '.join(names)}.")
    name = stack or next(iter(names))
    return name, names[name]


def layer_entries(
    names: Sequence[str], layers: Sequence[int], is_mapped: bool = False
) -> Configuration:
    """Write down which of a stack's layers go; their numbers ascend.

    With `is_mapped` a linear map comes in the place of every run of neighbours.
    """
    if not is_mapped:
        return {names[layer]: Entry(1.0) for layer in layers}
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return {names[run[0]]: Entry(1.0, LINEAR_MAP.name, through=names[run[-1]]) for run in runs}
