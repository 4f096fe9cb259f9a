"""Least squares on the support of a mask: conjugate gradient, batches of Cholesky, one Cholesky."""

from dataclasses import dataclass

import torch
from torch import Tensor

from composable.errors import UserError

TOLERANCE = 1e-3  # a step is small when it lowers the loss of its row by less than this part
ITERATIONS = 60
RESTART = 20  # iterations between two computations of the true residual
LIVE = 0.9  # unfinished part of the rows below which the finished ones leave the batch
BATCH_BYTES = {"cpu": 8 * 2**20, "cuda": 200 * 2**20}  # of small matrices; a CPU's fit its cache
JITTER = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


def cholesky(matrix: Tensor) -> Tensor:
    """Factorise positive semi-definite matrices of unit scale.

    A singular matrix gets the first number of `JITTER` on its diagonal that makes it definite:
    the same as a slightly larger ridge.

    Args:
        matrix: (..., n, n) float64.

    Returns:
        Lower triangular factors (..., n, n).

    Raises:
        UserError: a matrix is far from positive semi-definite.
    """
    missing = matrix.new_zeros(matrix.shape[:-2])
    for jitter in JITTER[1:]:
        shifted = matrix
        if bool(missing.any()):
            shifted = matrix + torch.diag_embed(missing[..., None].expand(matrix.shape[:-1]))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        # pivots that are rounding errors would pass as definite
        pivot = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        singular = (failed != 0) | ~(pivot > JITTER[1] / 2)
        if not bool(singular.any()):
            return factor
        missing = torch.where(singular, jitter, missing)
    raise UserError(
        "the second moments of a linear's inputs are not positive semi-definite, as sums of "
        "squares are; measure them again in float32, without TF32 or bfloat16."
    )


@dataclass
class _Rows:
    """Rows of a batch on the way to their solution; shapes (b, n) and (b,).

    Attributes:
        index: their places in the whole batch.
        goal, mask: what to come close to; 1.0 where the row may differ from 0.
        value, residual, direction: of the conjugate gradient.
        slope: residual times preconditioned residual.
        loss, enough: the loss and the value at which it counts as 0.
        small: whether the last step was small.
        live: not finished yet.
    """

    index: Tensor
    goal: Tensor
    mask: Tensor
    value: Tensor
    residual: Tensor
    direction: Tensor
    slope: Tensor
    loss: Tensor
    enough: Tensor
    small: Tensor
    live: Tensor

    def only_live(self) -> "_Rows":
        return _Rows(**{name: tensor[self.live] for name, tensor in vars(self).items()})


def conjugate_gradient(
    matrix: Tensor, inverse: Tensor, goal: Tensor, start: Tensor, mask: Tensor
) -> Tensor:
    """Minimise (v - goal) matrix (v - goal)^T over v that are 0 outside a mask, for many rows.

    The inverse of the whole matrix, cut to the support of each row, is the preconditioner. A row
    is finished after two small steps in a row (one alone is common on a plateau); what it has
    become does not depend on the other rows but for rounding.

    Args:
        matrix: (n, n) positive definite.
        inverse: of `matrix`.
        goal: (rows, n).
        start: (rows, n), 0 outside the mask.
        mask: (rows, n) bool, True where a weight stays.

    Returns:
        (rows, n) in the dtype of `matrix`, float32 or float64.
    """
    rows = _begin(goal.to(matrix.dtype), start.to(matrix.dtype), mask.to(matrix.dtype))
    solution = rows.value.clone()
    scratch = torch.empty_like(solution)
    for iteration in range(ITERATIONS):
        if iteration % RESTART == 0:
            _restart(rows, matrix, inverse)
        else:
            _turn(rows, inverse, scratch[: len(rows.index)])
        _advance(rows, matrix, scratch[: len(rows.index)])
        live = int(rows.live.sum())
        if live < LIVE * len(rows.index):
            solution[rows.index] = rows.value
            rows = rows.only_live()
        if not live:
            break
    solution[rows.index] = rows.value
    return solution


def _begin(goal: Tensor, start: Tensor, mask: Tensor) -> _Rows:
    zeros = goal.new_zeros(len(goal))
    no = torch.zeros_like(zeros, dtype=torch.bool)
    return _Rows(
        index=torch.arange(len(goal), device=goal.device),
        goal=goal,
        mask=mask,
        value=start.clone(),
        residual=start,
        direction=start,
        slope=zeros,
        loss=zeros.double(),
        enough=zeros.double() - 1,
        small=no,
        live=~no,
    )


