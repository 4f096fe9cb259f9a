"""What stays within a budget: the highest sum there is, by trying everything; and in an order."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composable.ranking import budget as search
from composable.ranking.budget import Queue, best_counts, keep_most

#: Modules: the cost of a step and the worth of each, with many ties, and some below 0.
MODULES = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 2, 3, 7]),
        st.lists(st.integers(-1, 4) | st.floats(-1, 4, width=16), max_size=10).map(
            lambda values: sorted(values, reverse=True)
        ),
    ),
    min_size=1,
    max_size=6,
)


def highest(modules: Sequence[tuple[int, Sequence[float]]], budget: float) -> float:
    """The highest sum within a budget: every number of steps of every module, one by one."""
    best = {0: 0.0}  # cost -> sum
    for cost, worth in modules:
        found: dict[int, float] = {}
        for spent, total in best.items():
            for count in range(len(worth) + 1):
                here = spent + count * cost
                found[here] = max(found.get(here, -np.inf), total + sum(worth[:count]))
        best = {spent: total for spent, total in found.items() if spent <= budget}
    return max(best.values())


def kept_of(modules: Sequence[tuple[int, Sequence[float]]], budget: float) -> list[int]:
    costs, worth = [cost for cost, _ in modules], [np.array(one, float) for _, one in modules]
    return keep_most(costs, worth, budget).tolist()


@settings(max_examples=200, deadline=None)
@given(modules=MODULES, share=st.floats(0, 1), cells=st.sampled_from([1, 7, 1 << 18]))
def test_nothing_has_a_higher_sum(modules: Any, share: float, cells: int) -> None:
    budget = share * sum(cost * len(worth) for cost, worth in modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CELLS", cells)
        kept = kept_of(modules, budget)
    rows = list(zip(modules, kept, strict=True))
    left = budget - sum(cost * count for (cost, _), count in rows)
    assert left >= 0
    total = sum(sum(worth[:count]) for (_, worth), count in rows)
    assert total == pytest.approx(highest(modules, budget), rel=1e-9, abs=1e-9)
    for (cost, worth), count in rows:  # no step that does no harm is left out
        assert count == len(worth) or cost > left or worth[count] < 0
    for price in {cost for cost, _ in modules}:  # of equal cost the best, of equal worth the first
        ranked = sorted(
            (-value, place, step)
            for place, (cost, worth) in enumerate(modules)
            if cost == price
            for step, value in enumerate(worth)
        )
        count = sum(n for (cost, _), n in rows if cost == price)
        places = [place for _, place, _ in ranked[:count]]
        expected = [
            places.count(i) if cost == price else n for i, ((cost, _), n) in enumerate(rows)
        ]
        assert kept == expected


def test_heads_and_neurons_one_by_one() -> None:
    """All sets of 6 heads and 8 neurons, none of which has a higher sum."""
    generator = np.random.default_rng(0)
    heads = -np.sort(-generator.exponential(3, 6))
    neurons = -np.sort(-generator.exponential(1, 8))
    chosen = np.array(list(itertools.product([0, 1], repeat=14)))
    spent, sums = chosen @ ([7] * 6 + [1] * 8), chosen @ np.concatenate([heads, neurons])
    for budget in range(51):
        kept = kept_of([(7, heads.tolist()), (1, neurons.tolist())], budget)
        found = heads[: kept[0]].sum() + neurons[: kept[1]].sum()
        assert found == pytest.approx(sums[spent <= budget].max())


@pytest.mark.parametrize("cells", [1, 1 << 14])
def test_budgets_that_many_counts_nearly_fill(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All counts of four classes, of sums that lie close together and costs without a measure."""
    monkeypatch.setattr(search, "CELLS", cells)
    generator = np.random.default_rng(2)
    costs = np.array([9.1, 8.3, 5.7, 1.03])
    worth = [
        -np.sort(-cost * (3 + generator.random(n)))
        for n, cost in zip((6, 6, 8, 12), costs, strict=True)
    ]
    counts = np.indices([len(one) + 1 for one in worth]).reshape(4, -1)
    tables = [np.concatenate([[0.0], np.cumsum(one)]) for one in worth]
    sums = sum(table[count] for table, count in zip(tables, counts, strict=True))
    for budget in np.linspace(1, float(costs @ [6, 6, 8, 12]), 60):
        found = best_counts(costs, worth, float(budget))
        reached = sum(table[count] for table, count in zip(tables, found, strict=True))
        assert reached == pytest.approx(sums[costs @ counts <= budget].max(), rel=1e-12)


def test_a_larger_budget_never_has_a_smaller_sum() -> None:
    """Five classes, as an encoder-decoder has, at budgets down to less than one step."""
    generator = np.random.default_rng(1)
    costs = [90.5, 81.25, 70.0, 1.5, 1.25]
    worth = [-np.sort(-generator.exponential(size=n)) for n in (12, 12, 12, 300, 300)]
    total = sum(cost * len(one) for cost, one in zip(costs, worth, strict=True))
    sums = []
    for size in np.linspace(0, 1, 101):
        kept = keep_most(costs, worth, size * total)
        assert kept @ costs <= size * total * (1 + 1e-12)
        sums.append(sum(one[:n].sum() for one, n in zip(worth, kept, strict=True)))
    assert sums[0] == 0
    assert sums[-1] == pytest.approx(sum(one.sum() for one in worth))
    assert all(small <= large + 1e-9 for small, large in itertools.pairwise(sums))


def test_what_is_worth_nothing_fills_the_budget() -> None:
    assert kept_of([(2, [3.0, 0.0, 0.0, -1.0]), (1, [0.0, -2.0])], 7) == [3, 1]
    assert kept_of([(2, [-1.0, -1.0])], 4) == [0]
    assert kept_of([(2, []), (3, [1.0])], 5) == [0, 1]


def test_steps_that_are_all_worth_their_cost_are_found_at_once() -> None:
    """No bound tells such counts apart: what is looked at must not grow without end."""
    costs = np.array([97.0, 89.0, 83.0, 1.5, 1.25])
    worth = [np.full(n, cost) for n, cost in zip((48, 48, 48, 12288, 12288), costs, strict=True)]
    budget = 0.5 * sum(one.sum() for one in worth)
    assert best_counts(costs, worth, budget) @ costs == pytest.approx(budget, abs=1)


def test_a_cheaper_unit_takes_what_a_dearer_one_leaves() -> None:
    queue = Queue([5.0, 2.0], [np.array([9.0, 8.0]), np.array([1.0, 1.0, 1.0])])
    assert queue.fill(7.0).tolist() == [1, 1]
    assert queue.fill(11.0).tolist() == [1, 3]
    assert queue.fill(16.5).tolist() == [2, 3]
    assert queue.fill(99.0).tolist() == [3, 4]


def test_a_search_ends_where_worth_is_in_proportion_to_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every set of steps that fills the budget is as good as any other, and none fills it."""
    monkeypatch.setattr(search, "ROUNDS", 32)
    costs, counts = [152123.5, 1024.25, 151987.5, 133569.75, 993.5], [96, 24576, 96, 96, 24576]
    worth = [np.full(count, cost) for cost, count in zip(costs, counts, strict=True)]
    rounds: list[int] = []
    branch = search._Search._branch

    def counted(self: Any, tried: Any) -> Any:
        rounds.append(1)
        assert len(rounds) < 1000
        return branch(self, tried)

    monkeypatch.setattr(search._Search, "_branch", counted)
    budget = 0.4321 * float(np.dot(costs, counts))
    spent = float(keep_most(costs, worth, budget) @ costs)
    assert budget * (1 - 1e-3) < spent <= budget
