"""Masked least squares against dense solves of each row in numpy, float64, from formula or data."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from composable.linalg import solver, systems
from composable.linalg.grams import Gram, Regression
from composable.linalg.solver import refit, regression_error, solve, squared_error

ROWS, WIDTH, TOKENS = 24, 40, 600
RATES = (0.25, 0.5, 0.75)
KINDS = ["random", "anisotropic", "low rank", "duplicates", "fewer tokens than inputs"]


def inputs(kind: str, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Draw X (tokens, width) in float32."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, width, generator=random)
    if kind == "anisotropic":
        x = x * torch.arange(1, width + 1) ** -1.0 @ torch.randn(width, width, generator=random)
        x = (x + 0.3) * 10 ** torch.linspace(-2, 2, width)
    elif kind == "low rank":
        x = x[:, :6] @ torch.randn(6, width, generator=random)
    elif kind == "duplicates":
        x[:, width // 2 :] = x[:, : width - width // 2]
    elif kind == "fewer tokens than inputs":
        x = x[: width // 3]
    return x


def problem(kind: str, width: int = WIDTH) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return H in float64, a weight whose inputs matter equally, and a mask per rate."""
    x = inputs(kind, width).double()
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, width, generator=random) / x.square().mean(0).sqrt().float()
    masks = [torch.rand(ROWS, width, generator=random) >= rate for rate in RATES]
    return x.T @ x, weight, masks


def dense_solve(
    matrix: Tensor, weight: Tensor, mask: Tensor, ridge: float, cross: Tensor | None = None
) -> np.ndarray:
    """Normal equations of each row, unscaled: (H + ridge D)[K, K] w = (Y^T X + ridge w0 D)[K]."""
    moments, dense, kept = matrix.numpy(), weight.double().numpy(), mask.numpy()
    diagonal = ridge * np.diag(np.diag(moments))
    right = (dense @ moments if cross is None else cross.double().numpy()) + dense @ diagonal
    found = np.zeros_like(dense)
    for row, k in enumerate(kept):
        found[row, k] = np.linalg.solve((moments + diagonal)[np.ix_(k, k)], right[row, k])
    return found


def objective(matrix: Tensor, ridge: float, difference: np.ndarray) -> float:
    """What a row minimises, summed: e (H + ridge D) e^T."""
    moments = matrix.numpy() + ridge * np.diag(np.diag(matrix.numpy()))
    return float(np.einsum("ri,ij,rj->", difference, moments, difference))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [None, 4000])
def test_exact_is_the_dense_solve(
    kind: str, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides, kept and removed inputs, in one padded batch or in many."""
    matrix, weight, masks = problem(kind)
    if batch:
        monkeypatch.setitem(systems.BATCH_BYTES, "cpu", batch)
    unit = matrix.diagonal().sqrt().numpy() / TOKENS**0.5
    for mask, found in zip(masks, refit(matrix, weight, masks, linear_solver="exact"), strict=True):
        expected = dense_solve(matrix, weight, mask, 1e-2)
        np.testing.assert_allclose(found.numpy() * unit, expected * unit, rtol=0, atol=1e-5)
        assert not found[~mask].any()


@pytest.mark.parametrize("width", [1, 2, 3, 7, 40])
def test_exact_at_every_size_of_the_support(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that keep 0, 1, ... all inputs, in one matrix; the smaller side, and no jitter."""
    small_systems = systems._small_systems

    def watched(matrix: Tensor, right: Tensor, support: Tensor) -> Tensor:
        assert 2 * int(support.sum(1).max()) <= width
        return small_systems(matrix, right, support)

    monkeypatch.setattr(systems, "_small_systems", watched)
    monkeypatch.setattr(systems, "JITTER", systems.JITTER[:2])
    x = inputs("random", width).double()
    random = torch.Generator().manual_seed(2)
    matrix, weight = x.T @ x, torch.randn(width + 1, width, generator=random)
    mask = torch.arange(width)[None] < torch.arange(width + 1)[:, None]
    mask = mask[:, torch.randperm(width, generator=random)]
    found = refit(matrix, weight, [mask], linear_solver="exact")[0]
    np.testing.assert_allclose(found, dense_solve(matrix, weight, mask, 1e-2), rtol=0, atol=1e-5)
    assert torch.equal(found[-1], weight[-1])  # nothing removed: to the last bit


@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_gradient_ends_within_a_percent(kind: str) -> None:
    matrix, weight, masks = problem(kind)
    for mask, found in zip(masks, refit(matrix, weight, masks), strict=True):
        best = objective(matrix, 1e-2, dense_solve(matrix, weight, mask, 1e-2) - weight.numpy())
        plain = objective(matrix, 1e-2, (weight * mask - weight).double().numpy())
        reached = objective(matrix, 1e-2, found.double().numpy() - weight.double().numpy())
        assert best * (1 - 1e-4) <= reached <= best * 1.01
        assert reached < 0.99 * plain
        assert not found[~mask].any()


def test_a_small_ridge_does_not_stall_on_duplicates() -> None:
    """With the ridge of the data in the preconditioner too, it ended 4 % above the optimum."""
    matrix, weight, masks = problem("duplicates", 120)
    for mask, found in zip(masks, refit(matrix, weight, masks, ridge=1e-5), strict=True):
        best = objective(matrix, 0, dense_solve(matrix, weight, mask, 1e-5) - weight.numpy())
        assert objective(matrix, 0, found.double().numpy() - weight.double().numpy()) < 1.005 * best


def test_conjugate_gradient_converges_through_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "TOLERANCE", 0.0)
    monkeypatch.setattr(systems, "RESTART", 7)
    matrix, weight, masks = problem("anisotropic")
    unit = matrix.diagonal().sqrt().numpy() / TOKENS**0.5
    for mask, found in zip(masks, refit(matrix, weight, masks), strict=True):
        expected = dense_solve(matrix, weight, mask, 1e-2)
        np.testing.assert_allclose(found.numpy() * unit, expected * unit, rtol=0, atol=2e-3)


