"""Methods that read inputs, against slow loops over their formulas in numpy and float64."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from composable import families, methods
from composable.errors import ShapeError, UserError
from composable.families import Module
from composable.linalg.grams import Gram
from composable.methods import Evidence
from composable.methods.alps import alps_mask
from composable.methods.base import keep_highest
from composable.methods.head_gram import elimination_order, kept_heads
from composable.methods.obs import obs_scores
from composable.methods.sparsegpt import sparsegpt_mask
from composable.methods.wanda import wanda_scores
from composable.models.surgery import units_to_remove
from tests import tiny

RIDGE = 1e-2
#: What ranks the weights of a linear by its inputs; a new method is tested, too.
LINEAR = [m.name for m in methods.METHODS if "linear" in m.kinds and "inputs" in m.needs]
RATES = [0.001, 0.05, 0.29, 1 / 3, 0.5, 0.75, 0.9, 0.999]
ATTENTION = "decoder.block.1.layer.1.EncDecAttention"
MODULE = Module("some.linear", "linear", "encoder", holder="some.linear")
EIGHT = Module("some", "attention", "encoder", units=8, groups=8)


def correlated(n: int, tokens: int, seed: int) -> np.ndarray:
    """Inputs (tokens, n) that differ in size, share directions and have a mean."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(n, n)) * np.arange(1, n + 1)[None] ** -0.8
    scale = np.exp(0.7 * generator.normal(size=n))
    return (generator.normal(size=(tokens, n)) @ mixing.T + 0.3) * scale


def gram(x: np.ndarray) -> Gram:
    """The statistics of inputs (tokens, n), to the last bit of float64."""
    return Gram(torch.from_numpy(x.T @ x), torch.from_numpy(x.sum(0)), len(x))


def linear(weight: np.ndarray, bias: bool = False) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    made.weight = nn.Parameter(torch.from_numpy(weight).float())
    return made


def weights(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(100 + seed).normal(size=(rows, n)).astype(np.float32)


def prune(name: str, part: nn.Module, rate: float, inputs: Gram | None) -> np.ndarray:
    mask = methods.by_name(name).prune(part, MODULE, rate, Evidence(inputs)).mask
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.device.type == "cpu"
    return mask.numpy()


def lowest_go(scores: np.ndarray, count: int) -> np.ndarray:
    """The mask without the lowest scores, by a stable sort of Python's."""
    flat = scores.ravel().tolist()
    gone = set(sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count])
    return np.array([i not in gone for i in range(len(flat))]).reshape(scores.shape)


def lowest_of_rows_go(scores: np.ndarray, count: int) -> np.ndarray:
    """The mask without the lowest scores of every row, in the first rows one more if need be."""
    each, more = divmod(count, len(scores))
    rows = [lowest_go(row[None], each + (i < more)) for i, row in enumerate(scores)]
    return np.vstack(rows)


def with_ridge(x: np.ndarray) -> np.ndarray:
    """Inputs whose plain second moments are those of `x` with the ridge."""
    return np.vstack([x, np.sqrt(RIDGE) * np.diag(np.sqrt((x**2).sum(0)))])


def with_ones(x: np.ndarray, bias: bool) -> np.ndarray:
    return np.hstack([x, np.ones((len(x), 1))]) if bias else x


def refit_loss(x: np.ndarray, target: np.ndarray, kept: np.ndarray) -> float:
    """What is left of target (tokens, rows) after least squares on the columns `kept` of x."""
    if not kept.any():
        return float((target**2).sum())
    solution = np.linalg.lstsq(x[:, kept], target, rcond=None)[0]
    return float(((x[:, kept] @ solution - target) ** 2).sum())


def mask_loss(x: np.ndarray, weight: np.ndarray, mask: np.ndarray, bias: bool) -> float:
    """The squared error of all rows after each is refitted on what its mask keeps."""
    inputs = with_ridge(with_ones(x, bias))
    outputs = inputs[:, : weight.shape[1]] @ weight.T.astype(float)
    mask = np.hstack([mask, np.ones((len(mask), int(bias)), dtype=bool)])
    return sum(refit_loss(inputs, y, kept) for y, kept in zip(outputs.T, mask, strict=True))


