"""Methods that choose units by inputs, against plain loops, QR of the inputs, and all choices."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import qr
from torch import nn

from composable import methods
from composable.families import Module
from composable.linalg.solver import refit, squared_error
from composable.methods import Evidence
from composable.methods.exchange import exchange, most_swaps
from composable.methods.random import seed_of
from composable.methods.stat import head_order, neuron_pivots
from composable.models.surgery import units_to_remove
from tests.oracle.test_masks import (
    correlated,
    gram,
    linear,
    lowest_go,
    refit_loss,
    weights,
    with_ones,
    with_ridge,
)

#: Methods of the units of both kinds, and of neurons alone.
BY_INPUTS = ["stat", "unit_wanda", "fluctuation"]
NEURONS = [*BY_INPUTS, "exchange"]
RATES = [0.001, 0.2, 1 / 3, 0.5, 0.75, 0.999]
PARTS = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "o"))


def ffn(units: int) -> Module:
    return Module("some.ffn", "ffn", "encoder", (("up", "up"), ("down", "o")), units=units)


def attention(units: int, groups: int = 0, whole: bool = False, size: int = 3) -> Module:
    return Module(
        "some", "attention", "encoder", PARTS, units=units, groups=groups or units,
        head_size=size, whole_groups=whole,
    )  # fmt: skip


def kept(
    name: str, module: Module, x: np.ndarray, weight: np.ndarray, rate: float, bias: bool = False
) -> list[int]:
    """What a method keeps of the units whose outputs are x (tokens, n)."""
    holder = nn.Module()
    holder.o = linear(weight, bias)
    evidence = Evidence(gram(x), seed=1)
    decision = methods.by_name(name).prune(holder, module, rate, evidence)
    assert decision.mask is None
    assert decision.tensors is None
    assert decision.kept_units is not None
    return decision.kept_units


def most(scores: Any, count: int) -> list[int]:
    """The ids of the highest scores; of equal ones the lower index goes."""
    return lowest_go(np.array(scores), len(scores) - count).nonzero()[0].tolist()


def columns_of(heads: list[int], size: int) -> list[int]:
    return [head * size + i for head in heads for i in range(size)]


@pytest.mark.parametrize("rate", RATES)
def test_stat_takes_the_pivots_of_scaled_inputs(rate: float) -> None:
    x, weight = correlated(20, 200, 1), weights(6, 20)
    order = qr(x * np.linalg.norm(weight, axis=0), mode="r", pivoting=True)[1]
    count = 20 - units_to_remove(20, rate)
    assert kept("stat", ffn(20), x, weight, rate) == sorted(order[:count].tolist())
    unscaled = qr(x, mode="r", pivoting=True)[1]
    assert unscaled.tolist() != order.tolist()


@pytest.mark.parametrize("rate", RATES)
def test_stat_takes_heads_as_columns_of_tokens_and_coordinates(rate: float) -> None:
    x, weight = correlated(24, 150, 2), weights(6, 24)
    whole = x.reshape(150, 8, 3).transpose(0, 2, 1).reshape(-1, 8)
    order = qr(whole, mode="r", pivoting=True)[1]
    count = 8 - units_to_remove(8, rate)
    assert kept("stat", attention(8), x, weight, rate) == sorted(order[:count].tolist())


def test_stat_takes_whole_groups_as_one_column() -> None:
    x, weight = correlated(24, 150, 3), weights(6, 24)
    whole = x.reshape(150, 4, 6).transpose(0, 2, 1).reshape(-1, 4)
    order = qr(whole, mode="r", pivoting=True)[1].tolist()
    for rate, count in ((0.25, 3), (0.5, 2), (0.75, 1)):
        expected = sorted(2 * group + head for group in order[:count] for head in (0, 1))
        assert kept("stat", attention(8, 4, whole=True), x, weight, rate) == expected


@pytest.mark.parametrize("groups", [2, 4])
def test_stat_keeps_equally_many_heads_of_every_group(groups: int) -> None:
    x, weight = correlated(36, 150, 4), weights(6, 36)
    module = attention(12, groups)
    order = head_order(torch.from_numpy(weight), gram(x).matrix, module)
    assert module.steps == 12 // groups
    each = 12 // groups
    for rate in RATES:
        count = groups * (each - units_to_remove(each, rate))
        found = kept("stat", module, x, weight, rate)
        assert found == sorted(order[:count])
        sizes = {sum(head // each == group for head in found) for group in range(groups)}
        assert sizes == {count // groups}


def column_scores(name: str, x: np.ndarray, weight: np.ndarray) -> list[float]:
    found = []
    for column in range(x.shape[1]):
        values, row = x[:, column].tolist(), weight[:, column].tolist()
        mean = sum(values) / len(values)
        if name == "unit_wanda":
            power = math.sqrt(sum(value**2 for value in values) / len(values))
            found.append(sum(abs(w) * power for w in row))
        else:
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            found.append(variance * sum(w**2 for w in row))
    return found


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["unit_wanda", "fluctuation"])
def test_scores_of_columns_by_plain_loops(name: str, rate: float) -> None:
    x, weight = correlated(24, 90, 5), weights(6, 24)
    scores = column_scores(name, x, weight)
    assert kept(name, ffn(24), x, weight, rate) == most(scores, 24 - units_to_remove(24, rate))
    heads = [sum(scores[3 * head : 3 * head + 3]) for head in range(8)]
    expected = most(heads, 8 - units_to_remove(8, rate))
    assert kept(name, attention(8), x, weight, rate) == expected


def test_random_draws_anew_for_every_seed_and_module() -> None:
    def lot(seed: int, name: str) -> list[int] | None:
        module = dataclasses.replace(ffn(40), name=name)
        evidence = Evidence(seed=seed_of(seed, name))
        return methods.by_name("random").prune(nn.Module(), module, 0.5, evidence).kept_units

    lots = [lot(seed, name) for seed in (1, 2) for name in ("a", "b")]
    assert lots == [lot(seed, name) for seed in (1, 2) for name in ("a", "b")]
    assert all(a != b for a, b in itertools.combinations(lots, 2))
    counts = np.zeros(40)
    for seed in range(200):
        counts[lot(seed, "a")] += 1
    assert 70 < counts.min() <= counts.max() < 130  # of 100 each; seven deviations would be 50


def loss_of(x: np.ndarray, weight: np.ndarray, ids: list[int], bias: bool) -> float:
    """What is left of the output after the refit with its ridge, by least squares of numpy."""
    data = with_ridge(with_ones(x, bias))
    target = data[:, : weight.shape[1]] @ weight.T.astype(float)
    mask = np.zeros(data.shape[1], dtype=bool)
    mask[ids] = True
    mask[weight.shape[1] :] = True
    return refit_loss(data, target, mask)


def local_search(x: np.ndarray, weight: np.ndarray, start: list[int], bias: bool) -> list[int]:
    """The best of all swaps, again and again, each with a fresh fit."""
    now, loss = sorted(start), loss_of(x, weight, start, bias)
    while True:
        outside = [unit for unit in range(weight.shape[1]) if unit not in now]
        swaps = [sorted({*now, j} - {i}) for i in now for j in outside]
        losses = [loss_of(x, weight, each, bias) for each in swaps]
        if not swaps or min(losses) > (1 - 1e-4) * loss:
            return now
        now, loss = swaps[int(np.argmin(losses))], min(losses)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_exchange_makes_the_best_swap_of_all(count: int, bias: bool) -> None:
    for seed in range(3):
        x, weight = correlated(9, 60, seed), weights(5, 9, seed)
        matrix = gram(x).augmented() if bias else gram(x).matrix
        start = list(range(count))
        # three swaps at most for so few neurons
        expected = local_search(x, weight, start, bias)
        found = exchange(torch.from_numpy(weight), matrix, start)
        if len({*expected} - {*start}) < 3:
            assert found == expected
        assert loss_of(x, weight, found, bias) <= loss_of(x, weight, start, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_exchange_comes_near_the_best_of_all_choices(bias: bool) -> None:
    """Never worse than where it starts, by the refit's own solver; often the best there is."""
    found_best = 0
    for seed in range(8):
        x, weight = correlated(10, 80, seed), weights(6, 10, seed)
        ids = {name: kept(name, ffn(10), x, weight, 0.5, bias) for name in ("stat", "exchange")}
        all_choices = itertools.combinations(range(10), 5)
        losses = {name: loss_of(x, weight, each, bias) for name, each in ids.items()}
        best = min(loss_of(x, weight, list(each), bias) for each in all_choices)
        assert best * (1 - 1e-9) <= losses["exchange"] <= losses["stat"] * (1 + 1e-9)
        found_best += losses["exchange"] <= best * 1.0001
    assert found_best >= 4


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_keep_their_ids_in_any_order(name: str) -> None:
    x, weight = correlated(30, 200, 6), weights(8, 30)
    order = np.random.default_rng(6).permutation(30)
    for rate in (0.2, 0.5):
        moved = kept(name, ffn(30), x[:, order], weight[:, order], rate)
        assert sorted(order[moved].tolist()) == kept(name, ffn(30), x, weight, rate)


