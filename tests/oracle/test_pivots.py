"""Pivoted Cholesky of Gram matrices against LAPACK's column-pivoted QR of the inputs themselves."""

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import lapack, qr, solve_triangular

from composable.linalg.grams import Gram
from composable.linalg.pivots import pivots
from tests.oracle.test_masks import correlated


def gram_of(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.T @ x)


def inputs(n: int, tokens: int, seed: int) -> np.ndarray:
    """Inputs (tokens, n) that depend on each other, but none on the others alone."""
    x = correlated(n, tokens, seed)
    return x + 0.1 * x.std(0) * np.random.default_rng(seed).normal(size=x.shape)


@pytest.mark.parametrize(("n", "tokens"), [(1, 9), (7, 40), (64, 300), (65, 300), (200, 900)])
def test_pivots_are_those_of_the_qr_and_of_lapack(n: int, tokens: int) -> None:
    x = inputs(n, tokens, n)
    found = pivots(gram_of(x), torch.ones(n))
    triangle, order = qr(x, mode="r", pivoting=True)
    triangle = triangle[:n]
    assert found.order == order.tolist()
    largest = abs(triangle[0, 0])
    np.testing.assert_allclose(
        found.size, np.abs(triangle.diagonal()), rtol=1e-9, atol=1e-9 * largest
    )
    left = [np.linalg.norm(triangle[k:, k:]) for k in range(1, n + 1)]
    np.testing.assert_allclose(found.left, left, rtol=1e-6, atol=1e-9 * largest)
    _, places, rank, _ = lapack.dpstrf(gram_of(x).numpy())
    assert rank == n
    assert (places - 1).tolist() == found.order


def test_what_is_left_is_the_error_of_the_interpolation() -> None:
    """||Z - Z_I T|| by T of the QR and by least squares; no rank k approximation is better."""
    x = inputs(30, 200, 1)
    found = pivots(gram_of(x), torch.ones(30))
    triangle, order = qr(x, mode="r", pivoting=True)
    values = np.linalg.svd(x, compute_uv=False)
    errors = []
    for k in (1, 5, 15, 29):
        interpolation = np.zeros((k, 30))
        solved = solve_triangular(triangle[:k, :k], triangle[:k, k:])
        interpolation[:, order] = np.hstack([np.eye(k), solved])
        kept = found.order[:k]
        fitted = np.linalg.lstsq(x[:, kept], x, rcond=None)[0]
        np.testing.assert_allclose(interpolation, fitted, atol=1e-8 * np.abs(fitted).max())
        np.testing.assert_allclose(interpolation[:, kept], np.eye(k), atol=1e-12)
        errors.append(np.linalg.norm(x - x[:, kept] @ interpolation))
        assert errors[-1] == pytest.approx(float(found.left[k - 1]), rel=1e-6)
        assert errors[-1] >= np.sqrt((values[k:] ** 2).sum())
    assert errors == sorted(errors, reverse=True)


def test_pivots_are_those_of_a_triangle_kept_batch_by_batch() -> None:
    """TSQR, which never squares: R <- qr([R; batch]), and in the end the pivoted QR of R."""
    x = inputs(60, 900, 6)
    triangle = np.zeros((0, 60))
    for batch in np.split(x, [100, 101, 350, 800]):
        triangle = np.linalg.qr(np.vstack([triangle, batch]), mode="r")
    whole, order = qr(triangle, mode="r", pivoting=True)
    found = pivots(gram_of(x), torch.ones(60))
    assert found.order == order.tolist()
    np.testing.assert_allclose(found.size, np.abs(whole.diagonal()), rtol=1e-8)


