"""What every module keeps so that a model keeps a share of its MACs or parameters."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from composable.errors import ConfigError, MismatchError, UserError
from composable.families import Module
from composable.formats.bundle import WHOLE_GROUPS
from composable.formats.config import ALLOCATIONS, METRICS, Configuration, Entry
from composable.formats.scores import Numbers, Scores
from composable.models import cost
from composable.models.checkpoint import Checkpoint

Kept = NDArray[np.int64]


class Queue:
    """The steps of some modules (`Module.steps`), in the order in which they are kept.

    The first step of every module always stays, so it is not in the queue.

    Args:
        costs: (modules,) of a step.
        worth: of every module (steps - 1,): of each step, kept after the ones before it; never
            rising. Steps of equal worth are taken evenly from all modules.

    Attributes:
        owner: (n,) number of the module of each step in the queue.
        worth: (n,) of each.
        spent: (n + 1,) cost of the first so many, and of the first step of all modules.
    """

    def __init__(self, costs: Sequence[float], worth: Sequence[Numbers]) -> None:
        counts = [len(one) for one in worth]
        owner = np.repeat(np.arange(len(worth)), counts)
        shares = np.concatenate([np.arange(1, n + 1) / (n + 1) for n in counts])
        all_worth = np.concatenate(worth)
        order = np.lexsort((owner, shares, -all_worth))
        self.costs = np.array(costs, float)
        self.owner, self.worth = owner[order], all_worth[order]
        spent = np.cumsum(self.costs[self.owner])
        self.spent = self.costs.sum() + np.concatenate([[0.0], spent])

    def kept(self, count: int) -> Kept:
        """Steps that every module keeps, where the first `count` of the queue are kept."""
        return 1 + np.bincount(self.owner[:count], minlength=len(self.costs))

    def fill(self, budget: float, count: int = 0) -> Kept:
        """Keep the first `count`, and then every one that the budget has room for.

        Returns:
            Steps that every module keeps.
        """
        count = max(count, int(np.searchsorted(self.spent, budget, side="right")) - 1)
        kept, room, rest = self.kept(count), budget - self.spent[count], self.owner[count:]
        while (fits := self.costs[rest] <= room).any():
            first = int(fits.argmax())
            kept[rest[first]] += 1
            room -= self.costs[rest[first]]
            rest = rest[first + 1 :]
        return kept


def falling(gains: Numbers) -> Numbers:
    """Find the sequence (n,) that never rises and is closest to `gains`, (n,), in least squares.

    Where a step helps only with the next one, both get their mean.

    Source: pool adjacent violators (Ayer et al. 1955).
    """
    pools: list[tuple[float, int]] = []  # mean, length
    for gain in gains.tolist():
        mean, length = gain, 1
        while pools and pools[-1][0] < mean:
            before, many = pools.pop()
            mean = (before * many + mean * length) / (many + length)
            length += many
        pools.append((mean, length))
    return np.repeat([mean for mean, _ in pools], [length for _, length in pools])


def errors_of(scores: Scores, module: Module) -> Numbers:
    """Read which error a module has with fewer and fewer of its steps missing.

    Args:
        scores: of the ranker stat.
        module: an attention or ffn.

    Returns:
        (n,) that fall to 0: with none of its heads or one of its neurons, and so on until all.

    Raises:
        UserError: the scores do not have it.
    """
    name = "error" if module.kind == "attention" else "left"
    found = scores.units.get(module.name)
    if found is None or name not in found.components:
        method = scores.origin.method if scores.origin else "another program"
        raise UserError(
            f'the scores (of {method}) hold no "{name}" of "{module.name}", which the allocation '
            "stat looks at; measure them with rank_importance.py, method stat."
        )
    errors = np.sort(found.components[name])[::-1]  # the more is kept, the less is left
    if module.kind == "ffn":
        return errors
    # all heads of a step have the error of what is kept before it
    return np.append(errors[:: module.units // module.steps], 0.0)


def best_allocation(scores: Scores | None) -> str:
    """Choose "stat", better than "uniform" wherever it was measured, where scores allow it."""
    found = scores.units.values() if scores else ()
    return "stat" if any({"error", "left"} & set(one.components) for one in found) else "uniform"


class Allocator:
    """Divides sizes among the attentions and ffns of a dense model.

    Args:
        dense: the model; the weights may be on the meta device.
        metric: of `METRICS`.
        allocation: "uniform": every attention keeps the same share of its heads, every ffn of its
            neurons. "stat": those units stay that, for what they cost, lower most the sum of the
            modules' squared errors, each relative to what its stack has written up to there.
        scores: of this model, of the ranker stat for "stat"; also say how long texts are.
        gqa: "per-group" or "whole-groups"; None: as the scores were measured.

    Attributes:
        modules: all attentions and ffns.
        lengths: stack -> tokens of a sample.
        whole_groups: see `Module`.

    Raises:
        UserError: the scores do not have what is needed.
        ConfigError: no unit of the model can leave.
    """

    def __init__(
        self,
        dense: Checkpoint,
        metric: str = METRICS[0],
        allocation: str = ALLOCATIONS[0],
        scores: Scores | None = None,
        gqa: str | None = None,
    ) -> None:
        if allocation == "stat" and scores is None:
            raise UserError(
                "the allocation stat needs scores, a file of rank_importance.py, method stat."
            )
        model, family = dense.model, dense.family
        texts = scores.origin.texts if scores and scores.origin else None
        self.lengths = cost.lengths_of(model, family, texts.mean_tokens if texts else None)
        self.metric = metric
        measured = scores if allocation == "stat" else None
        # where their errors are not looked at, scores do not contradict what is asked for
        self.whole_groups = whole_groups(gqa, measured if gqa else scores)
        self.modules = [
            replace(module, whole_groups=self.whole_groups)
            for module in family.modules(model)
            if module.kind in ("attention", "ffn") and module.units
        ]
        steps = [one.steps for one in self.modules]
        if max(steps) == 1:
            raise ConfigError("this model has no second head or neuron anywhere: none can leave.")
        self._costs = [cost.step_cost(model, one, metric, self.lengths) for one in self.modules]
        self._total = cost.total(model, family, metric, self.lengths)
        self._fixed = self._total - float(np.dot(self._costs, steps))
        self._errors = [errors_of(measured, one) for one in self.modules] if measured else []

    def configuration(self, size: float) -> Configuration:
        """Choose what every module keeps so that the model keeps a size, and never more.

        Returns:
            An entry for every attention and ffn, whose rate is an exact number of units.

        Raises:
            ConfigError: the size is no fraction above 0, or smaller than can be reached.
        """
        floor = (self._fixed + sum(self._costs)) / self._total
        smallest = math.ceil(floor * 1e4) / 1e4
        if not floor <= size <= 1:
            raise ConfigError(
                f"size {size}: expected {smallest} to 1, the fraction of the {self.metric} that "
                "stays; every module keeps at least one head or neuron."
            )
        # sums of fractions are off by a rounding error
        budget = size * self._total - self._fixed + 1e-6 * min(self._costs)
        kept = self._by_errors(budget) if self._errors else self._evenly(size, budget)
        return {
            module.name: Entry((module.steps - int(count)) / module.steps)
            for module, count in zip(self.modules, kept, strict=True)
        }

    def _by_errors(self, budget: float) -> Kept:
        """Keep the steps that lower the sum of relative squared errors most for what they cost."""
        rows = zip(self.modules, self._errors, self._written(), self._costs, strict=True)
        worth = [
            falling(-np.diff(errors[-module.steps :] ** 2)) / written / each
            for module, errors, written, each in rows
        ]
        return Queue(self._costs, worth).fill(budget)

    def _written(self) -> list[float]:
        """Say how much each module's stack has written with it, as the sum of squared norms.

        An error counts less where more is in the stream that it is added to.
        """
        sums: dict[str, float] = {}
        found = []
        for module, errors in zip(self.modules, self._errors, strict=True):
            sums[module.stack] = sums.get(module.stack, 0.0) + float(errors[0]) ** 2
            found.append(sums[module.stack] or 1.0)
        return found

    def _evenly(self, size: float, budget: float) -> Kept:
        """Keep the share of heads that is closest to the size, and fill up with neurons."""
        heads, neurons = (self._even(kind) for kind in ("attention", "ffn"))
        # all numbers of heads that are the same share of every attention
        counts = [0, *(np.flatnonzero(np.diff(heads.worth, append=-1.0)) + 1).tolist()]
        rooms = {count: budget - heads.spent[count] for count in counts}
        fitting = [count for count, room in rooms.items() if room >= neurons.spent[0]]
        # where all neurons would stay there is room for more heads
        able = [count for count in fitting if rooms[count] < neurons.spent[-1]] or fitting[-1:]
        first, total = len(heads.costs), len(heads.costs) + len(heads.owner)
        best = min(able, key=lambda count: abs((first + count) / total - size))
        kept_neurons = neurons.fill(rooms[best])
        kept_heads = heads.fill(budget - float(kept_neurons @ neurons.costs), best)
        kept = {"attention": iter(kept_heads), "ffn": iter(kept_neurons)}
        return np.array([next(kept[module.kind]) for module in self.modules])

    def _even(self, kind: str) -> Queue:
        """Queue the steps of all modules of a kind, so that all of them keep the same share."""
        own = [
            (one.steps, each)
            for one, each in zip(self.modules, self._costs, strict=True)
            if one.kind == kind
        ]
        return Queue([each for _, each in own], [1 - np.arange(1, n) / n for n, _ in own])


def whole_groups(gqa: str | None, scores: Scores | None) -> bool:
    """Say whether heads leave as whole groups: as asked for, else as the scores were measured.

    Raises:
        MismatchError: the scores were measured for the other way.
    """
    measured = scores.origin.options.get("gqa") if scores and scores.origin else None
    if gqa and measured and gqa != measured:
        raise MismatchError(
            f"gqa is {gqa}, but the scores were measured for heads that leave {measured}; give the "
            "same, or measure them again."
        )
    return (gqa or measured) == WHOLE_GROUPS