def _restart(rows: _Rows, matrix: Tensor, inverse: Tensor) -> None:
    """Compute loss and residual from the values, and go down the preconditioned gradient."""
    error = rows.goal - rows.value
    rows.residual = error @ matrix
    rows.loss = torch.linalg.vecdot(error, rows.residual).double()
    rows.enough = torch.where(rows.enough < 0, 1e-12 * rows.loss, rows.enough)
    rows.residual *= rows.mask
    rows.direction = torch.mm(rows.residual, inverse, out=error).mul_(rows.mask)
    rows.slope = torch.linalg.vecdot(rows.residual, rows.direction)


def _advance(rows: _Rows, matrix: Tensor, scratch: Tensor) -> None:
    """Go to the minimum along the directions, in place; finished rows stay as they are."""
    torch.mm(rows.direction, matrix, out=scratch)
    curvature = torch.linalg.vecdot(rows.direction, scratch)
    length = torch.where(rows.live & (curvature > 0), rows.slope / curvature, 0.0)
    torch.addcmul(rows.value, rows.direction, length[:, None], out=rows.value)
    torch.addcmul(rows.residual, scratch, length[:, None], value=-1, out=rows.residual)
    rows.residual *= rows.mask
    drop = (length * rows.slope).double()
    rows.loss -= drop
    small = drop <= TOLERANCE * rows.loss
    rows.live &= ~(small & rows.small) & (rows.loss > rows.enough)
    rows.small = small


def _turn(rows: _Rows, inverse: Tensor, scratch: Tensor) -> None:
    """Make the directions conjugate to the ones before."""
    torch.mm(rows.residual, inverse, out=scratch).mul_(rows.mask)
    slope = torch.linalg.vecdot(rows.residual, scratch)
    turn = torch.where(rows.slope > 0, slope / rows.slope, 0.0)
    torch.addcmul(scratch, rows.direction, turn[:, None], out=rows.direction)
    rows.slope = slope


def exact(matrix: Tensor, inverse: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """Minimise like `conjugate_gradient`, by one factorisation per row, of its smaller side.

    Rows that keep few inputs solve matrix[K, K]; the others solve inverse[P, P] on the removed
    inputs P (optimal brain surgeon: v = goal - goal[P] inverse[P, P]^-1 inverse[P, :]).
    PyTorch factorises small matrices slower with many CPU threads than with one; below about
    1000 inputs the caller does well to set one.

    Args:
        matrix: (n, n) float64, positive definite.
        inverse: of `matrix`, float64.
        goal: (rows, n) float64.
        mask: (rows, n) bool, True where a weight stays.

    Returns:
        (rows, n) float64.
    """
    value = torch.where(mask, goal, 0.0)
    few = 2 * mask.sum(1) <= mask.shape[1]
    if bool(few.any()):
        removed = torch.where(mask[few], 0.0, goal[few])
        value[few] += _small_systems(matrix, removed @ matrix, mask[few])
    if not bool(few.all()):
        removed = _small_systems(inverse, goal[~few], ~mask[~few])
        value[~few] = torch.where(mask[~few], goal[~few] - removed @ inverse, 0.0)
    return value


def _small_systems(matrix: Tensor, right: Tensor, support: Tensor) -> Tensor:
    """Solve x matrix[S, S] = right[S] for the support S of each row; x (rows, n), 0 elsewhere."""
    solution = torch.zeros_like(right)
    budget = BATCH_BYTES["cpu" if matrix.device.type == "cpu" else "cuda"]
    sizes, order = support.sum(1).sort(descending=True)
    first = 0
    while first < len(order) and sizes[first] > 0:
        widest = int(sizes[first])
        rows = order[first : first + max(1, budget // (8 * widest**2))]
        first += len(rows)
        # columns of the support first, then others (without effect) up to the common width
        index = support[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :widest]
        inside = support[rows].gather(1, index)
        blocks = matrix[index[:, :, None], index[:, None, :]]
        if not bool(inside.all()):
            blocks *= inside[:, :, None] & inside[:, None, :]
            blocks.diagonal(dim1=1, dim2=2).add_(~inside)
        sides = torch.where(inside, right[rows].gather(1, index), 0.0)
        found = torch.cholesky_solve(sides[:, :, None], cholesky(blocks))[:, :, 0]
        solution[rows] = solution[rows].scatter(1, index, found)
    return solution


def shared_support(matrix: Tensor, goal: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise like `conjugate_gradient` where all rows keep the same inputs `kept` (n,) bool.

    Returns:
        (rows, n) float64, and the matrix T (kept, removed) by which the kept inputs stand in for
        the removed ones: the weights of the kept are goal[K] + goal[E] T^T.
    """
    value = torch.zeros_like(goal)
    cross = matrix[kept][:, ~kept]
    if not bool(kept.any()):
        return value, cross
    coefficients = torch.cholesky_solve(cross, cholesky(matrix[kept][:, kept]))
    value[:, kept] = goal[:, kept] + goal[:, ~kept] @ coefficients.T
    return value, coefficients
