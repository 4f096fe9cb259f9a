"""Second moments and refitting: exact zeros, never worse, degenerate inputs, grouping, settings."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from composable.errors import ShapeError, UserError
from composable.linalg import grams, solver, systems
from composable.linalg.grams import Gram, Regression, full_float32
from composable.linalg.solver import is_constant, refit, regression_error, scaled, squared_error


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_masks(rows: int, width: int, *rates: float) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.rand(rows, width, generator=random) >= rate for rate in rates]


def moments(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


# --- Gram and Regression


@pytest.mark.parametrize("width", [1, 3, 8, 9, 255, 300])
def test_blocks_are_the_whole_product(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where tokens come after the matrix was read, or as many as are a product."""
    monkeypatch.setattr(grams, "TOKENS_PER_PRODUCT", 20)
    x = randn(90, width)
    gram = Gram.zeros(width)
    for first, last in ((0, 7), (7, 7), (7, 31), (31, 51), (51, 90)):
        with torch.inference_mode(first == 7):
            gram.add(x[first:last])
        if last != 51:
            torch.testing.assert_close(gram.matrix, moments(x[:last]), rtol=0, atol=1e-4)
    assert torch.equal(gram.matrix, gram.matrix.T)
    torch.testing.assert_close(gram.total, x.double().sum(0))
    assert gram.count == 90