@pytest.mark.parametrize("kind", ["gaussian", "countsketch"])
def test_pivots_of_random_sketches_choose_no_better(kind: str) -> None:
    """Sketches of 4 n rows choose about as well; a fit to a sketch itself is worse."""
    x = inputs(60, 4000, 7)
    generator = np.random.default_rng(7)
    if kind == "gaussian":
        sketch = generator.normal(size=(240, 4000)) @ x / np.sqrt(240)
    else:
        sketch = np.zeros((240, 60))
        signs = generator.choice([-1.0, 1.0], 4000)
        np.add.at(sketch, generator.integers(0, 240, 4000), x * signs[:, None])

    def error(kept: list[int], rows: np.ndarray) -> float:
        fit = np.linalg.lstsq(rows[:, kept], rows, rcond=None)[0]
        return float(np.linalg.norm(x - x[:, kept] @ fit))

    order = pivots(gram_of(x), torch.ones(60)).order
    of_sketch = pivots(gram_of(sketch), torch.ones(60)).order
    for k in (15, 30, 45):
        exact = error(order[:k], x)
        assert exact < 1.1 * error(of_sketch[:k], x) < 1.21 * exact
        assert error(order[:k], sketch) > exact
        assert exact < 0.95 * np.mean([error(generator.permutation(60)[:k].tolist(), x)
                                       for _ in range(9)])  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1, 20, 90])
def test_copies_and_sums_follow_by_what_is_spare(rank: int) -> None:
    """Also in sums of float32 products, whose rounding is no pivot."""
    generator = np.random.default_rng(rank)
    whole = np.maximum(generator.normal(size=(4000, rank)) + 0.3, 0)
    sums = (
        whole[:, generator.integers(0, max(rank, 1), (40, 2))].sum(2)
        if rank
        else whole @ np.zeros((0, 40))
    )
    rows = torch.from_numpy(np.hstack([np.zeros((4000, 3)), whole, sums])).float()
    order = generator.permutation(rank + 43)
    moments = Gram.zeros(rank + 43)
    moments.add(rows[:, order])
    spare = torch.from_numpy(generator.random(rank + 43))
    found = pivots(moments.matrix, spare)
    assert sorted(found.order) == list(range(rank + 43))
    assert bool((found.size[:rank] > 0).all())
    assert bool((found.size[rank:] == 0).all())
    assert bool((found.left[max(rank - 1, 0) :] == 0).all())
    rest = found.order[rank:]
    assert rest == sorted(rest, key=lambda unit: -float(spare[unit]))


def test_fewer_tokens_than_columns() -> None:
    x = np.random.default_rng(2).normal(size=(12, 80))
    found = pivots(gram_of(x), torch.arange(80.0))
    assert found.order[:12] == qr(x, mode="r", pivoting=True)[1][:12].tolist()
    assert int((found.size > 0).sum()) == 12


def test_of_equal_columns_the_lower_index_comes_first() -> None:
    for n in (1, 5, 150):
        for matrix in (torch.eye(n), torch.zeros(n, n)):
            assert pivots(matrix.double(), torch.ones(n)).order == list(range(n))
    twice = torch.tensor([0, 1, 2, 0, 1, 2])
    x = np.random.default_rng(3).normal(size=(50, 3))
    found = pivots(gram_of(x)[twice][:, twice], torch.zeros(6)).order
    assert sorted(found[:3]) == [0, 1, 2]


def test_order_follows_the_columns() -> None:
    x = inputs(90, 400, 4)
    order = np.random.default_rng(4).permutation(90)
    spare = torch.ones(90)
    moved = pivots(gram_of(x)[order][:, order], spare)
    assert [order[unit] for unit in moved.order] == pivots(gram_of(x), spare).order


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 12])
def test_groups_take_turns(groups: int) -> None:
    """Against a loop that projects by least squares, one column at a time."""
    x = correlated(12, 60, 5)
    expected: list[int] = []
    for _ in range(12):
        given = [sum(unit * groups // 12 == g for unit in expected) for g in range(groups)]
        may = [
            unit for unit in range(12)
            if unit not in expected and given[unit * groups // 12] == min(given)
        ]  # fmt: skip
        fit = np.linalg.lstsq(x[:, expected], x, rcond=None)[0] if expected else np.zeros((0, 12))
        left = np.linalg.norm(x - x[:, expected] @ fit, axis=0)
        expected.append(max(may, key=lambda unit: left[unit]))
    assert pivots(gram_of(x), torch.ones(12), groups).order == expected
    for low, high in itertools.pairwise(range(groups, 13, groups)):
        assert len({unit * groups // 12 for unit in expected[low:high]}) == groups
