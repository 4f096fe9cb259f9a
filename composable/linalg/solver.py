"""Masked least squares: refits the weights of a linear from the second moments of its inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from composable.errors import ShapeError, UserError
from composable.linalg.grams import Regression, column_blocks, full_float32
from composable.linalg.systems import cholesky, conjugate_gradient, exact, shared_support

SOLVERS = ("pcg", "exact")
DEAD = 1e-12  # of the largest second moment
CONSTANT = 1 - 5e-5  # cosine of two inputs from which they are one; sums in float32 reach 2e-5
#: Relative to the unit diagonal. Costs 0.3 % of the loss where there is plenty of data, and saves a
#: factor 3 where there are fewer tokens than inputs.
RIDGE = 1e-2
PRECONDITIONER_RIDGE = 1e-2
BYTES = 512 * 2**20  # of the rows that are solved together
ROW_COPIES = 9  # float32 tensors per row of such a batch


@dataclass
class Scaled:
    """A Gram matrix in units in which every input has the second moment 1.

    Attributes:
        matrix: Hs (n, n) float64: unit diagonal, plus the ridge; rows and columns of dead
            inputs are those of the identity.
        scale: s (n,) float64, Hs = H / (s s^T); 1 for dead inputs. V = W * s.
        dead: (n,) bool: inputs that are always 0 (below 1e-12 of the largest second moment);
            all of them where the input is constant, see `scaled`.
        ridge: that was added.
    """

    matrix: Tensor
    scale: Tensor
    dead: Tensor
    ridge: float
    _inverse: Tensor | None = field(default=None, init=False, repr=False)

    def inverse(self) -> Tensor:
        """Return G = Hs^-1 (n, n) float64, computed once; see `cholesky` for a singular Hs."""
        if self._inverse is None:
            self._inverse = torch.cholesky_inverse(cholesky(self.matrix))
        return self._inverse

    def preconditioner(self) -> Tensor:
        """Return G (n, n) float64 for the conjugate gradient, with a ridge of 0.01 at least.

        Below that, G is so large between inputs that are nearly copies that the first steps
        stall: 4 % above the optimum on duplicated inputs, 0.01 % with the larger ridge.
        """
        if self.ridge >= PRECONDITIONER_RIDGE:
            return self.inverse()
        raised = self.matrix.clone()
        raised.diagonal().add_(PRECONDITIONER_RIDGE - self.ridge)
        return torch.cholesky_inverse(cholesky(raised))


def scaled(matrix: Tensor, ridge: float) -> Scaled:
    """Scale a Gram matrix (n, n) to a unit diagonal and add `ridge` to it.

    Where the input is one constant vector (up to its sign and length, or there is one token), all
    inputs count as dead: any of them could stand for the others, which no other text bears out.

    Raises:
        ShapeError: the matrix is not square.
        UserError: it holds values that are not finite; the ridge is negative.
    """
    if not ridge >= 0:
        raise UserError(f"the ridge is {ridge}; a number from 0 was expected, like 0.01.")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a Gram matrix is square; this one has the shape {tuple(matrix.shape)}.")
    if not bool(torch.isfinite(matrix).all()):
        raise UserError(
            "the second moments of a linear's inputs hold NaN or infinity: finite values were "
            "expected; check the model and the number type that it runs in."
        )
    diagonal = matrix.diagonal().double()
    dead = diagonal <= DEAD * diagonal.max()
    first = int((~dead).byte().argmax())
    alike = matrix[first].double().square() >= CONSTANT**2 * diagonal[first] * diagonal
    if int((~dead).sum()) > 1 and bool((alike | dead).all()):
        dead = torch.ones_like(dead)
    scale = torch.where(dead, 1.0, diagonal.clamp(min=0).sqrt())
    alive = torch.where(dead, 0.0, 1 / scale)
    units = matrix.double() * alive[:, None] * alive
    units.diagonal().fill_(1.0 + ridge)
    return Scaled(units, scale, dead, ridge)


def is_constant(matrix: Tensor) -> bool:
    """Tell whether a Gram matrix is of inputs that are all 0 or constant: `refit` only prunes."""
    return bool(scaled(matrix, 0.0).dead.all())


@dataclass(frozen=True)
class Solution:
    """Least-squares weights for one mask.

    Attributes:
        weight: float32 (rows, n) on the CPU, exactly 0 where masked.
        residual: (X w - y)^T X, (rows, n) float64 on the device where it was computed: half the
            gradient of |X w - y|^2.
        largest_coefficient: largest |T|, where all rows keep the same inputs K and others, E, go:
            T = (H_KK + ridge diag(H_KK))^-1 H_KE, and X_K T is close to X_E. None: rows differ.
    """

    weight: Tensor
    residual: Tensor
    largest_coefficient: float | None

    def error(self, target: Tensor) -> float:
        """Return |X w - y|^2 summed over tokens and rows, where y = target (rows, n) x inputs."""
        difference = self.weight.to(self.residual) - target.to(self.residual)
        return float(torch.linalg.vecdot(difference, self.residual).sum())


def refit(*problem: Any, **settings: Any) -> list[Tensor]:
    """Return the weights that `solve`, which takes the same arguments, finds for all masks."""
    return [solution.weight for solution in solve(*problem, **settings)]


def solve(
    matrix: Tensor,
    weight: Tensor,
    masks: Sequence[Tensor],
    ridge: float = RIDGE,
    linear_solver: str = "pcg",
    cross: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Solution]:
    """Find the least-squares weights for several masks of one linear.

    Minimises per row |X w - y|^2 + ridge * (w - w0) D (w - w0)^T with D = diag(H), w = 0 where
    masked. With the minimum v* over all w in scaled units, v* Hs = cross / s + ridge * v0, this
    is (v - v*) Hs (v - v*)^T up to a constant: v* = v0 where the targets are `weight` x inputs.

    Args:
        matrix: H = X^T X (n, n); with a bias `Gram.augmented()`, then weight and masks have its
            column as their last one, and the masks keep it.
        weight: w0 (rows, n): what the ridge pulls to, and the start.
        masks: (rows, n) bool each, True where a weight stays.
        ridge: added to the unit diagonal.
        linear_solver: "pcg", within about 1 % of the optimum, or "exact". A mask that is the same
            in all rows is one exact factorisation in both.
        cross: Y^T X (rows, n) where the targets Y are not weight x inputs.
        device: where to compute, one that knows float64.

    Yields:
        For each mask, in their order. No row is worse on `matrix` than weight * mask: where nothing
        was gained, it is just that.

    Raises:
        ShapeError: tensors do not fit together.
        UserError: `matrix` is no Gram matrix; an unknown solver.
    """
    _check(weight, matrix, masks, cross)
    if linear_solver not in SOLVERS:
        raise UserError(f'no linear solver "{linear_solver}"; there are {", ".join(SOLVERS)}.')
    moments, dense = matrix.to(device, torch.float64), weight.to(device, torch.float64)
    targets = None if cross is None else cross.to(device, torch.float64)
    kept = [mask.to(device) for mask in masks]
    shared = [bool((mask == mask[:1]).all()) for mask in kept]
    with torch.no_grad(), full_float32(device):
        system = scaled(moments, ridge)
        start, goal, units = _in_units(system, dense, targets)
        varying = [mask for mask, same in zip(kept, shared, strict=True) if not same]
        if linear_solver == "pcg":
            solved = iter(_by_gradient(system, start, goal, varying))
        else:
            solved = (exact(system.matrix, system.inverse(), goal, mask) for mask in varying)
    for mask, same in zip(kept, shared, strict=True):
        # not held while the caller computes
        with torch.no_grad(), full_float32(device):
            largest = None
            if same:
                found, coefficients = shared_support(system.matrix, goal, mask[0])
                largest = _largest(system, coefficients, mask[0])
            else:
                found = next(solved)
            found = torch.where(system.dead, dense, found / units)
            result = _never_worse(moments, dense, targets, mask, found)
        yield Solution(result[0].cpu(), result[1], largest)


def _largest(system: Scaled, coefficients: Tensor, kept: Tensor) -> float | None:
    """Return the largest |T| of T = diag(1 / s_kept) Ts diag(s_removed); None: T is empty."""
    if not coefficients.numel():
        return None
    units = system.scale[~kept] / system.scale[kept][:, None]
    return float((coefficients * units).abs().max())


def _check(weight: Tensor, matrix: Tensor, masks: Sequence[Tensor], cross: Tensor | None) -> None:
    width = len(matrix)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise ShapeError(
            f"a weight of shape {tuple(weight.shape)} does not fit {width} inputs: (rows, {width}) "
            "was expected, with the bias as the last column where there is one."
        )
    for name, tensor in [("mask", mask) for mask in masks] + [("cross", cross)]:
        if tensor is not None and tensor.shape != weight.shape:
            raise ShapeError(
                f"{name} has the shape {tuple(tensor.shape)}, {tuple(weight.shape)} was expected."
            )


def _in_units(system: Scaled, dense: Tensor, cross: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return start, goal (the minimum without a mask) and the units w is multiplied with."""
    largest = torch.where(system.dead, 0.0, system.scale).max()
    largest = torch.where(largest > 0, largest, 1.0)  # squares of the start stay in float32
    units = torch.where(system.dead, 1.0, system.scale / largest)
    start = torch.where(system.dead, 0.0, dense * units)
    if cross is None:
        return start, start, units
    pull = torch.where(system.dead, 0.0, cross / (system.scale * largest)) + system.ridge * start
    return start, pull @ system.inverse(), units