def test_grouping_of_tokens_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch, batches of any size, and one batch that is cut: 1e-6 of the diagonal."""
    x = randn(700, 40) + 1
    measured = [Gram.zeros(40) for _ in range(3)]
    measured[0].add(x)
    for part in x.split(97):
        measured[1].add(part)
    monkeypatch.setattr(grams, "TOKENS_PER_PRODUCT", 64)
    measured[2].add(x)
    for gram in measured[1:]:
        torch.testing.assert_close(gram.matrix, measured[0].matrix, rtol=1e-6, atol=1e-3)
        assert gram.count == measured[0].count == 700
    torch.testing.assert_close(measured[2].total, measured[0].total, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_of_any_type_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    x = randn(200, 20).to(dtype)
    gram, regression = Gram.zeros(20), Regression.zeros(20, 5)
    gram.add(x)
    regression.add(x, x[:, :5])
    torch.testing.assert_close(gram.matrix, moments(x), rtol=0, atol=2e-4)
    torch.testing.assert_close(regression.cross, moments(x)[:5], rtol=0, atol=2e-4)
    assert gram.matrix.dtype == regression.cross.dtype == torch.float64


def test_columns_augmented_and_moments_of_the_targets() -> None:
    x, y = randn(50, 6), randn(50, 4, seed=1)
    gram, regression = Gram.zeros(6), Regression.zeros(6, 4)
    gram.add(x)
    regression.add(x[:20], y[:20])
    regression.add(x[20:], y[20:])
    index = torch.tensor([4, 0, 5])
    part = gram.columns(index)
    torch.testing.assert_close(part.matrix, moments(x[:, index]), rtol=0, atol=1e-4)
    torch.testing.assert_close(part.total, x[:, index].double().sum(0))
    assert part.count == 50
    wide = torch.cat([x, torch.ones(50, 1)], 1).double()
    torch.testing.assert_close(gram.augmented(), wide.T @ wide, rtol=0, atol=1e-4)
    cross = regression.augmented_cross()
    torch.testing.assert_close(cross, y.double().T @ wide, rtol=0, atol=1e-4)
    assert regression.target_square == pytest.approx(float(y.double().square().sum()), rel=1e-7)
    assert regression.inputs.count == 50
    assert gram.to("cpu").count == 50


@pytest.mark.parametrize("setting", ["medium", "new", "none"])
def test_no_setting_lowers_the_precision(setting: str) -> None:
    """Autocast and bfloat16 products change the result by 1e-3; both settings come back."""
    if setting == "new" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has no newer setting")
    before = grams._precision()
    x = randn(300, 64)
    gram = Gram.zeros(64)
    try:
        if setting == "medium":
            torch.set_float32_matmul_precision("medium")
        elif setting == "new":
            grams._set_precision(["tf32", "bf16"])
        lowered = grams._precision()
        with torch.autocast("cpu", torch.bfloat16):
            gram.add(x)
            result = refit(gram.matrix, randn(8, 64), random_masks(8, 64, 0.5))[0]
            with full_float32():
                inside = grams._precision()
                assert (x.T @ x).dtype == torch.float32
            assert (x.T @ x).dtype == torch.bfloat16
        assert grams._precision() == lowered
        assert inside in (["ieee", "ieee"], "highest")
    finally:
        grams._set_precision(before)
    torch.testing.assert_close(gram.matrix, moments(x), rtol=0, atol=1e-3)
    expected = refit(gram.matrix, randn(8, 64), random_masks(8, 64, 0.5))[0]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_the_older_setting_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch before 2.9 knows one word for all devices."""
    words = ["high"]
    monkeypatch.setattr(grams, "_precision", lambda: words[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", words.append)
    with full_float32():
        assert words == ["high", "highest"]
    assert words == ["high", "highest", "high"]
    with pytest.raises(UserError):
        refit(torch.full((2, 2), torch.nan), torch.ones(1, 2), [])
    assert words[3:] == ["highest", "high"]  # the word before is put back after an error


def test_losses_of_parameters_need_no_gradient() -> None:
    linear = nn.Linear(3, 2)
    regression = Regression.zeros(3, 2)
    regression.add(randn(9, 3), randn(9, 2, seed=1))
    expected = (linear(randn(9, 3)) - randn(9, 2, seed=1)).square().sum()
    found = regression_error(regression, linear.weight, linear.bias)
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    for seed in range(20):  # rounding leaves a little more or less than nothing
        exact_fit = Regression.zeros(3, 2)
        exact_fit.add(randn(9, 3, seed=seed), randn(9, 3, seed=seed) @ torch.ones(3, 2))
        assert 0 <= regression_error(exact_fit, torch.ones(2, 3)) < 1e-4


# --- scaling


def test_scaled_has_a_unit_diagonal_and_dead_inputs_stand_alone() -> None:
    x = randn(80, 5) * torch.tensor([1.0, 100.0, 0.0, 1e-7, 3.0])
    system = scaled(moments(x), 0.25)
    assert system.dead.tolist() == [False, False, True, True, False]
    assert system.scale[system.dead].tolist() == [1.0, 1.0]
    live = x[:, ~system.dead].double()
    live = live / live.square().sum(0).sqrt()
    expected = 1.25 * torch.eye(5).double()
    index = (~system.dead).nonzero()
    expected[index, index.T] = live.T @ live + 0.25 * torch.eye(3)
    torch.testing.assert_close(system.matrix, expected)
    torch.testing.assert_close(system.inverse(), torch.linalg.inv(expected))
    assert system.inverse() is system.inverse()
    assert system.preconditioner() is system.inverse()
    small = scaled(moments(x), 0.001)
    raised = expected - 0.24 * torch.eye(5)
    torch.testing.assert_close(small.preconditioner(), torch.linalg.inv(raised))


def test_inverse_of_a_singular_matrix_is_finite() -> None:
    x = randn(4, 12)
    system = scaled(moments(x), 0.0)
    inverse = system.inverse()
    assert inverse.isfinite().all()
    own = x.double() / system.scale  # on the span of the data it is an inverse all the same
    back = own @ inverse @ system.matrix
    torch.testing.assert_close(back, own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_pivots_that_are_rounding_do_not_pass(seed: int) -> None:
    """LAPACK takes some singular matrices for definite: their inverse would be noise."""
    own = nn.functional.normalize(randn(5, 3, seed=seed).double())
    assert systems.cholesky(own @ own.T).diagonal().min() ** 2 > 1e-11


def test_only_some_matrices_of_a_batch_are_singular() -> None:
    good, bad = torch.eye(3).double() * 2, torch.ones(3, 3).double()
    factors = systems.cholesky(torch.stack([good, bad, good]))
    assert torch.equal(factors[0], good.sqrt())
    assert torch.equal(factors[2], good.sqrt())
    torch.testing.assert_close(factors[1] @ factors[1].T, bad, rtol=0, atol=1e-7)
    with pytest.raises(UserError, match="not positive semi-definite"):
        systems.cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double())


# --- refit: zeros, never worse


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Tensor], float, str]:
    """Draw X, a weight, masks with empty and full rows among them, a ridge and a solver."""
    tokens, width, rows = (draw(st.integers(1, top)) for top in (30, 20, 6))
    seed = draw(st.integers(0, 2**30))
    x = randn(tokens, width, seed=seed)
    x = x * 10 ** (draw(st.floats(0, 3)) * randn(width, seed=seed + 1)).clamp(-6, 6)
    x = x + draw(st.sampled_from([0.0, 1.0, 100.0]))
    random = torch.Generator().manual_seed(seed)
    masks = []
    for _ in range(draw(st.integers(1, 3))):
        part = torch.rand(rows, 1, generator=random) * 1.4 - 0.2  # 0 or 1 at the ends
        mask = torch.rand(rows, width, generator=random) < part
        masks.append(mask[:1].expand_as(mask) if draw(st.booleans()) else mask)
    if draw(st.booleans()):
        x[:, draw(st.integers(0, width - 1))] = 0
    ridge = draw(st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
    weight = randn(rows, width, seed=seed + 2) * 10 ** draw(st.floats(-3, 3))
    return x, weight, masks, ridge, draw(st.sampled_from(solver.SOLVERS))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_never_worse_exact_zeros_finite(
    drawn: tuple[Tensor, Tensor, list[Tensor], float, str],
) -> None:
    x, weight, masks, ridge, linear_solver = drawn
    matrix = moments(x)
    found = refit(matrix, weight, masks, ridge, linear_solver)
    assert len(found) == len(masks)
    for mask, one in zip(masks, found, strict=True):
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert not one[~mask].any()
        full = mask.all(1)
        assert torch.equal(one[full], weight[full])
        before, after = (
            ((w.double() - weight.double()) @ x.double().T).square().sum(1)
            for w in (weight * mask, one)
        )
        size = (weight.double().abs() @ x.double().abs().T).square().sum(1)
        assert (after <= before * (1 + 1e-9) + 1e-13 * size).all()


@given(problems())
@settings(max_examples=60, deadline=None)
def test_never_worse_with_other_targets(
    drawn: tuple[Tensor, Tensor, list[Tensor], float, str],
) -> None:
    x, weight, masks, ridge, linear_solver = drawn
    y = (x @ weight.T + randn(len(x), len(weight), seed=5) * weight.abs().mean()).double()
    cross = y.T @ x.double()
    for mask, one in zip(
        masks, refit(moments(x), weight, masks, ridge, linear_solver, cross), strict=True
    ):
        assert one.isfinite().all()
        assert not one[~mask].any()
        before, after = (
            (x.double() @ w.double().T - y).square().sum(0) for w in (weight * mask, one)
        )
        size = (x.double().abs() @ weight.double().abs().T).square().sum(0) + y.square().sum(0)
        assert (after <= before * (1 + 1e-9) + 1e-13 * size).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.0])
