"""What every module keeps so that a model keeps a share of its MACs or parameters."""

import math
from dataclasses import dataclass, replace

import numpy as np

from composable import ranking
from composable.errors import ConfigError, MismatchError, ShapeError, UserError
from composable.families import Module
from composable.formats.bundle import WHOLE_GROUPS
from composable.formats.config import ALLOCATIONS, METRICS, Configuration, Entry
from composable.formats.scores import Numbers, Scores
from composable.models import cost
from composable.models.checkpoint import Checkpoint
from composable.ranking.base import unit_modules
from composable.ranking.budget import Kept, Queue, keep_most

#: Widths that an ffn may have with the allocation global, see `Allocator`.
GRID = 16


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
        raise UserError(
            f'the scores (of {_method_of(scores)}) hold no "{name}" of "{module.name}", which the '
            "allocation stat looks at; measure them with rank_importance.py, method stat."
        )
    errors = np.sort(found.components[name])[::-1]  # the more is kept, the less is left
    if module.kind == "ffn":
        return errors
    # all heads of a step have the error of what is kept before it
    return np.append(errors[:: module.units // module.steps], 0.0)


def worth_of(scores: Scores, module: Module) -> Numbers:
    """Sum the importances of the units that every step of a module keeps, the best step first.

    Args:
        scores: of any ranker.
        module: an attention or ffn.

    Returns:
        (steps,) that never rise, in the order in which `methods.base` lets them stay.

    Raises:
        UserError: the scores do not have it, or are of another shape.
    """
    importance = scores.importance(module.name)
    if importance.shape != (module.units,):
        raise ShapeError(
            f'"{module.name}": the scores are of shape {importance.shape}, it has {module.units} '
            "units; measure this model."
        )
    if module.kind == "ffn":
        return np.sort(importance)[::-1]
    heads = importance.reshape(module.groups, -1)
    if module.keeps_groups:  # the best head of every group, the second of every group, ...
        return np.sort(heads, axis=1)[:, ::-1].sum(0)  # type: ignore[no-any-return]
    return np.sort(heads.sum(1))[::-1]


def best_allocation(scores: Scores | None) -> str:
    """Choose an allocation by what the scores can tell.

    "stat" by errors of the ranker stat, "global" by importances that texts were looked at for and
    that can be compared between modules: both lose less as pruned than "uniform".
    """
    found = scores.units.values() if scores else ()
    if any({"error", "left"} & set(one.components) for one in found):
        return "stat"
    ranker = _ranker_of(scores)
    is_global = found and ranker and ranker.is_comparable and ranker.reads_texts
    return "global" if is_global else "uniform"


def check_allocation(allocation: str, scores: Scores | None) -> None:
    """Raise UserError for an unknown allocation, and for scores that are not for it."""
    if allocation not in ALLOCATIONS:
        known = ", ".join(ALLOCATIONS)
        raise ConfigError(f"allocation {allocation}: unknown; known are {known}.")
    if scores is None:
        if allocation == "uniform":
            return
        method = "stat" if allocation == "stat" else "trajectory"
        raise UserError(
            f"the allocation {allocation} needs scores, a file of rank_importance.py, "
            f"method {method}."
        )
    ranker = _ranker_of(scores)
    is_comparable = ranker is None or ranker.is_comparable
    if allocation == "global" and not is_comparable:
        is_stat = best_allocation(scores) == "stat"
        remedy = "measure them by another method, such as trajectory"
        raise UserError(
            f"the allocation global weighs units of all modules against each other, but the "
            f"importances of {_method_of(scores)} compare only those of one module; "
            f"{'choose the allocation stat' if is_stat else remedy}."
        )
    if allocation == "uniform" and not (scores.origin and scores.origin.texts):
        more = ", or choose the allocation global" if is_comparable and scores.units else ""
        raise ConfigError(
            "the scores were measured on no texts, and the allocation uniform looks at nothing "
            f"but the lengths of texts; leave them out{more}."
        )


def _method_of(scores: Scores) -> str:
    return scores.origin.method if scores.origin else "another program"


def _ranker_of(scores: Scores | None) -> ranking.Ranker | None:
    """Find the ranker that measured scores; None where it is none of ours."""
    name = _method_of(scores) if scores else ""
    return next((one for one in ranking.RANKERS if one.name == name), None)


@dataclass(frozen=True)
class Steps:
    """In which steps the units of a module leave.

    Attributes:
        module: an attention or ffn.
        width: how many of `Module.steps` leave together, as the grid says.
        cost: of all of them.
    """

    module: Module
    width: int
    cost: float

    @property
    def count(self) -> int:
        """How many there are; what the module has beside them always stays."""
        return self.module.steps // self.width

    def rate(self, kept: int) -> float:
        """Return the fraction of the module that leaves, an exact number of units."""
        return (self.count - kept) * self.width / self.module.steps

    def after_each(self, values: Numbers) -> Numbers:
        """Pick from values with ever more of `Module.steps`, up to all: (count,)."""
        return values[::-1][:: self.width][: self.count][::-1]

    def sums(self, values: Numbers) -> Numbers:
        """Add up values of each of `Module.steps`: (count,)."""
        beside = len(values) - self.count * self.width
        return values[beside:].reshape(self.count, self.width).sum(1)


class Allocator:
    """Divides sizes among the attentions and ffns of a dense model.

    Args:
        dense: the model; the weights may be on the meta device.
        metric: of `METRICS`.
        allocation: "uniform": every attention keeps the same share of its heads, every ffn of its
            neurons. "stat": those units stay that, for what they cost, lower most the sum of the
            modules' squared errors, each relative to what its stack has written up to there.
            "global": those units of all modules stay whose importances have the highest sum. None:
            `best_allocation`.
        scores: of this model, of the ranker stat for "stat", for "global" of one whose importances
            can be compared between modules; also say how long texts are.
        gqa: "per-group" or "whole-groups"; None: as the scores were measured.
        grid: the most widths that an ffn may have; 0: any number of neurons may leave. None:
            `GRID` with "global", else 0.

    Attributes:
        allocation, grid: what was chosen.
        modules: all attentions and ffns.
        lengths: stack -> tokens of a sample.
        whole_groups: see `Module`.

    Raises:
        UserError: the scores do not have what is needed, or are not looked at.
        ConfigError: no unit of the model can leave.
    """

    def __init__(
        self,
        dense: Checkpoint,
        metric: str = METRICS[0],
        allocation: str | None = None,
        scores: Scores | None = None,
        gqa: str | None = None,
        grid: int | None = None,
    ) -> None:
        self.allocation = allocation or best_allocation(scores)
        check_allocation(self.allocation, scores)
        self.grid = _grid(grid, self.allocation)
        texts = scores.origin.texts if scores and scores.origin else None
        known = texts.mean_tokens if texts else None
        self.metric, self.lengths = metric, cost.lengths_of(dense.model, dense.family, known)
        # where their units are not looked at, scores do not contradict what is asked for
        is_free = gqa and self.allocation == "uniform"
        self.whole_groups = whole_groups(gqa, None if is_free else scores)
        self.modules = [
            replace(module, whole_groups=self.whole_groups) for module in unit_modules(dense)
        ]
        self._steps = [self._steps_of(dense, module) for module in self.modules]
        counts, costs = zip(*((one.count, one.cost) for one in self._steps), strict=True)
        self._least = "head or step of the grid" if self.grid else "head or neuron"
        if max(counts) == 1:
            raise ConfigError(f"this model has no second {self._least} anywhere: none can leave.")
        self._total = cost.total(dense.model, dense.family, metric, self.lengths)
        self._fixed = self._total - float(np.dot(costs, counts))
        self._costs = list(costs)
        read = {"stat": errors_of, "global": worth_of}.get(self.allocation)
        self._measured = [read(scores, one) for one in self.modules] if scores and read else []

    def _steps_of(self, dense: Checkpoint, module: Module) -> Steps:
        """Say how a module's units leave: the neurons of an ffn as the grid says."""
        is_gridded = self.grid and module.kind == "ffn"
        width = math.ceil(module.steps / self.grid) if is_gridded else 1
        each = cost.step_cost(dense.model, module, self.metric, self.lengths)
        return Steps(module, width, width * each)

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
                f"stays; every module keeps at least one {self._least}."
            )
        # sums of fractions are off by a rounding error
        budget = size * self._total - self._fixed + 1e-6 * min(self._costs)
        by = {"stat": self._by_errors, "global": self._by_importance}.get(self.allocation)
        kept = by(budget) if by else self._evenly(size, budget)
        return {
            one.module.name: Entry(one.rate(int(count)))
            for one, count in zip(self._steps, kept, strict=True)
        }

    def _by_importance(self, budget: float) -> Kept:
        """Keep the steps whose importances have the highest sum; of each module the first."""
        rows = zip(self._steps, self._measured, strict=True)
        others = [steps.sums(worth)[1:] for steps, worth in rows]
        return 1 + keep_most(self._costs, others, budget - sum(self._costs))

    def _by_errors(self, budget: float) -> Kept:
        """Keep the steps that lower the sum of relative squared errors most for what they cost."""
        rows = zip(self._steps, self._measured, self._written(), strict=True)
        worth = [
            falling(-np.diff(steps.after_each(errors) ** 2)) / written / steps.cost
            for steps, errors, written in rows
        ]
        return Queue(self._costs, worth).fill(budget)

    def _written(self) -> list[float]:
        """Say how much each module's stack has written with it, as the sum of squared norms.

        An error counts less where more is in the stream that it is added to.
        """
        sums: dict[str, float] = {}
        found = []
        for module, errors in zip(self.modules, self._measured, strict=True):
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
        own = [one for one in self._steps if one.module.kind == kind]
        worth = [1 - np.arange(1, one.count) / one.count for one in own]
        return Queue([one.cost for one in own], worth)


def _grid(given: int | None, allocation: str) -> int:
    """Return the grid that was asked for, else what is usual with an allocation."""
    if given is None:
        return GRID if allocation == "global" else 0
    if given < 0:
        raise ConfigError(f"grid {given}: expected a number of widths, or 0 for every neuron.")
    return given


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