def test_keep_highest_equals_a_stable_sort() -> None:
    generator = np.random.default_rng(0)
    for n, count in itertools.product((1, 2, 7, 60), (0, 1, 2, 5, 33, 60)):
        scores = generator.integers(0, 6, size=n).astype(float)
        if count <= n:
            found = keep_highest(torch.from_numpy(scores), count)
            assert found.tolist() == lowest_go(scores, count).tolist()


def test_scores_that_are_no_numbers_count_as_the_highest() -> None:
    scores = torch.tensor([math.nan, 2.0, math.inf, 1.0, math.nan])
    assert keep_highest(scores, 2).tolist() == [True, False, True, False, True]
    assert keep_highest(scores, 4).tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("rate", [0.29, 0.5, 0.75])
def test_wanda_equals_a_plain_loop(rate: float) -> None:
    x, weight = correlated(11, 50, 1), weights(7, 11)
    scores = np.zeros((7, 11))
    for row in range(7):
        for column in range(11):
            mean_square = sum(value**2 for value in x[:, column].tolist()) / len(x)
            scores[row, column] = abs(float(weight[row, column])) * math.sqrt(mean_square)
    power = torch.from_numpy((x**2).mean(0))
    assert np.allclose(wanda_scores(torch.from_numpy(weight), power), scores, rtol=1e-12)
    expected = lowest_of_rows_go(scores, math.floor(77 * rate + 0.5))
    found = prune("wanda", linear(weight), rate, gram(x))
    assert found.tolist() == expected.tolist()
    assert np.ptp(found.sum(1)) <= 1
    expected = lowest_go(scores, math.floor(77 * rate + 0.5))
    found = prune("wanda_matrix", linear(weight), rate, gram(x))
    assert found.tolist() == expected.tolist()
    assert np.ptp(found.sum(1)) > 1


@pytest.mark.parametrize("bias", [False, True])
def test_obs_scores_are_the_losses_of_removing_each_weight_alone(bias: bool) -> None:
    x, weight = correlated(9, 40, 2), weights(5, 9)
    inputs = with_ridge(with_ones(x, bias))
    losses = np.zeros((5, 9))
    for row, column in itertools.product(range(5), range(9)):
        target = inputs[:, :9] @ weight[row].astype(float)
        kept = np.arange(inputs.shape[1]) != column
        losses[row, column] = refit_loss(inputs, target, kept)
    statistics = gram(x)
    matrix = statistics.augmented() if bias else statistics.matrix
    scores = obs_scores(torch.from_numpy(weight), matrix)
    assert np.allclose(scores.square(), losses, rtol=1e-8)
    for rate in RATES:
        expected = lowest_go(losses, math.floor(45 * rate + 0.5))
        found = prune("obs", linear(weight, bias), rate, statistics)
        assert found.tolist() == expected.tolist()


def sparsegpt_by_columns(x: np.ndarray, weight: np.ndarray, rate: float, block: int) -> np.ndarray:
    """One optimal brain surgeon step per weight, with a fresh inverse per column."""
    x = with_ridge(x)
    hessian, rows, columns = x.T @ x, weight.shape[0], weight.shape[1]
    values = np.zeros((rows, len(hessian)))
    values[:, :columns] = weight
    mask = np.ones((rows, columns), dtype=bool)
    inverses = [np.linalg.inv(hessian[column:, column:]) for column in range(columns)]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        pivots = np.array([inverses[column][0, 0] for column in range(first, last)])
        before, after = (math.floor(rows * end * rate + 0.5) for end in (first, last))
        mask[:, first:last] = lowest_go(values[:, first:last] ** 2 / pivots, after - before)
        for column, row in itertools.product(range(first, last), range(rows)):
            if not mask[row, column]:
                inverse = inverses[column]
                values[row, column:] -= values[row, column] / inverse[0, 0] * inverse[0]
    return mask


@pytest.mark.parametrize("rate", [0.29, 0.5, 0.75])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [4, 7, 128])
def test_sparsegpt_equals_explicit_updates(block: int, bias: bool, rate: float) -> None:
    x, weight = correlated(22, 90, 3), weights(6, 22)
    expected = sparsegpt_by_columns(with_ones(x, bias), weight, rate, block)
    matrix = gram(x).augmented() if bias else gram(x).matrix
    found = sparsegpt_mask(torch.from_numpy(weight), matrix, rate, block)
    assert found.tolist() == expected.tolist()
    if block == 128:
        pruned = prune("sparsegpt", linear(weight, bias), rate, gram(x))
        assert pruned.tolist() == expected.tolist()