@pytest.mark.parametrize("linear_solver", ["pcg", "exact"])
@pytest.mark.parametrize("shared", [False, True])
def test_other_targets(linear_solver: str, shared: bool) -> None:
    """The dense outputs from drifted inputs, with the ridge to a third weight."""
    random = torch.Generator().manual_seed(3)
    x = inputs("anisotropic")
    drifted = (x + 0.3 * x.std(0) * torch.randn(x.shape, generator=random)).double()
    _, weight, masks = problem("anisotropic")
    y = x.double() @ weight.double().T
    start = weight * (1 + 0.1 * torch.randn(weight.shape, generator=random))
    matrix, cross = drifted.T @ drifted, y.T @ drifted
    if shared:
        masks = [mask[:1].expand_as(mask) for mask in masks]
    found = refit(matrix, start, masks, linear_solver=linear_solver, cross=cross)
    for mask, one in zip(masks, found, strict=True):

        def loss(w: np.ndarray) -> float:
            pull = objective(matrix, 1e-2, w - start.numpy()) - objective(
                matrix, 0, w - start.numpy()
            )
            return float(np.square(drifted.numpy() @ w.T - y.numpy()).sum()) + pull

        best = loss(dense_solve(matrix, start, mask, 1e-2, cross))
        limit = 1.01 if linear_solver == "pcg" and not shared else 1 + 1e-6
        assert best * (1 - 1e-9) <= loss(one.double().numpy()) <= best * limit
        assert loss((start * mask).double().numpy()) > 1.05 * best


def test_without_ridge_it_is_the_least_squares_fit_to_the_data() -> None:
    """The solution of numpy's lstsq on X and Y, which knows no Gram matrix."""
    x = inputs("random")
    _, weight, masks = problem("random")
    gram = Gram.zeros(WIDTH)
    gram.add(x)
    y = x.numpy() @ weight.numpy().T
    shared = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    shared[:, ::3] = True
    for mask in (*masks, shared):
        found = refit(gram.matrix, weight, [mask], ridge=0.0, linear_solver="exact")[0]
        for row, k in enumerate(mask.numpy()):
            expected = np.linalg.lstsq(x.numpy()[:, k], y[:, row], rcond=None)[0]
            np.testing.assert_allclose(found[row].numpy()[k], expected, rtol=0, atol=2e-5)


