"""Sizes: exact costs of units, nothing over the size, nothing left that would fit."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from composable import families, ranking
from composable.errors import ConfigError, MismatchError, ShapeError, UserError
from composable.formats.config import ALLOCATIONS, METRICS
from composable.formats.scores import Origin, Scores, TextsRead, UnitImportance
from composable.models import cost
from composable.models.checkpoint import Checkpoint
from composable.models.structure import Edit
from composable.models.surgery import apply_structure, units_to_remove
from composable.ranking.sizes import Allocator, best_allocation, falling
from composable.variants.planned_costs import planned_costs
from tests import tiny

LENGTHS = {"encoder": 7.25, "decoder": 5.5}


def units_of(dense: Checkpoint, whole_groups: bool = False) -> list[Any]:
    found = dense.family.modules(dense.model)
    return [
        dataclasses.replace(module, whole_groups=whole_groups)
        for module in found
        if module.kind in ("attention", "ffn")
    ]


def some(module: Any, steps: int) -> tuple[int, ...]:
    """The last units of a module, so many steps of them, written out without the package."""
    if module.kind == "ffn" or module.groups == module.units:
        return tuple(range(module.units - steps, module.units))
    size = module.units // module.groups
    if module.whole_groups:
        return tuple(range(module.units - steps * size, module.units))
    return tuple(g * size + h for g in range(module.groups) for h in range(size - steps, size))


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("layout", tiny.ALL)
def test_costs_of_steps_are_those_of_the_cut_model(layout: str, whole_groups: bool) -> None:
    dense = tiny.dense(layout)
    modules = units_of(dense, whole_groups)
    draw = random.Random(layout)
    kept = {module.name: draw.randint(1, module.steps) for module in modules}
    before = {m: cost.total(dense.model, dense.family, m, LENGTHS) for m in METRICS}
    saved = {
        metric: sum(
            (one.steps - kept[one.name]) * cost.step_cost(dense.model, one, metric, LENGTHS)
            for one in modules
        )
        for metric in METRICS
    }
    edits = tuple(Edit(one.name, "keep", some(one, kept[one.name])) for one in modules)
    apply_structure(dense.model, dense.family, edits)
    left = {m: cost.total(dense.model, dense.family, m, LENGTHS) for m in METRICS}
    for metric in METRICS:
        assert left[metric] == pytest.approx(before[metric] - saved[metric], rel=1e-12)
    assert left["parameters"] == sum(p.numel() for p in dense.model.parameters())
    assert left["parameters"] - left["layer-parameters"] == (
        before["parameters"] - before["layer-parameters"]
    )
    with torch.no_grad():
        dense.model(**tiny.inputs(dense))  # it runs


def test_layer_parameters_are_all_that_lie_in_layers() -> None:
    dense = tiny.dense("bert")
    inside = [p.numel() for n, p in dense.model.named_parameters() if ".layer." in n]
    assert cost.total(dense.model, dense.family, "layer-parameters") == sum(inside)


def test_share_of_the_ffns_of_bert_base() -> None:
    """The check value of Kwon et al. 2022's accounting, at QQP's mean length."""
    with torch.device("meta"):
        model = BertModel(BertConfig())
    family = families.of(model)
    lengths = {"encoder": 30.55}
    total = cost.total(model, family, "macs", lengths)
    ffns = [module for module in family.modules(model) if module.kind == "ffn"]
    macs = sum(one.steps * cost.step_cost(model, one, "macs", lengths) for one in ffns)
    assert macs / total == pytest.approx(0.66228, abs=5e-6)


# --- allocation ----------------------------------------------------------------------------------


def scores_of(
    dense: Checkpoint, seed: int | None = 0, gqa: str = "per-group", lengths: Any = None
) -> Scores:
    """Tables as the ranker stat writes them: random errors that fall; with no seed equal ones."""
    generator = np.random.default_rng(seed)
    units = {}
    for module in units_of(dense, gqa == "whole-groups"):
        values = np.linspace(9, 1, module.steps) if seed is None else generator.random(module.steps)
        errors = np.sort(values * (100 if module.kind == "ffn" else 1))[::-1]
        if module.kind == "ffn":
            order = generator.permutation(module.units)
            place = np.argsort(order)
            left = np.append(errors[1:], 0.0)[place]
            units[module.name] = UnitImportance(-place.astype(float), {"left": left})
        else:
            by_head = np.repeat(errors, module.units // module.steps)
            order = generator.permutation(module.units)
            units[module.name] = UnitImportance(by_head[order], {"error": by_head[order]})
    texts = TextsRead("texts", "ab" * 32, 4, lengths or {"encoder": 29, "decoder": 22})
    return Scores(Origin("stat", {"gqa": gqa}, "", "", [], texts), units)


def importances(
    dense: Checkpoint, seed: int, gqa: str = "per-group", has_ties: bool = False, method: str = "l1"
) -> Scores:
    """Random importances of all units, some of them equal, measured on texts."""
    draw = np.random.default_rng(seed)
    units = {}
    for one in units_of(dense):
        values = draw.exponential(size=one.units)
        units[one.name] = UnitImportance(np.floor(2 * values) if has_ties else values)
    texts = TextsRead("texts", "ab" * 32, 4, {"encoder": 29, "decoder": 22})
    return Scores(Origin(method, {"gqa": gqa}, "", "", [], texts), units)


def kept_by(configuration: Any, modules: list[Any]) -> dict[str, int]:
    return {
        one.name: one.steps - units_to_remove(one.steps, configuration[one.name].rate)
        for one in modules
    }


@settings(max_examples=50, deadline=None)
@given(
    layout=st.sampled_from(["t5", "bert", "opt", "gpt2", "llama_gqa", "qwen2"]),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 5),
    gqa=st.sampled_from(["per-group", "whole-groups"]),
    size=st.floats(0.0, 1.0),
    allocation=st.sampled_from(ALLOCATIONS),
    grid=st.sampled_from([0, 6, 16, 20]),
)
def test_never_over_and_nothing_left_that_fits(
    layout: str, metric: str, seed: int, gqa: str, size: float, allocation: str, grid: int
) -> None:
    """Of 48 neurons 20 widths are every third number of them: a 20th is no whole one."""
    dense = DENSE.setdefault(layout, tiny.dense(layout))
    scores = {
        "uniform": None,
        "stat": scores_of(dense, seed, gqa),
        "global": importances(dense, seed, gqa),
    }[allocation]
    made = Allocator(dense, metric, allocation, scores, gqa, grid)
    modules = units_of(dense, gqa == "whole-groups")
    total = cost.total(dense.model, dense.family, metric, made.lengths)
    width = {0: 1, 6: 8, 16: 3, 20: 3}[grid]
    widths = {one.name: width if one.kind == "ffn" else 1 for one in modules}
    steps = {
        one.name: widths[one.name] * cost.step_cost(dense.model, one, metric, made.lengths)
        for one in modules
    }
    try:
        configuration = made.configuration(size)
    except ConfigError:
        floor = total - sum(
            (one.steps // widths[one.name] - 1) * steps[one.name] for one in modules
        )
        assert size * total < floor + 1e-4 * total
        return
    found = planned_costs(dense, configuration, made.lengths, gqa == "whole-groups")
    left = size * total - found[metric.replace("-", "_")]
    assert left >= -1e-9 * total
    kept = kept_by(configuration, modules)
    assert all(count >= widths[name] for name, count in kept.items())
    assert all(count % widths[name] == 0 for name, count in kept.items())
    open_modules = [one for one in modules if kept[one.name] < one.steps]
    assert all(steps[one.name] > left for one in open_modules)
    for one in modules:
        assert configuration[one.name].rate == (one.steps - kept[one.name]) / one.steps


DENSE: dict[str, Checkpoint] = {}


def evenly(dense: Checkpoint) -> Scores:
    """Errors that, relative to what the stack has written, are equal in all layers.

    Every module writes as much as all before it.
    """
    scores, written = scores_of(dense, None), 0.0
    for one in units_of(dense):
        (values,) = scores.units[one.name].components.values()
        curve, square = (values / values.max()) ** 2, written or 1.0
        written += square
        if one.kind == "attention":  # without any head it loses all, which is not at stake
            values[:] = np.sqrt(np.where(curve == 1, square, 0.4 * written * curve))
        else:
            values[:] = np.sqrt(square * curve)
    return scores


@pytest.mark.parametrize("size", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("allocation", ["uniform", "stat"])
def test_equal_errors_are_shared_evenly(allocation: str, size: float) -> None:
    dense = tiny.dense("bert", num_hidden_layers=5)
    scores = evenly(dense) if allocation == "stat" else None
    configuration = Allocator(dense, "macs", allocation, scores).configuration(size)
    kept = kept_by(configuration, units_of(dense))
    for end in ("attention", "ffn"):
        counts = [count for name, count in kept.items() if name.endswith(end)]
        is_exact = (allocation, end) == ("uniform", "attention")
        assert max(counts) - min(counts) <= (0 if is_exact else 1)
    assert Allocator(dense, "macs", allocation, scores).configuration(size) == configuration


def test_errors_are_relative_to_what_the_stack_has_written() -> None:
    """Squares 9, 16, 144 and 200 one after the other; a second stack begins anew."""
    for layout, before in (("llama", 0), ("t5", 4)):
        dense = tiny.dense(layout, **({"num_hidden_layers": 2} if layout == "llama" else {}))
        scores = scores_of(dense, 1)
        names = [one.name for one in units_of(dense)][before : before + 4]
        for name, norm in zip(names, (3, 4, 12, np.sqrt(200)), strict=True):
            (values,) = scores.units[name].components.values()
            values *= norm / values.max()
        made = Allocator(dense, "macs", "stat", scores)
        assert made._written()[before : before + 4] == pytest.approx([9, 25, 169, 369])


def test_uniform_keeps_the_heads_closest_to_the_size() -> None:
    """4 heads: 0.6 is closest to 2 of them; 0.3 to 1; and 0.9 to all, which the neurons pay."""
    dense = tiny.dense("bert")
    attentions = [one for one in units_of(dense) if one.kind == "attention"]
    for size, heads in ((0.3, 1), (0.6, 2), (0.7, 3), (0.9, 4), (1.0, 4)):
        made = Allocator(dense, "layer-parameters").configuration(size)
        assert set(kept_by(made, attentions).values()) == {heads}


def test_uniform_keeps_fewer_heads_where_neurons_need_the_room() -> None:
    """2 of 4 heads are closest to 0.38, but cost more than that: an ffn costs as one wide head."""
    dense = tiny.dense("llama", head_dim=64, intermediate_size=94)
    kept = kept_by(Allocator(dense, "layer-parameters").configuration(0.38), units_of(dense))
    assert set(list(kept.values())[::2]) == {1}
    assert min(list(kept.values())[1::2]) > 47


def test_single_heads_go_where_there_are_too_few_neurons_for_the_rest() -> None:
    """One of 4 heads everywhere and all 2 neurons leave room, but not for a head in every layer."""
    dense = tiny.dense("bert", intermediate_size=2)
    modules = units_of(dense)
    kept = kept_by(Allocator(dense, "macs").configuration(0.35), modules)
    assert sorted(kept[one.name] for one in modules if one.kind == "attention") == [1, 1, 2]
    assert {kept[one.name] for one in modules if one.kind == "ffn"} == {2}


def least_error(modules: list[tuple[float, dict[int, float]]], budget: float) -> float:
    """The least sum of errors within a budget, by trying all numbers of steps."""
    best = {0.0: 0.0}  # cost -> error
    for each, errors in modules:
        found: dict[float, float] = {}
        for spent, error in best.items():
            for kept, one in errors.items():
                total = spent + kept * each
                found[total] = min(found.get(total, np.inf), error + one)
        best = {spent: error for spent, error in found.items() if spent <= budget}
    return min(best.values())


@pytest.mark.parametrize(("seed", "grid", "first"), [(0, 0, 1), (1, 0, 1), (2, 0, 1), (0, 4, 3)])
def test_stat_is_as_good_as_trying_all(seed: int, grid: int, first: int) -> None:
    """Where errors fall ever slower it is the best there is, but for one step that does not fit.

    A fourth of 7 neurons is 2 of them, and one more stays.
    """
    dense = tiny.dense("bert", num_hidden_layers=2, intermediate_size=7)
    modules, generator = units_of(dense), np.random.default_rng(seed)
    tables: list[tuple[float, Any]] = []  # cost of a unit, error with so many
    units, fixed = {}, cost.total(dense.model, dense.family, "parameters")
    for one in modules:
        gains = np.sort(generator.random(one.steps))[::-1]
        left = np.sqrt(np.append(np.cumsum(gains[::-1])[::-1], 0.0))  # of 0, 1, ... steps
        found = {"left": left[1:]} if one.kind == "ffn" else {"error": left[:-1]}
        units[one.name] = UnitImportance(-np.arange(one.steps, dtype=float), found)
        able = range(first, 8, 2) if grid and one.kind == "ffn" else range(1, one.steps + 1)
        errors = {kept: left[kept] for kept in able}
        tables.append((cost.step_cost(dense.model, one, "parameters"), errors))
        fixed -= one.steps * tables[-1][0]
    scores = Scores(Origin("stat", {}, "", "", []), units)
    size, made = 0.6, Allocator(dense, "parameters", "stat", scores, grid=grid)
    kept = kept_by(made.configuration(size), modules).values()
    tables = [
        (each, {kept: left**2 / written for kept, left in errors.items()})
        for (each, errors), written in zip(tables, made._written(), strict=True)
    ]
    rows = list(zip(kept, tables, strict=True))
    reached = sum(errors[k] for k, (_, errors) in rows)
    more = [(errors[k], [v for n, v in errors.items() if n > k]) for k, (_, errors) in rows]
    missed = max(now - others[0] for now, others in more if others)
    budget = size * cost.total(dense.model, dense.family, "parameters") - fixed
    best = least_error(tables, budget)
    assert best - 1e-9 <= reached <= best + missed


def test_falling_is_the_isotonic_fit() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    values = np.random.default_rng(0).normal(size=50)
    expected = optimize.isotonic_regression(values, increasing=False).x
    assert np.allclose(falling(values), expected)
    assert falling(np.array([])).shape == (0,)


def test_grouped_queries_read_one_error_of_every_step() -> None:
    """Two groups of four heads: the second step is worth 9 - 4, whichever heads it has."""
    dense = tiny.dense("llama_gqa", num_hidden_layers=1)
    scores = scores_of(dense)
    attention = next(one for one in units_of(dense) if one.kind == "attention")
    errors = np.array([5.0, 5, 3, 3, 2, 2, 1, 1])
    scores.units[attention.name].components["error"][:] = errors
    made = Allocator(dense, "macs", "stat", scores)
    place = [one.name for one in made.modules].index(attention.name)
    assert made._measured is not None
    assert made._measured[place].tolist() == [5, 3, 2, 1, 0]


@pytest.mark.parametrize("allocation", ["uniform", "stat"])
def test_heads_leave_as_the_scores_were_measured(allocation: str) -> None:
    dense = tiny.dense("llama_gqa")
    scores = scores_of(dense, 1, "whole-groups")
    assert Allocator(dense, "macs", allocation, scores).whole_groups
    assert not Allocator(dense, "macs", "uniform", scores, "per-group").whole_groups


BAD = [
    ({"allocation": "stat"}, None, UserError, "needs scores, a file of rank_importance.py"),
    ({"allocation": "stat"}, "l1", UserError, 'of l1\\) hold no "error" of'),
    ({"allocation": "stat", "gqa": "whole-groups"}, "stat", MismatchError, "gqa is whole-groups"),
    ({"allocation": "global"}, None, UserError, "global needs scores, a file of rank_importance"),
    ({"allocation": "global"}, "stat", UserError, "of stat compare only .* the allocation stat"),
    ({"allocation": "global"}, "random", UserError, "of random compare .* such as trajectory"),
    ({"allocation": "best"}, None, ConfigError, "best: unknown; known are uniform, stat, global"),
    ({"grid": -1}, None, ConfigError, "grid -1: expected a number of widths"),
]


@pytest.mark.parametrize(("options", "method", "error", "message"), BAD)
def test_what_is_missing(options: Any, method: str | None, error: Any, message: str) -> None:
    dense = tiny.dense("llama_gqa")
    scores = scores_of(dense) if method else None
    if method in ("l1", "random") and scores:
        units = {name: UnitImportance(one.importance) for name, one in scores.units.items()}
        scores = Scores(Origin(method, {}, "", "", []), units)
    with pytest.raises(error, match=message):
        Allocator(dense, scores=scores, **options)


@pytest.mark.parametrize("size", [0, -0.5, 1.01, float("nan"), float("inf"), 0.01])
def test_impossible_sizes_name_the_smallest(size: float) -> None:
    made = Allocator(tiny.dense("bert"), "macs")
    with pytest.raises(
        ConfigError, match=r"expected 0\.\d+ to 1, the fraction of the macs"
    ) as caught:
        made.configuration(size)
    smallest = float(str(caught.value).split("expected ")[1].split()[0])
    configuration = made.configuration(smallest)
    modules = units_of(tiny.dense("bert"))
    assert sorted(kept_by(configuration, modules).values())[:-1] == [1] * (len(modules) - 1)


def test_importances_of_other_units_are_refused() -> None:
    dense = tiny.dense("bert")
    scores = importances(tiny.dense("bert", intermediate_size=40), 0)
    with pytest.raises(ShapeError, match=r"are of shape \(40,\), it has 48 units; measure this"):
        Allocator(dense, "macs", "global", scores)
    units = {name: one for name, one in scores.units.items() if name.endswith("attention")}
    with pytest.raises(UserError, match="hold no importance of the units of"):
        Allocator(dense, "macs", "global", Scores(scores.origin, units))


def test_the_allocation_is_what_scores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By texts and on one scale: global; by weights alone, or of nothing known: uniform."""
    dense = tiny.dense("bert")
    known = dataclasses.replace(ranking.by_name("l1"), name="by_texts", reads_texts=True)
    monkeypatch.setattr(ranking, "RANKERS", (*ranking.RANKERS, known))
    assert best_allocation(None) == "uniform"
    assert best_allocation(scores_of(dense)) == "stat"
    for method in ("l1", "random", "of_nobody"):
        assert best_allocation(importances(dense, 0, method=method)) == "uniform"
    assert best_allocation(importances(dense, 0, method="by_texts")) == "global"
    assert best_allocation(Scores(importances(dense, 0, method="by_texts").origin)) == "uniform"
    made = Allocator(dense, scores=importances(dense, 0, method="by_texts"))
    assert (made.allocation, made.grid) == ("global", 16)
    made = Allocator(dense, scores=scores_of(dense))
    assert (made.allocation, made.grid) == ("stat", 0)


def test_scores_that_would_not_be_looked_at() -> None:
    dense = tiny.dense("bert")
    scores = importances(dense, 0)
    origin = dataclasses.replace(scores.origin, texts=None)  # type: ignore[type-var]
    for method, more in (("l1", ", or choose the allocation global"), ("random", "")):
        found = Scores(dataclasses.replace(origin, method=method), scores.units)
        with pytest.raises(ConfigError, match=f"looks at nothing .* leave them out{more}\\."):
            Allocator(dense, scores=found)
    assert Allocator(dense, "macs", "global", Scores(origin, scores.units)).lengths["encoder"] == 32


def test_nothing_can_leave() -> None:
    dense = tiny.dense("bert", num_attention_heads=1, intermediate_size=1)
    with pytest.raises(ConfigError, match="no second head or neuron anywhere"):
        Allocator(dense)
    with pytest.raises(ConfigError, match="no second head or step of the grid anywhere"):
        Allocator(tiny.dense("bert", num_attention_heads=1), grid=1)
