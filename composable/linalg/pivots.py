"""Which columns stand for the others: diagonally pivoted Cholesky of a Gram matrix."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: A column counts as made up of others when no more than this part of its square is left. Moments
#: are sums of float32 products, which leave up to 2e-6 of the square of a copy. The limit for a QR
#: of the inputs themselves, 1e-7 of the first pivot or 1e-14 of its square, would choose columns by
#: that rounding; and the first pivot is no measure where one unit is far larger than all others.
ROUNDING = 3e-6
#: Columns that are chosen between two updates of the whole matrix, for speed alone.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Pivots:
    """The columns of Z in the order in which column-pivoted QR takes them, the best first.

    Attributes:
        order: all n columns; the first k of them are those to keep of k.
        size: |r_jj| of each in this order, (n,) float64; 0 of one that is made up of those before.
        left: what the columns up to each leave of the others, ||R22||_F, (n,) float64.
    """

    order: list[int]
    size: Tensor
    left: Tensor


def pivots(matrix: Tensor, spare: Tensor, groups: int = 1) -> Pivots:
    """Order columns by what each adds to those before it; of equal ones the lower index first.

    Args:
        matrix: Z^T Z, (n, n).
        spare: (n,); the highest come first of the columns that are made up of others.
        groups: of equally many neighbours each, which take turns: every group gives one column, the
            best of all groups first, before any gives the next.

    Source: LAPACK's dpstrf, which in exact arithmetic chooses as its dgeqp3 does for Z.
    """
    schur, fill = matrix.detach().cpu().double().numpy(), spare.detach().cpu().double().numpy()
    total = len(schur)
    limit, group = ROUNDING * schur.diagonal(), np.arange(total) * groups // max(total, 1)
    given = np.zeros(groups, dtype=int)
    ids, steps = np.arange(total), list[tuple[int, float, float]]()
    while len(ids):
        trace, is_open = schur.diagonal().copy(), np.ones(len(ids), dtype=bool)
        rows = np.zeros((min(BLOCK, len(ids)), len(ids)))
        for step in range(len(rows)):
            trace[trace <= limit[ids]] = 0
            may = is_open & (given[group[ids]] == given.min())
            best = int(np.where(may, trace if trace[may].any() else fill[ids], -np.inf).argmax())
            size = float(np.sqrt(trace[best]))
            if size:
                rows[step] = (schur[best] - rows[:step, best] @ rows[:step]) / size
                trace -= rows[step] ** 2
            trace[best], is_open[best] = 0, False
            given[group[ids[best]]] += 1
            left = np.sqrt(trace[trace > limit[ids]].sum())
            steps.append((int(ids[best]), size, float(left)))
        rows = rows[:, is_open]
        schur = schur[is_open][:, is_open] - rows.T @ rows
        ids = ids[is_open]
    order, sizes, left_over = zip(*steps, strict=True) if steps else ((), (), ())
    wide = [torch.tensor(values, dtype=torch.float64) for values in (sizes, left_over)]
    return Pivots(list(order), *wide)
