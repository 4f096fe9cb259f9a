"""The allocation global, and grids: the highest sum of importances, and the units that are it."""

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from composable.families import Module
from composable.formats.config import ALLOCATIONS, Entry, scheme_of
from composable.formats.scores import Scores, TextsRead
from composable.methods.base import keep_best
from composable.models import cost
from composable.ranking.sizes import Allocator, Steps
from composable.variants.compose import compose
from composable.variants.planned_costs import planned_costs
from composable.variants.pruning import Sources, make_variants
from tests import tiny
from tests.unit.ranking.test_sizes import DENSE, importances, kept_by, scores_of, units_of


def rows_of(module: Any, values: Any, grid: int = 0) -> list[list[int]]:
    """The units of every step, the best first: written out without the package.

    Of equal units the lower index goes first. The first step takes what the grid leaves over.
    """
    order = sorted(range(module.units), key=lambda u: (values[u], u), reverse=True)
    if module.kind == "ffn":
        width = -(-module.units // grid) if grid else 1
        first = width + module.units % width
        return [order[:first], *(order[i : i + width] for i in range(first, len(order), width))]
    size = module.units // module.groups
    if module.whole_groups or size == 1:
        sums = values.reshape(module.groups, -1).sum(1)
        groups = sorted(range(module.groups), key=lambda g: (sums[g], g), reverse=True)
        return [list(range(g * size, g * size + size)) for g in groups]
    in_group = [[u for u in order if u // size == g] for g in range(module.groups)]
    return [[ranked[i] for ranked in in_group] for i in range(size)]


def masks_of(
    modules: list[Any], scores: Scores, counts: dict[Any, int], grid: int
) -> dict[str, set[int]]:
    """The units that stay where those of all modules of a kind are one list, best first.

    Of equal steps of several modules the later module's goes first.
    """
    steps, kept = [], {}
    for place, one in enumerate(modules):
        values = scores.units[one.name].importance
        rows = rows_of(one, values, grid)
        kept[one.name] = set(rows[0])
        key = (one.kind, one.stack, one.is_cross)
        steps += [(-values[row].sum(), place, i, key, row) for i, row in enumerate(rows) if i]
    for key, count in counts.items():
        for _, place, _, _, row in sorted(step for step in steps if step[3] == key)[:count]:
            kept[modules[place].name] |= set(row)
    return kept


@settings(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from(["t5", "bert", "llama_gqa"]),
    gqa=st.sampled_from(["per-group", "whole-groups"]),
    seed=st.integers(0, 10**6),
    has_ties=st.booleans(),
    size=st.floats(0.35, 1.0),
    grid=st.sampled_from([0, 16]),
)
def test_rates_are_the_mask_that_was_found(
    layout: str, gqa: str, seed: int, has_ties: bool, size: float, grid: int
) -> None:
    """Through conf.json, the scheme and the method ranked: the same units stay."""
    dense = DENSE.setdefault(layout, tiny.dense(layout))
    scores = importances(dense, seed, gqa, has_ties)
    made = Allocator(dense, "macs", "global", scores, gqa, grid)
    written = {name: e.to_json() for name, e in made.configuration(size).items()}
    read = {name: Entry.parse(json.loads(json.dumps(one)), "") for name, one in written.items()}
    modules, width = units_of(dense, gqa == "whole-groups"), 3 if grid else 1
    counts: dict[Any, int] = {}
    for one, count in zip(modules, kept_by(read, modules).values(), strict=True):
        key, own = (one.kind, one.stack, one.is_cross), width if one.kind == "ffn" else 1
        counts[key] = counts.get(key, 0) + count // own - 1
    sources = Sources(scores=lambda name: torch.from_numpy(scores.importance(name)))
    scheme, *_ = scheme_of([read])
    chosen = {"attention": "ranked", "ffn": "ranked"}
    found = {
        variant.module: set(variant.kept_units or ())
        for variant in make_variants(dense, scheme, chosen, sources, gqa == "whole-groups")
    }
    expected = masks_of(modules, scores, counts, grid)
    assert {one.name: found.get(one.name, {*range(one.units)}) for one in modules} == expected


@pytest.mark.parametrize("layout", ["t5", "llama_gqa"])
def test_a_larger_size_never_has_a_smaller_sum(layout: str) -> None:
    dense = DENSE.setdefault(layout, tiny.dense(layout))
    scores = importances(dense, 0)
    for grid in (0, 16):
        made, sums = Allocator(dense, "macs", "global", scores, grid=grid), []
        for size in np.linspace(0.3, 1.0, 36):
            configuration = made.configuration(float(size))
            total = 0.0
            for one in units_of(dense):
                values = torch.from_numpy(scores.importance(one.name))
                kept = keep_best(values, one, configuration[one.name].rate).kept_units
                total += float(values[kept].sum())
            sums.append(total)
        assert all(small <= large + 1e-9 for small, large in itertools.pairwise(sums))
        assert sums[-1] == pytest.approx(sum(u.importance.sum() for u in scores.units.values()))


@pytest.mark.parametrize(
    ("layout", "gqa", "grid"),
    [("bert", None, 0), ("bert", None, 4), ("llama_gqa", "per-group", 0),
     ("llama_gqa", "whole-groups", 4)],
)  # fmt: skip
def test_no_choice_of_steps_has_a_higher_sum(layout: str, gqa: str | None, grid: int) -> None:
    """All numbers of steps are tried; a 4th of 10 neurons is 3 of them, and one more stays."""
    changes: dict[str, Any] = {"num_key_value_heads": 4} if gqa else {}
    dense = tiny.dense(layout, num_hidden_layers=2, intermediate_size=10, **changes)
    modules = units_of(dense, gqa == "whole-groups")
    scores = importances(dense, 5, gqa or "per-group")
    made = Allocator(dense, "macs", "global", scores, gqa, grid)
    tables, fixed = [], cost.total(dense.model, dense.family, "macs", made.lengths)
    for one in modules:
        values = scores.importance(one.name)
        rows = rows_of(one, values, grid)
        steps = np.cumsum([len(row) * one.steps // one.units for row in rows])
        each = cost.step_cost(dense.model, one, "macs", made.lengths)
        tables.append(
            (steps.tolist(), steps * each, np.cumsum([values[row].sum() for row in rows]))
        )
        fixed -= one.steps * each
    places = np.indices([len(steps) for steps, _, _ in tables]).reshape(len(tables), -1)
    columns = list(zip(tables, places, strict=True))
    spent = fixed + sum(costs[chosen] for (_, costs, _), chosen in columns)
    sums = sum(worth[chosen] for (_, _, worth), chosen in columns)
    for size in np.linspace(spent.min() / spent.max() + 1e-9, 1.0, 12):
        kept = kept_by(made.configuration(float(size)), modules).values()
        rows = zip(tables, kept, strict=True)
        reached = sum(worth[steps.index(count)] for (steps, _, worth), count in rows)
        assert reached == pytest.approx(sums[spent <= size * spent.max()].max())


def test_steps_of_a_grid() -> None:
    """Of ten neurons one always stays, and they leave by three."""
    steps = Steps(Module("ffn", "ffn", "encoder", units=10), 3, 1.0)
    values = np.arange(1.0, 11.0)
    assert (steps.count, [steps.rate(kept) for kept in (1, 2, 3)]) == (3, [0.6, 0.3, 0.0])
    assert steps.after_each(values).tolist() == [4, 7, 10]
    assert steps.sums(values).tolist() == [2 + 3 + 4, 5 + 6 + 7, 8 + 9 + 10]


def test_units_of_all_modules_are_weighed_against_each_other() -> None:
    """The heads of one layer matter most, the neurons of another least: they are what goes."""
    dense = tiny.dense("bert")
    scores = importances(dense, 0)
    scores.units["bert.encoder.layer.1.attention"].importance[:] = 1e6
    scores.units["bert.encoder.layer.2.ffn"].importance[:] *= 1e-6
    kept = kept_by(Allocator(dense, "macs", "global", scores).configuration(0.4), units_of(dense))
    assert kept["bert.encoder.layer.1.attention"] == 4
    assert kept["bert.encoder.layer.2.ffn"] == 3


def test_what_lowers_the_sum_stays_out() -> None:
    """But for a step of every module."""
    dense = tiny.dense("bert")
    scores = importances(dense, 0)
    scores.units["bert.encoder.layer.0.ffn"].importance[:] = -1.0
    kept = kept_by(Allocator(dense, "macs", "global", scores).configuration(1.0), units_of(dense))
    assert kept.pop("bert.encoder.layer.0.ffn") == 3
    assert kept == {one.name: one.steps for one in units_of(dense) if one.name in kept}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_variants_nest_and_are_shared_on_a_grid(allocation: str) -> None:
    """Neighbouring sizes have a module at the same rate, above 0, where not all change alike."""
    dense = tiny.dense("bert", intermediate_size=320)
    scores = scores_of(dense, 1) if allocation == "stat" else importances(dense, 1)
    made = Allocator(dense, "macs", allocation, scores, grid=16)
    chosen = [made.configuration(size) for size in (0.8, 0.7, 0.6, 0.5)]
    for one in units_of(dense):
        values = torch.from_numpy(scores.importance(one.name))
        rates = sorted({configuration[one.name].rate for configuration in chosen})
        kept = [{*(keep_best(values, one, rate).kept_units or ())} for rate in rates]
        assert all(more > less for more, less in itertools.pairwise(kept))
        if one.kind == "ffn":
            assert all((rate * 16).is_integer() for rate in rates)
    for one, other in itertools.pairwise(chosen):
        shared = {pair for pair in one.items() if pair[1].rate} & {*other.items()}
        assert shared or allocation == "uniform"


@pytest.mark.parametrize("layout", ["t5", "bert", "llama_gqa"])
def test_planned_macs_are_counted_on_the_composed_model(layout: str) -> None:
    """By torch's own counter, two operations for a MAC, without what follows the last layer."""
    dense = tiny.dense(layout, attention="eager")
    lengths = {"encoder": 9, "decoder": 6 if layout == "t5" else 9}
    total = cost.total(dense.model, dense.family, "macs", lengths)
    read = {name: 4 * count for name, count in lengths.items()}
    scores = importances(dense, 3)
    origin = dataclasses.replace(scores.origin, texts=TextsRead("texts", "ab" * 32, 4, read))  # type: ignore[type-var]
    scores = dataclasses.replace(scores, origin=origin)
    configuration = Allocator(dense, "macs", "global", scores).configuration(0.6)
    planned = planned_costs(dense, configuration, lengths)["macs"]
    scheme, *_ = scheme_of([configuration])
    sources = Sources(scores=lambda name: torch.from_numpy(scores.importance(name)))
    chosen = {"attention": "ranked", "ffn": "ranked"}
    model = compose(dense, make_variants(dense, scheme, chosen, sources)).model
    batch = {"input_ids": torch.ones(1, 9, dtype=torch.long)}
    if layout == "t5":
        batch["decoder_input_ids"] = torch.ones(1, 6, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    counts = counter.get_flop_counts()
    heads = [counts.get(f"{type(model).__name__}.{end}", {}) for end in HEADS]
    outside = sum(sum(one.values()) for one in heads)
    assert outside > 0
    assert planned == (counter.get_total_flops() - outside) / 2
    assert 0.5 * total < planned <= 0.6 * total


#: What follows the last layer, and is not counted.
HEADS = ("lm_head", "classifier", "bert.pooler")