def test_sparsegpt_compares_128_columns_at_a_time() -> None:
    x, weight = correlated(150, 200, 4), weights(2, 150)
    expected = sparsegpt_by_columns(x, weight, 0.5, 128)
    assert prune("sparsegpt", linear(weight), 0.5, gram(x)).tolist() == expected.tolist()
    assert int((~expected[:, :128]).sum()) == 128
    assert expected.tolist() != sparsegpt_by_columns(x, weight, 0.5, 150).tolist()


@pytest.mark.parametrize("rate", RATES)
def test_sparsegpt_gives_every_block_its_share(rate: float) -> None:
    for rows, columns, block in itertools.product((1, 3), (1, 5, 14), (1, 3, 4)):
        weight, matrix = torch.from_numpy(weights(rows, columns)), torch.eye(columns).double()
        gone = ~sparsegpt_mask(weight, matrix, rate, block)
        assert int(gone.sum()) == math.floor(rows * columns * rate + 0.5)
        for part in gone.split(block, dim=1):
            assert abs(int(part.sum()) - part.numel() * rate) <= 1


def alps_by_solves(x: np.ndarray, weight: np.ndarray, rate: float, bias: bool) -> np.ndarray:
    """ADMM with one linear solve per iteration instead of eigenvectors."""
    n = weight.shape[1]
    inputs = with_ridge(with_ones(x, bias))
    # moments of what a bias cannot explain: the inverse of a part of the inverse
    hessian = np.linalg.inv(np.linalg.inv(inputs.T @ inputs)[:n, :n])
    scale = np.sqrt(np.diag(hessian) / (1 + RIDGE))
    hessian, dense = hessian / np.outer(scale, scale), weight * scale
    count = math.floor(weight.size * rate + 0.5)
    rho, sparse, dual, mask = 0.1, dense, np.zeros_like(dense), lowest_go(abs(dense), count)
    for _ in range(30):
        shifted = hessian + rho * np.eye(n)
        fit = np.linalg.solve(shifted, (dense @ hessian + rho * (sparse - dual)).T).T
        before, mask = mask, lowest_go(abs(fit + dual), count)
        sparse = np.where(mask, fit + dual, 0)
        dual = dual + fit - sparse
        changed = (mask & ~before).sum() / (weight.size - count)
        rho *= 1.15 * (1.1 if changed > 0.01 else 1)
    return mask


@pytest.mark.parametrize("rate", [0.29, 0.5, 0.75])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(6, 20), (30, 12), (40, 60)])
def test_alps_equals_its_iteration_with_solves(
    rows: int, n: int, bias: bool, rate: float
) -> None:  # fmt: skip
    x, weight = correlated(n, 90, 5), weights(rows, n)
    expected = alps_by_solves(x, weight, rate, bias)
    matrix = gram(x).augmented() if bias else gram(x).matrix
    for dtype in (torch.float64, torch.float32):
        found = alps_mask(torch.from_numpy(weight), matrix, rate, dtype=dtype)
        assert found.tolist() == expected.tolist(), dtype
    assert prune("alps", linear(weight, bias), rate, gram(x)).tolist() == expected.tolist()


def order_by_brute_force(
    x: np.ndarray, weight: np.ndarray, heads: int
) -> tuple[list[int], list[float]]:
    """Refit on the data for every head that could go, and let the cheapest go."""
    x, n = with_ridge(x), weight.shape[1]
    target = x[:, :n] @ weight.T.astype(float)
    kept = np.ones(x.shape[1], dtype=bool)
    order: list[int] = []
    losses: list[float] = []
    for _ in range(heads):
        best = (math.inf, -1, kept)
        for head in range(heads):
            trial = kept.copy()
            trial[head * n // heads : (head + 1) * n // heads] = False
            if head not in order:
                best = min(best, (refit_loss(x, target, trial), head, trial), key=lambda b: b[:2])
        order.append(best[1])
        losses.append(best[0])
        kept = best[2]
    return order, losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(1, 4), (4, 3), (6, 2), (5, 1)])
