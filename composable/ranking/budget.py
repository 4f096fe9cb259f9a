"""Which steps of modules stay within a budget: in a given order, or with the highest sum of all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from composable.formats.scores import Numbers

Kept = NDArray[np.int64]
#: Sums that differ by less than this share of them are the same number, rounded.
ROUNDING = 1e-12
CELLS = 1 << 14  # counts that are looked at together
#: Rounds of a search that is exact. More are needed for dozens of different costs, or for worth in
#: proportion to cost: then the share of the sum that an improvement has to add doubles with each
#: so many further rounds.
ROUNDS, DOUBLING = 2048, 32


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


def keep_most(costs: Sequence[float], worth: Sequence[Numbers], budget: float) -> Kept:
    """Keep the steps that have the highest sum of worth within a budget; exactly, see `ROUNDS`.

    Args:
        costs: (modules,) of a step, above 0.
        worth: of every module (steps,): of each step, kept after the ones before it; never rising.
            What is below 0 is not kept; with what is 0 the budget is filled up. Of equal ones
            the earlier module's goes into the sum first.
        budget: 0 or more.

    Returns:
        Steps that every module keeps.

    Source: Kwon et al. 2022 (arXiv 2204.09656), whose two classes of modules, heads and neurons,
        may be any number of classes here.
    """
    prices, members = np.unique(costs, return_inverse=True)
    classes = [_merged(worth, np.flatnonzero(members == i)) for i in range(len(prices))]
    counts = best_counts(prices, [gains for gains, _ in classes], budget)
    kept = np.zeros(len(costs), np.int64)
    for count, (_, owner) in zip(counts, classes, strict=True):
        kept += np.bincount(owner[:count], minlength=len(costs))
    return kept


def _merged(worth: Sequence[Numbers], modules: Kept) -> tuple[Numbers, Kept]:
    """Sort the steps of some modules, but for those below 0: worth and module of each."""
    owner = np.repeat(modules, [len(worth[i]) for i in modules])
    gains = np.concatenate([worth[i] for i in modules])
    order = np.argsort(-gains, kind="stable")
    order = order[gains[order] >= 0]
    return gains[order], owner[order]


def best_counts(costs: Numbers, worth: Sequence[Numbers], budget: float) -> Kept:
    """Say how many steps of every class stay, so that the sum of their worth is the highest.

    Args:
        costs: (classes,) of a step, above 0.
        worth: of every class (steps,): never rising, never below 0.
        budget: 0 or more.

    Returns:
        (classes,) counts, to which no step can be added.
    """
    order = sorted(range(len(costs)), key=lambda i: len(worth[i]))  # the last is not tried out
    found = _Search(costs[order], [worth[i] for i in order]).best(budget)
    counts = np.zeros(len(costs), np.int64)
    counts[order] = found
    room = budget - float(counts @ costs)
    for i, cost in enumerate(costs):  # steps of worth 0, or as good as that
        more = min(int(max(room, 0.0) // cost), len(worth[i]) - int(counts[i]))
        counts[i] += more
        room -= more * cost
    return counts


@dataclass(frozen=True)
class _Tried:
    """Counts of the first classes, many at once, the most promising first.

    Attributes:
        counts: (n, classes so far).
        worth: (n,) of these steps together.
        room: (n,) of the budget that is left.
        reach: (n,) what the sum cannot exceed, whatever the other classes keep.
    """

    counts: Kept
    worth: Numbers
    room: Numbers
    reach: Numbers

    def __getitem__(self, rows: slice) -> "_Tried":
        return _Tried(self.counts[rows], self.worth[rows], self.room[rows], self.reach[rows])


class _Search:
    """Branch and bound over the counts of all classes but the last, which takes what fits.

    The bound is what the other classes would add if a step could be kept in part: the best for its
    cost first.
    """

    def __init__(self, costs: Numbers, worth: Sequence[Numbers]) -> None:
        self.costs = costs
        self.sums = [np.concatenate([[0.0], np.cumsum(one)]) for one in worth]
        self.bounds = [_in_parts(costs[i:], worth[i:]) for i in range(1, len(costs))]
        self.found, self.highest = np.zeros(len(costs), np.int64), 0.0
        self._rounds = 0

    def best(self, budget: float) -> Kept:
        """Return the counts with the highest sum."""
        none = np.zeros((1, 0), np.int64)
        stack = [_Tried(none, np.zeros(1), np.array([float(budget)]), np.array([np.inf]))]
        while stack:
            tried = stack.pop()
            level = tried.counts.shape[1]
            tried = tried[: int((tried.reach > self._enough()).sum())]
            if level == len(self.costs) - 1:
                self._finish(tried)
            elif len(tried.reach):
                first = max(1, CELLS // len(self.sums[level]))
                stack += [tried[first:], self._branch(tried[:first])]
        return self.found

    def _enough(self) -> float:
        """Say what is no better than the highest sum so far."""
        return self.highest * (1 + ROUNDING * 2 ** (max(0, self._rounds - ROUNDS) / DOUBLING))

    def _branch(self, tried: _Tried) -> _Tried:
        """Try every count of the next class, and leave out what cannot be the best."""
        self._rounds += 1
        level = tried.counts.shape[1]
        room = tried.room[:, None] - self.costs[level] * np.arange(len(self.sums[level]))
        worth = tried.worth[:, None] + self.sums[level]
        reach = worth + np.interp(room, *self.bounds[level])
        rows, counts = np.nonzero((room >= 0) & (reach > self._enough()))
        order = np.argsort(-reach[rows, counts], kind="stable")
        rows, counts = rows[order], counts[order]
        found = np.column_stack([tried.counts[rows], counts])
        return _Tried(found, worth[rows, counts], room[rows, counts], reach[rows, counts])

    def _finish(self, tried: _Tried) -> None:
        """Keep of the last class what fits, and remember the best."""
        if not len(tried.reach):
            return
        counts = np.minimum(tried.room // self.costs[-1], len(self.sums[-1]) - 1).astype(np.int64)
        worth = tried.worth + self.sums[-1][counts]
        best = int(worth.argmax())
        if worth[best] > self._enough():
            self.highest = float(worth[best])
            self.found = np.append(tried.counts[best], counts[best])


def _in_parts(costs: Numbers, worth: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Say what a budget is worth if a step may be kept in part: corners of a concave line."""
    spent = np.repeat(costs, [len(one) for one in worth])
    gains = np.concatenate(worth)
    order = np.argsort(-gains / spent, kind="stable")
    corners = [np.concatenate([[0.0], np.cumsum(one[order])]) for one in (spent, gains)]
    return corners[0], corners[1]