def test_rows_that_went_wrong_are_only_pruned(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, weight, masks = moments(randn(90, 8)), randn(4, 8), random_masks(4, 8, 0.5)
    good = refit(matrix, weight, masks)[0]

    def wrong(*arguments: Tensor) -> Tensor:
        result = systems.conjugate_gradient(*arguments)
        result[1] += value
        return result

    monkeypatch.setattr(solver, "conjugate_gradient", wrong)
    found = refit(matrix, weight, masks)[0]
    assert torch.equal(found[1], (weight * masks[0])[1])
    assert torch.equal(found[[0, 2, 3]], good[[0, 2, 3]])


# --- refit: degenerate inputs


@pytest.mark.parametrize("linear_solver", solver.SOLVERS)
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_constant_inputs_only_prune(linear_solver: str, ridge: float) -> None:
    """All zero, one token, a constant vector, summed in float32."""
    weight = randn(5, 40)
    masks = [*random_masks(5, 40, 0.5), torch.arange(40).expand(5, -1) > 3]
    constant = randn(1, 40, seed=3).expand(9000, -1)
    for x in (torch.zeros(20, 40), constant[:1], constant, -constant):
        gram = Gram.zeros(40)
        gram.add(x)
        assert is_constant(gram.matrix)
        for mask, one in zip(
            masks, refit(gram.matrix, weight, masks, ridge, linear_solver), strict=True
        ):
            assert torch.equal(one, weight * mask)
    assert not is_constant(moments(randn(2, 9)))
    assert not is_constant(moments(randn(9, 1)))


@pytest.mark.parametrize("linear_solver", solver.SOLVERS)
def test_dead_inputs_keep_their_weight_and_change_nothing(linear_solver: str) -> None:
    x, weight, masks = randn(90, 8) @ randn(8, 8), randn(6, 8), random_masks(6, 8, 0.3, 0.6)
    dead = torch.tensor([1, 6])
    weight[:, dead] *= 1e6  # may not pass for a loss that the rest is small against
    live = torch.tensor([0, 2, 3, 4, 5, 7])
    x[:, dead] = 0
    small = refit(
        moments(x[:, live]), weight[:, live], [mask[:, live] for mask in masks], 1e-2, linear_solver
    )
    for mask, one, without in zip(
        masks, refit(moments(x), weight, masks, 1e-2, linear_solver), small, strict=True
    ):
        assert torch.equal(one[:, dead], (weight * mask)[:, dead])
        torch.testing.assert_close(one[:, live], without, rtol=0, atol=1e-5)


@pytest.mark.parametrize("power", [-25, -6, 6, 25])
@pytest.mark.parametrize("linear_solver", solver.SOLVERS)
def test_the_unit_of_the_inputs_does_not_matter(linear_solver: str, power: int) -> None:
    """Squares of 1e25 would leave float32."""
    matrix, weight, masks = moments(randn(90, 8)), randn(6, 8), random_masks(6, 8, 0.3, 0.6)
    matrix[0, 1:] = matrix[1:, 0] = matrix[0, 0] = 0  # a dead input has no unit
    expected = refit(matrix, weight, masks, 1e-2, linear_solver)
    found = refit(matrix * 10.0 ** (2 * power), weight, masks, 1e-2, linear_solver)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("linear_solver", solver.SOLVERS)
@pytest.mark.parametrize(("tokens", "width", "rows"), [(1, 1, 1), (9, 1, 1), (9, 1, 4), (9, 5, 1)])
def test_smallest_shapes(linear_solver: str, tokens: int, width: int, rows: int) -> None:
    matrix, weight = moments(randn(tokens, width)), randn(rows, width)
    masks = [torch.ones(rows, width, dtype=torch.bool), torch.zeros(rows, width, dtype=torch.bool)]
    kept, gone = refit(matrix, weight, masks, 0.0, linear_solver)
    assert torch.equal(kept, weight)
    assert not gone.any()
    assert refit(matrix, weight, [], 0.0, linear_solver) == []


# --- refit: grouping


@pytest.mark.parametrize("linear_solver", solver.SOLVERS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_rates_together_are_rates_alone(
    linear_solver: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in any order, and in batches that end within a rate."""
    x = randn(400, 60) * torch.arange(1, 61) ** -0.7 @ randn(60, 60, seed=1)
    matrix, weight = moments(x), randn(30, 60, seed=2)
    masks = random_masks(30, 60, 0.25, 0.5, 0.75)
    masks.insert(1, masks[0][:1].expand(30, -1))
    alone = [refit(matrix, weight, [mask], 1e-2, linear_solver)[0] for mask in masks]
    if chunk:
        monkeypatch.setattr(solver, "BYTES", chunk * solver.ROW_COPIES * 4 * 60)
        monkeypatch.setitem(systems.BATCH_BYTES, "cpu", 1)
    together = refit(matrix, weight, masks, 1e-2, linear_solver)
    backward = refit(matrix, weight, masks[::-1], 1e-2, linear_solver)[::-1]
    for one, other, third in zip(alone, together, backward, strict=True):
        loss = squared_error(matrix, one - weight)
        assert squared_error(matrix, other - weight) == pytest.approx(loss, rel=1e-5)
        assert squared_error(matrix, third - weight) == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_rows_do_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Easy rows leave the batch, hard ones stay; all end as they do alone."""
    sizes: list[int] = []
    advance = systems._advance

    def counted(rows: systems._Rows, *others: Tensor) -> None:
        sizes.append(len(rows.index))
        advance(rows, *others)

    monkeypatch.setattr(systems, "_advance", counted)
    x = randn(500, 50) * torch.arange(1, 51) ** -1.0 @ randn(50, 50, seed=1)
    matrix, weight = moments(x), randn(20, 50, seed=2)
    mask = random_masks(20, 50, 0.5)[0]
    mask[:10] = ~torch.eye(10, 50, dtype=torch.bool)  # one input is removed
    found = refit(matrix, weight, [mask])[0]
    assert sizes[0] == 20
    assert sorted(sizes, reverse=True) == sizes
    assert sizes[-1] <= 10
    both = len(sizes)
    easy = refit(matrix, weight[:10], [mask[:10]])[0]
    assert len(sizes) - both < both
    hard = refit(matrix, weight[10:], [mask[10:]])[0]
    torch.testing.assert_close(torch.cat([easy, hard]), found, rtol=0, atol=1e-4)


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """Return a list that grows with every call of this function of `systems`."""
    calls: list[None] = []
    function = getattr(systems, name)

    def counted(*arguments: object) -> None:
        calls.append(None)
        function(*arguments)

    monkeypatch.setattr(systems, name, counted)
    return calls


def test_a_row_ends_after_two_small_steps_or_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = count(monkeypatch, "_advance")
    eye = torch.eye(3)
    matrix = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
    goal, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, False]])
    found = systems.conjugate_gradient(matrix, eye, goal, goal * mask, mask)
    torch.testing.assert_close(found, torch.tensor([[1 + 2 * 0.6, 0.0, 0.0]]))
    assert len(steps) == 3  # the one that solves it, and two that find nothing
    copies = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    steps.clear()
    mask = torch.tensor([[True, False, True]])
    found = systems.conjugate_gradient(copies, eye, goal, goal * mask, mask)
    assert torch.equal(found, torch.tensor([[3.0, 0.0, 3.0]]))
    assert len(steps) == 1