def test_head_gram_equals_refits_of_every_candidate(heads: int, size: int, bias: bool) -> None:
    n = heads * size
    for seed in range(3):
        x, weight = correlated(n, 60, seed), weights(7, n, seed)
        order, losses = order_by_brute_force(with_ones(x, bias), weight, heads)
        matrix = gram(x).augmented() if bias else gram(x).matrix
        found = elimination_order(torch.from_numpy(weight), matrix, heads)
        assert [head for head, _ in found] == order
        assert [loss for _, loss in found] == pytest.approx(losses, rel=1e-9)


def test_head_gram_prunes_an_attention() -> None:
    model = tiny.t5()
    modules = {module.name: module for module in families.of(model).modules(model)}
    part, x = model.get_submodule(ATTENTION), correlated(32, 100, 6)
    order, _ = order_by_brute_force(x, part.o.weight.detach().numpy(), 4)
    assert order != sorted(order)
    for rate, count in ((0.1, 0), (0.25, 1), (0.5, 2), (0.75, 3), (0.99, 3)):
        decision = methods.by_name("head_gram").prune(
            part, modules[ATTENTION], rate, Evidence(gram(x))
        )
        assert decision.mask is None
        assert decision.kept_units == sorted(order[count:])


def test_a_head_that_repeats_another_goes_first() -> None:
    """However large it is: the other one takes over."""
    x, weight = correlated(12, 200, 7), weights(5, 12)
    x[:, 6:9] = x[:, 3:6] * 2.0
    order = elimination_order(torch.from_numpy(weight), gram(x).matrix, 4)
    assert order[0][0] in (1, 2)
    assert order[1][0] not in (1, 2)


def test_of_equal_heads_the_lower_index_goes() -> None:
    weight = torch.ones(3, 12)
    matrix = torch.eye(12).double() + 0.25
    assert [head for head, _ in elimination_order(weight, matrix, 6)] == list(range(6))
    assert [head for head, _ in elimination_order(0 * weight, matrix, 6)] == list(range(6))
    assert [head for head, _ in elimination_order(weight, 0 * matrix, 6)] == list(range(6))


@pytest.mark.parametrize("heads", [0, 5])
def test_columns_that_do_not_divide_into_heads_are_refused(heads: int) -> None:
    with pytest.raises(ShapeError, match=f"12 columns do not divide into {heads} heads"):
        elimination_order(torch.ones(3, 12), torch.eye(12).double(), heads)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 1), (1, 10), (7, 5), (5, 131)])
def test_counts_are_exact(name: str, rows: int, n: int) -> None:
    x, weight = correlated(n, 40, 8), weights(rows, n)
    for rate in RATES:
        gone = ~prune(name, linear(weight), rate, gram(x))
        assert gone.sum() == math.floor(weight.size * rate + 0.5)
        assert (~prune(name, linear(weight, True), rate, gram(x))).sum() == gone.sum()


@pytest.mark.parametrize(
    "name", ["wanda_matrix", "obs", "sparsegpt"]
)  # what alps removes can come back
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_of_equal_weights_the_lower_index_goes(name: str, rate: float) -> None:
    inputs = Gram(4 * torch.eye(10).double(), torch.zeros(10).double(), 40)
    weight = np.full((6, 10), -0.5, dtype=np.float32)
    weight[2:4] *= -1
    gone = ~prune(name, linear(weight), rate, inputs)
    assert gone.ravel().nonzero()[0].tolist() == list(range(int(60 * rate + 0.5)))


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_after_the_refit_all_are_better_than_l1_and_alps_is_best(
    seed: int, bias: bool, rate: float
) -> None:  # fmt: skip
    x, weight = correlated(40, 1000, seed), weights(24, 40, seed)
    losses = {
        name: mask_loss(x, weight, prune(name, linear(weight, bias), rate, gram(x)), bias)
        for name in ["l1", *LINEAR]
    }
    for name in LINEAR:
        assert losses[name] < 0.9 * losses["l1"], losses
    assert min(losses, key=losses.__getitem__) == "alps", losses


def test_greedy_heads_leave_less_loss_than_heads_of_the_smallest_weights() -> None:
    for seed in range(3):
        x, weight = correlated(32, 500, seed), torch.from_numpy(weights(16, 32, seed))
        data = with_ridge(x)
        target = data @ weight.numpy().T.astype(float)
        sizes = weight.abs().reshape(16, 8, 4).sum((0, 2))
        losses = []
        for heads in (
            kept_heads(weight, gram(x).matrix, EIGHT, 0.5),
            sizes.argsort(descending=True)[:4].tolist(),
        ):
            kept = np.repeat([head in heads for head in range(8)], 4)
            losses.append(refit_loss(data, target, kept))
        assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("name", ["l1", "wanda", "wanda_matrix", "obs"])