def columns(*removed: int, width: int = WIDTH) -> Tensor:
    """A mask without some inputs."""
    mask = torch.ones(ROWS, width, dtype=torch.bool)
    mask[:, list(removed)] = False
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [1e-2, 0.0])
@pytest.mark.parametrize("linear_solver", ["pcg", "exact"])
def test_errors_of_solutions(kind: str, ridge: float, linear_solver: str) -> None:
    """Plain products over the data; for targets of the weight itself, and of another one."""
    x = inputs(kind).double()
    matrix, weight, masks = problem(kind)
    other = weight * (1 + 0.1 * torch.randn(weight.shape, generator=torch.Generator()))
    masks = [*masks, columns(*range(0, WIDTH, 3)), columns(), ~columns()]
    size = float((weight.double() @ x.T).square().sum())
    for start, cross in ((weight, None), (other, weight.double() @ matrix)):
        for found in solve(matrix, start, masks, ridge, linear_solver, cross):
            outputs = (found.weight.double() - weight.double()) @ x.T
            expected = float(outputs.square().sum())
            assert found.error(weight) == pytest.approx(expected, rel=1e-6, abs=1e-12 * size)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 40])
def test_the_squared_error_is_the_plain_product(width: int) -> None:
    """Whatever columns of the difference are 0."""
    x = inputs("anisotropic", width).double().numpy()
    random = np.random.default_rng(0)
    for kept in (width, width // 2, 1, 0):
        error = random.normal(size=(ROWS, width))
        error[:, random.permutation(width)[kept:]] = 0
        found = squared_error(torch.from_numpy(x.T @ x), torch.from_numpy(error))
        assert found == pytest.approx(np.square(x @ error.T).sum(), rel=1e-12, abs=1e-30)


@pytest.mark.parametrize("ridge", [1e-2, 1e-6, 0.0])
@pytest.mark.parametrize("kind", ["random", "anisotropic"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_largest_coefficient_is_that_of_the_formula(
    kind: str, ridge: float, bias: bool
) -> None:
    """T = (G_KK + ridge diag(G_KK))^-1 G_KE, a constant input is kept; without ridge by lstsq."""
    x = inputs(kind).numpy().astype(np.float64)
    x = np.hstack([x, np.ones((TOKENS, 1))]) if bias else x
    width, gram = x.shape[1], x.T @ x
    weight = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1))
    removed = [0, 3, 4, 17, 30]
    kept = [i for i in range(width) if i not in removed]
    block = gram[np.ix_(kept, kept)]
    wanted = np.linalg.solve(block + ridge * np.diag(np.diag(block)), gram[np.ix_(kept, removed)])
    if ridge == 0:
        direct = np.linalg.lstsq(x[:, kept], x[:, removed], rcond=None)[0]
        np.testing.assert_allclose(wanted, direct, rtol=1e-5, atol=1e-8)
    mask = columns(*removed, width=width)
    (found,) = solve(torch.from_numpy(gram), weight, [mask], ridge)
    assert found.largest_coefficient == pytest.approx(np.abs(wanted).max(), rel=1e-6)
    corrected = weight.double().numpy()[:, removed] @ wanted.T + weight.double().numpy()[:, kept]
    np.testing.assert_allclose(found.weight.numpy()[:, kept], corrected, rtol=1e-4, atol=1e-4)


def test_coefficients_of_copies_and_of_dead_inputs() -> None:
    """A copy ten times as large stands in by 0.1; what is always 0 needs nobody."""
    x = inputs("random").double()
    x[:, 1], x[:, 2], x[:, 3] = 10 * x[:, 0], 0, 0
    matrix, weight = x.T @ x, torch.randn(ROWS, WIDTH)
    for removed, largest in (((0,), 0.1), ((1,), 10.0), ((2,), 0.0), ((0, 2), 0.1)):
        (found,) = solve(matrix, weight, [columns(*removed)], 0.0)
        assert found.largest_coefficient == pytest.approx(largest, abs=1e-6)


def test_only_whole_inputs_have_coefficients() -> None:
    matrix, weight, masks = problem("random")
    for mask in (*masks, columns(), ~columns()):
        (found,) = solve(matrix, weight, [mask])
        assert found.largest_coefficient is None


def test_a_huge_ridge_only_prunes() -> None:
    matrix, weight, masks = problem("random")
    for kind in ("pcg", "exact"):
        for mask, found in zip(masks, refit(matrix, weight, masks, 1e9, kind), strict=True):
            torch.testing.assert_close(found, weight * mask, rtol=0, atol=1e-6)


@pytest.mark.parametrize("linear_solver", ["pcg", "exact"])
def test_one_support_for_all_rows(linear_solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed columns, as of heads: one factorisation, neither of the solvers for many rows."""
    monkeypatch.setattr(solver, "conjugate_gradient", None)
    monkeypatch.setattr(solver, "exact", None)
    matrix, weight, _ = problem("anisotropic")
    unit = matrix.diagonal().sqrt().numpy() / TOKENS**0.5
    masks = [(torch.arange(WIDTH) % step > 0).expand(ROWS, -1) for step in (2, 4)]
    for mask, found in zip(masks, refit(matrix, weight, masks, 1e-2, linear_solver), strict=True):
        expected = dense_solve(matrix, weight, mask, 1e-2)
        np.testing.assert_allclose(found.numpy() * unit, expected * unit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_module_on_the_data(kind: str, bias: bool) -> None:
    """Gram loss, squared output and regression error against nn.Linear run on the tokens."""
    x = inputs(kind)
    _, weight, masks = problem(kind)
    linear, other = nn.Linear(WIDTH, ROWS, bias), nn.Linear(WIDTH, ROWS, bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
        other.weight.copy_(weight * masks[1])
    gram, regression = Gram.zeros(WIDTH), Regression.zeros(WIDTH, ROWS)
    with torch.no_grad():
        targets = linear(x)
        for part in range(0, len(x), 100):
            gram.add(x[part : part + 100])
            regression.add(x[part : part + 100], targets[part : part + 100])
        squares = (other.double()(x.double()) - linear.double()(x.double())).square()
    if bias:
        matrix = gram.augmented()
        first, second = (
            torch.cat([module.weight, module.bias[:, None]], 1).detach()
            for module in (linear, other)
        )
    else:
        matrix, first, second = gram.matrix, linear.weight.detach(), other.weight.detach()
    loss = squared_error(matrix, second - first) / (gram.count * ROWS)
    assert loss == pytest.approx(float(squares.mean()), rel=1e-5)
    output = linear(x.double()).detach().square().sum()
    assert squared_error(matrix, first) == pytest.approx(float(output), rel=1e-5)
    found = regression_error(regression, other.weight.detach(), other.bias)
    assert found == pytest.approx(float(squares.sum()), rel=1e-5, abs=1e-6 * float(output))


@pytest.mark.parametrize("linear_solver", ["pcg", "exact"])
def test_the_bias_repairs_a_constant_mean(linear_solver: str) -> None:
    """Inputs around a mean of 3: what the removed ones add on average goes into the bias."""
    random = torch.Generator().manual_seed(4)
    x = 0.5 * torch.randn(TOKENS, WIDTH, generator=random) + 3
    x[:, 0] = 2.0  # constant, and removed everywhere: the bias alone can stand for it
    weight = torch.randn(ROWS, WIDTH, generator=random)
    bias = torch.randn(ROWS, generator=random)
    gram = Gram.zeros(WIDTH)
    gram.add(x)
    mask = torch.rand(ROWS, WIDTH, generator=random) > 0.5
    mask[:, 0] = False
    wide = torch.cat([mask, torch.ones(ROWS, 1, dtype=torch.bool)], 1)
    both = torch.cat([weight, bias[:, None]], 1)
    found = refit(gram.augmented(), both, [wide], 1e-6, linear_solver)[0]
    y = nn.functional.linear(x, weight, bias)

    def error(w: Tensor, b: Tensor) -> float:
        return float(nn.functional.mse_loss(nn.functional.linear(x, w, b), y))

    with_bias, pruned = error(found[:, :-1], found[:, -1]), error(weight * mask, bias)
    variance = float(((weight * ~mask)[:, 1:].square() * 0.25).sum(1).mean())
    assert with_bias < variance * 1.02 < 0.2 * pruned  # no better fit of independent inputs
    only = torch.ones_like(both, dtype=torch.bool)
    only[:, 0] = False
    expected = both.clone()
    expected[:, -1] += 2.0 * both[:, 0]
    expected[:, 0] = 0
    for masks in ([only], [only, wide]):
        found = refit(gram.augmented(), both, masks, 1e-8, linear_solver)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