def _by_gradient(system: Scaled, start: Tensor, goal: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """Solve all rows of all masks together, as many at once as the memory allows."""
    if not masks:
        return []
    matrix, inverse = system.matrix.float(), system.preconditioner().float()
    start, goal = start.float(), goal.float()
    mask = torch.cat(masks)
    size = max(1, BYTES // (ROW_COPIES * 4 * mask.shape[1]))
    found = []
    for part, index in zip(
        mask.split(size), torch.arange(len(mask), device=mask.device).split(size), strict=True
    ):
        row = index % len(start)
        begin = torch.where(part, start[row], 0.0)
        found.append(conjugate_gradient(matrix, inverse, goal[row], begin, part).double())
    return list(torch.cat(found).chunk(len(masks)))


def _never_worse(
    moments: Tensor, dense: Tensor, cross: Tensor | None, mask: Tensor, found: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `found` in float32, but dense * mask in the rows that are no better than this.

    With the residual r = (w + d) H - Y^T X of the new weights w + d, and r0 that of the old ones,
    |X (w + d) - y|^2 - |X w - y|^2 = d (r + r0) = 2 d r - d H d. It is below 0 wherever d r is, as
    in most rows under a ridge; r0 is computed for the other rows alone.

    Returns:
        Weights and residuals, (rows, n) both, the latter float64.
    """

    def residual(weight: Tensor, rows: Tensor | slice) -> Tensor:
        if cross is None:
            return (weight.double() - dense[rows]) @ moments
        return weight.double() @ moments - cross[rows]

    plain = torch.where(mask, dense, 0.0).float()
    refitted = torch.where(mask, found, 0.0).float()
    difference = refitted.double() - plain.double()
    after = residual(refitted, slice(None))
    unsure = (~(torch.linalg.vecdot(difference, after) < 0)).nonzero()[:, 0]  # also where it is NaN
    if len(unsure):
        before = residual(plain[unsure], unsure)
        gain = torch.linalg.vecdot(difference[unsure], after[unsure] + before)
        worse = ~(gain < 0)
        refitted[unsure[worse]] = plain[unsure[worse]]
        after[unsure[worse]] = before[worse]
    return refitted, after


def squared_error(matrix: Tensor, difference: Tensor) -> float:
    """Return tr(E H E^T) for E (rows, n) and H (n, n): |X E^T|^2 over all tokens and rows.

    With E = refitted - dense weight, divided by count * rows, this is the mean squared error of
    the linear's output; with E = dense weight the mean square of that output. Columns of E that are
    0 cost nothing, and H is symmetric: a bit more than half of the product is enough.
    """
    error = difference.detach().to(matrix.device, torch.float64)
    used = error.any(0).nonzero()[:, 0]
    if len(used) < len(matrix):
        error, matrix = error[:, used], matrix[used][:, used]
    matrix = matrix.double()
    total = 0.0
    for start, stop in column_blocks(len(matrix)):
        columns = slice(start, stop)
        product = error[:, stop:] @ matrix[stop:, columns]
        product = torch.addmm(product, error[:, columns], matrix[columns, columns], beta=2)
        total += float(torch.linalg.vecdot(product, error[:, columns]).sum())
    return total


def regression_error(regression: Regression, weight: Tensor, bias: Tensor | None = None) -> float:
    """Return the sum of (W x + b - y)^2 over all tokens and rows.

    The products are sums in float32: a result below about 1e-6 of `target_square` is rounding.
    """
    device = regression.cross.device
    weight = weight.detach().to(device, torch.float64)
    error = squared_error(regression.inputs.matrix, weight) + regression.target_square
    error -= 2 * float((weight * regression.cross).sum())
    if bias is not None:
        bias = bias.detach().to(device, torch.float64)
        offset = weight @ regression.inputs.total - regression.target_total
        error += float(bias @ (2 * offset + regression.inputs.count * bias))
    return max(error, 0.0)