def test_masks_nest_as_the_rate_falls(name: str) -> None:
    x, weight = correlated(12, 60, 9), weights(8, 12)
    masks = [prune(name, linear(weight), i / 40, gram(x)) for i in range(1, 40)]
    assert all((lower | ~higher).all() for lower, higher in itertools.pairwise(masks))


def test_heads_nest_as_the_rate_falls() -> None:
    x, weight = correlated(24, 90, 9), torch.from_numpy(weights(8, 24))
    rates = [i / 40 for i in range(41)]
    kept = [set(kept_heads(weight, gram(x).matrix, EIGHT, rate)) for rate in rates]
    assert all(higher <= lower for lower, higher in itertools.pairwise(kept))
    assert [len(heads) for heads in kept] == [8 - units_to_remove(8, rate) for rate in rates]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_weights_of_dead_inputs_go_first(name: str, bias: bool) -> None:
    x, weight = correlated(12, 60, 10), weights(8, 12)
    x[:, [2, 7]] = 0
    weight[:, [2, 7]] *= 50
    part, sizes = linear(weight, bias), np.abs(weight)
    sizes[:, [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]] = np.inf
    few = prune(name, part, 7 / 96, gram(x))
    lowest = lowest_of_rows_go if name == "wanda" else lowest_go
    assert few.tolist() == lowest(sizes, 7).tolist()
    many = prune(name, part, 0.5, gram(x))
    assert not many[:, [2, 7]].any()
    alive = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    expected = prune(name, linear(weight[:, alive], bias), 32 / 80, gram(x[:, alive]))
    assert many[:, alive].tolist() == expected.tolist()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 30])
@pytest.mark.parametrize("name", LINEAR)
def test_without_any_signal_all_are_l1(name: str, tokens: int, bias: bool) -> None:
    weight, inputs = weights(8, 12), gram(np.zeros((tokens, 12)))
    lowest = lowest_of_rows_go if name == "wanda" else lowest_go
    expected = lowest(np.abs(weight), math.floor(96 * 0.4 + 0.5))
    assert prune(name, linear(weight, bias), 0.4, inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["obs", "sparsegpt", "alps"])
def test_the_bias_makes_up_for_a_constant_input(name: str) -> None:
    x, weight = np.random.default_rng(11).normal(size=(300, 12)), weights(8, 12)
    x[:, 3] = 2.0
    masks = [prune(name, linear(weight, bias), 0.25, gram(x)) for bias in (False, True)]
    assert masks[0][:, 3].mean() > 0.8
    assert masks[1][:, 3].mean() < 0.3


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("kind", ["one token", "few tokens", "repeated", "constant", "huge"])
def test_degenerate_statistics(name: str, kind: str) -> None:
    x, weight = correlated(16, 100, 12), weights(9, 16)
    x = {
        "one token": x[:1],
        "few tokens": x[:5],
        "repeated": np.hstack([x[:, :8], x[:, :8]]),
        "constant": np.ones_like(x),
        "huge": x * 1e15,
    }[kind]
    for bias in (False, True):
        mask = prune(name, linear(weight, bias), 0.5, gram(x))
        assert mask.sum() == 72
    heads = elimination_order(torch.from_numpy(weight), gram(x).augmented(), 4)
    assert sorted(head for head, _ in heads) == [0, 1, 2, 3]
    assert all(math.isfinite(loss) for _, loss in heads)


@pytest.mark.parametrize("name", LINEAR)
def test_the_number_of_tokens_and_the_units_do_not_matter(name: str) -> None:
    """The mean of ten times the same tokens is the same; so is the ranking in other units."""
    x, weight = correlated(12, 60, 13), weights(8, 12)
    expected = prune(name, linear(weight), 0.5, gram(x)).tolist()
    assert prune(name, linear(weight), 0.5, gram(np.tile(x, (4, 1)))).tolist() == expected
    units = 2.0 ** np.arange(-6, 6)
    assert prune(name, linear(weight / units), 0.5, gram(x * units)).tolist() == expected