def test_rows_without_anything_to_solve_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual of 0 from the start: no 0 / 0."""
    eye, goal = torch.eye(12), randn(9, 12)
    mask = random_masks(9, 12, 0.5)[0]
    start = torch.where(mask, goal, 0.0)
    assert torch.equal(systems.conjugate_gradient(eye, eye, goal, start, mask), start)


def test_the_residual_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "TOLERANCE", -1.0)
    steps, restarts = count(monkeypatch, "_advance"), count(monkeypatch, "_restart")
    refit(moments(randn(90, 30)), randn(9, 30), random_masks(9, 30, 0.5))
    assert (len(steps), len(restarts)) == (60, 3)


# --- errors

INDEFINITE = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"matrix": torch.ones(3, 4)}, ShapeError, r"is square; this one has the shape \(3, 4\)"),
        ({"weight": torch.ones(2, 4)}, ShapeError, r"shape \(2, 4\) does not fit 3 inputs"),
        ({"masks": [torch.ones(2, 2) > 0]}, ShapeError, r"mask has the shape \(2, 2\), \(2, 3\)"),
        ({"cross": torch.ones(3, 3)}, ShapeError, r"cross has the shape \(3, 3\), \(2, 3\)"),
        ({"matrix": torch.full((3, 3), torch.nan)}, UserError, "NaN or infinity"),
        ({"ridge": -0.1}, UserError, "the ridge is -0.1"),
        ({"ridge": float("nan")}, UserError, "the ridge is nan"),
        ({"linear_solver": "magic"}, UserError, 'no linear solver "magic"; there are pcg, exact'),
        ({"matrix": INDEFINITE}, UserError, "not positive semi-definite"),
    ],
)
def test_errors(change: dict[str, object], error: type[UserError], message: str) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    arguments: dict[str, object] = {
        "matrix": torch.eye(3),
        "weight": torch.ones(2, 3),
        "masks": [mask],
    }
    with pytest.raises(error, match=message):
        refit(**(arguments | change))  # type: ignore[arg-type]
