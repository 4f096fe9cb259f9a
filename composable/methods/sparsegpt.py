"""SparseGPT: weights are chosen block by block while the columns to the right make up for them."""

import torch
from torch import Tensor

from composable.linalg.systems import cholesky
from composable.methods.base import keep_highest, weights_to_remove
from composable.methods.inputs import mask_method, standardize

BLOCK = 128


def sparsegpt_mask(weight: Tensor, matrix: Tensor, rate: float, block: int = BLOCK) -> Tensor:
    """Mark the weights that stay.

    Args:
        weight: (rows, n).
        matrix: second moments of the inputs, (n, n), or (n + 1, n + 1) with a bias.
        rate: fraction removed, 0 to 1.
        block: columns among which weights are compared.

    Returns:
        Boolean (rows, n) with exactly floor(rows * n * rate + 0.5) zeros; every block has its share
        of them, rounded so that the sum is right.

    Source: Frantar & Alistarh 2023, algorithm 1. Only its choice: the weights that it leaves are
    not the best for its mask, and the refit finds those.
    """
    values, hessian = standardize(weight, matrix)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(cholesky(hessian)), upper=True)
    rows, columns = weight.shape
    mask = torch.ones_like(values, dtype=torch.bool)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        count = weights_to_remove(rows * last, rate) - weights_to_remove(rows * first, rate)
        pivots = factor.diagonal()[first:last]
        mask[:, first:last] = keep_highest((values[:, first:last] / pivots).square(), count)
        _sweep(values, factor, mask, first, last)
    return mask


def _sweep(values: Tensor, factor: Tensor, mask: Tensor, first: int, last: int) -> None:
    """Remove the masked weights of a block and spread each one's error to the right, in place."""
    errors = torch.zeros_like(values[:, first:last])
    for column in range(first, last):
        error = (values[:, column] / factor[column, column]).masked_fill(mask[:, column], 0.0)
        values[:, column:last] -= error[:, None] * factor[column, column:last]
        errors[:, column - first] = error
    values[:, last:] -= errors @ factor[first:last, last:]


SPARSEGPT = mask_method(
    "sparsegpt", "Frantar & Alistarh 2023, SparseGPT (arXiv 2301.00774)", sparsegpt_mask
)