@pytest.mark.parametrize("name", LINEAR)
def test_the_same_again_and_nothing_is_changed(name: str) -> None:
    x, part = correlated(20, 60, 14), linear(weights(30, 20), bias=True)
    inputs = gram(x)
    before = [t.clone() for t in (*part.parameters(), inputs.matrix, inputs.total)]
    masks = [prune(name, part, 0.5, inputs) for _ in range(3)]
    assert masks[0].tolist() == masks[1].tolist() == masks[2].tolist()
    after = [*part.parameters(), inputs.matrix, inputs.total]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    half = prune(name, part.bfloat16(), 0.5, inputs)
    assert half.sum() == 300


def attention() -> tuple[Any, Module]:
    model = tiny.t5()
    modules = {module.name: module for module in families.of(model).modules(model)}
    return model.get_submodule(ATTENTION), modules[ATTENTION]


def feed_forward() -> tuple[Any, Module]:
    model = tiny.t5()
    modules = {module.name: module for module in families.of(model).modules(model)}
    name = "encoder.block.0.layer.1.DenseReluDense"
    return model.get_submodule(name), modules[name]


def bad(inputs: Gram, fault: Tensor) -> Gram:
    matrix = inputs.matrix.clone()
    matrix[0, 1] = fault
    return Gram(matrix, inputs.total, inputs.count)


@pytest.mark.parametrize("method", [m for m in methods.METHODS if "inputs" in m.needs])
def test_inputs_that_do_not_fit_are_refused(method: methods.Method) -> None:
    part, module = linear(weights(4, 32)), MODULE
    if method.kinds != ("linear",):
        part, module = attention() if "attention" in method.kinds else feed_forward()
    width = 48 if module.kind == "ffn" else 32
    with pytest.raises(
        UserError, match=f'"{module.name}": method {method.name} needs .*calibration'
    ):
        method.prune(part, module, 0.5, Evidence())
    with pytest.raises(ShapeError, match=f'"{module.name}": .* 31 inputs, .* {width} columns; cal'):
        method.prune(part, module, 0.5, Evidence(gram(correlated(31, 50, 0))))
    inputs = gram(correlated(width, 50, 0))
    for fault in (math.nan, math.inf):
        with pytest.raises(UserError, match=f'"{module.name}": .* not finite'):
            method.prune(part, module, 0.5, Evidence(bad(inputs, torch.tensor(fault))))


@pytest.mark.parametrize("method", [m for m in methods.METHODS if not m.needs])
def test_the_others_ignore_inputs(method: methods.Method) -> None:
    part, module = linear(weights(4, 32)), MODULE
    if method.kinds != ("linear",):
        part, module = attention() if "attention" in method.kinds else feed_forward()
    with_inputs = method.prune(part, module, 0.5, Evidence(gram(correlated(32, 50, 0))))
    without = method.prune(part, module, 0.5, Evidence())
    assert with_inputs.kept_units == without.kept_units
    assert (with_inputs.mask is None) == (without.mask is None)
    assert without.mask is None or torch.equal(with_inputs.mask, without.mask)


@pytest.mark.parametrize("whole_groups", [False, True])
def test_heads_by_loss_leave_groups_alike(whole_groups: bool) -> None:
    """Against all choices that are allowed: 2 groups of 4 heads of 4, one step of the search."""
    x, weight = correlated(32, 200, 3), torch.from_numpy(weights(8, 32))
    module = dataclasses.replace(EIGHT, groups=2, whole_groups=whole_groups)
    kept = kept_heads(weight, gram(x).matrix, module, 0.5)
    counts = [sum(head // 4 == group for head in kept) for group in range(2)]
    assert sorted(counts) == ([0, 4] if whole_groups else [2, 2])
    data, target = with_ridge(x), with_ridge(x) @ weight.numpy().T.astype(float)

    def loss(heads: list[int]) -> float:
        return refit_loss(data, target, np.repeat([h in heads for h in range(8)], 4))

    if whole_groups:
        assert loss(kept) == min(loss([0, 1, 2, 3]), loss([4, 5, 6, 7]))
    else:
        pairs = list(itertools.combinations(range(4), 2))
        choices = [loss([*a, *(4 + h for h in b)]) for a in pairs for b in pairs]
        assert loss(kept) <= sorted(choices)[len(choices) // 4]