@pytest.mark.parametrize("name", ["stat", "unit_wanda", "fluctuation", "random"])
def test_units_nest_as_the_rate_falls(name: str) -> None:
    x, weight = correlated(24, 100, 7), weights(8, 24)
    shapes = (ffn(24), attention(8), attention(8, 2), attention(8, 4, whole=True))
    for module in shapes:
        sets = [set(kept(name, module, x, weight, i / 30)) for i in range(1, 30)]
        assert all(higher <= lower for lower, higher in itertools.pairwise(sets))


@pytest.mark.parametrize(
    ("rows", "count", "total", "swaps"),
    [(576, 768, 1536, 385), (4096, 5504, 11008, 24), (8, 1, 2, 1), (8, 2, 2, 0)],
)
def test_the_search_of_a_wide_ffn_is_cut_short(
    rows: int, count: int, total: int, swaps: int
) -> None:
    """Of SmolLM2's ffns, of those of a model of 7 billion weights, and of very small ones."""
    assert most_swaps(rows, count, total) == swaps


@pytest.mark.parametrize("name", ["stat", "exchange"])
def test_copies_and_sums_cost_nothing(name: str) -> None:
    """Half of the neurons are copies or sums of others, and the refit gets all of it back."""
    generator = np.random.default_rng(8)
    half = np.maximum(generator.normal(size=(400, 8)), 0)
    sums = np.hstack([half[:, :4] * 2, half[:, :4] + half[:, 4:]])
    x = np.hstack([half, sums])[:, generator.permutation(16)]
    weight = weights(6, 16)
    ids = kept(name, ffn(16), x, weight, 0.5)
    mask = torch.zeros(6, 16, dtype=torch.bool)
    mask[:, ids] = True
    (found,) = refit(gram(x).matrix, torch.from_numpy(weight), [mask], ridge=0.0)
    output = np.abs(x @ weight.T).max()
    np.testing.assert_allclose(x @ found.numpy().T, x @ weight.T, rtol=0, atol=1e-5 * output)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NEURONS)
def test_dead_units_go_first(name: str, bias: bool) -> None:
    x, weight = correlated(12, 60, 9), weights(8, 12)
    x[:, [2, 7, 8]] = 0
    weight[:, [2, 7, 8]] *= 50
    alive = [0, 1, 3, 4, 5, 6, 9, 10, 11]
    assert kept(name, ffn(12), x, weight, 0.25, bias) == alive
    fewer = [alive[i] for i in kept(name, ffn(9), x[:, alive], weight[:, alive], 3 / 9, bias)]
    assert kept(name, ffn(12), x, weight, 0.5, bias) == fewer
    x[:] = 0
    if name == "stat":  # nothing is known of any: those stay of which most is read
        norms = np.linalg.norm(weight, axis=0)
        assert kept(name, ffn(12), x, weight, 0.5, bias) == most(norms, 6)


@pytest.mark.parametrize("name", [*BY_INPUTS, "exchange", "random", "head_gram"])
@pytest.mark.parametrize("kind", ["no token", "one token", "few tokens", "repeated", "constant",
                                  "huge", "tiny"])  # fmt: skip
def test_degenerate_inputs(name: str, kind: str) -> None:
    x, weight = correlated(16, 100, 10), weights(9, 16)
    x = {
        "no token": x[:0],
        "one token": x[:1],
        "few tokens": x[:5],
        "repeated": np.hstack([x[:, :8], x[:, :8]]),
        "constant": np.ones_like(x),
        "huge": x * 1e15,
        "tiny": x * 1e-15,
    }[kind]
    able = methods.by_name(name).kinds
    shapes = [(ffn(16), 16), (attention(4, size=4), 4), (attention(4, 2, size=4), 4),
              (attention(4, 2, True, 4), 4), (attention(1, size=16), 1)]  # fmt: skip
    for (module, units), bias in itertools.product(shapes, (False, True)):
        if module.kind in able:
            ids = kept(name, module, x, weight, 0.5, bias)
            assert len(set(ids)) == len(ids) == units - units_to_remove(units, 0.5)
            assert set(ids) <= set(range(units))


@pytest.mark.parametrize("bias", [False, True])
def test_after_the_refit_inputs_choose_better_than_lots(bias: bool) -> None:
    losses: dict[str, float] = dict.fromkeys([*NEURONS, "random"], 0.0)
    for seed in range(5):
        x, weight = correlated(32, 300, seed), weights(12, 32, seed)
        for name in losses:
            ids = kept(name, ffn(32), x, weight, 0.5, bias)
            losses[name] += loss_of(x, weight, ids, bias)
    assert all(losses[name] < 0.8 * losses["random"] for name in NEURONS), losses
    assert min(losses, key=losses.__getitem__) == "exchange", losses


def test_what_is_left_of_scaled_inputs_bounds_the_error() -> None:
    """|(Z - Z_I T) W^T| by the refit without a ridge, at most |W| times what pivots leave."""
    x, weight = correlated(20, 200, 11), torch.from_numpy(weights(6, 20))
    found = neuron_pivots(weight, gram(x).matrix)
    for count in (1, 5, 10, 19):
        mask = torch.zeros(6, 20, dtype=torch.bool)
        mask[:, found.order[:count]] = True
        (after,) = refit(gram(x).matrix, weight, [mask], ridge=0.0)
        error = math.sqrt(squared_error(gram(x).matrix, after - weight))
        scaled = weight / weight.norm(dim=0)
        bound = float(found.left[count - 1]) * float(torch.linalg.matrix_norm(scaled, 2))
        assert error <= bound * (1 + 1e-6)
