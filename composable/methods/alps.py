"""ALPS: alternates between fitting the dense outputs and keeping the largest weights (ADMM)."""

import torch
from torch import Tensor

from composable.linalg.grams import full_float32
from composable.methods.base import keep_highest, weights_to_remove
from composable.methods.inputs import mask_method, standardize

ITERATIONS = 30
#: Penalty for weights outside the support at the start, relative to the power of an input.
PENALTY = 0.1
GROWTH = 1.15
#: Further growth while more than this fraction of the support still changes.
UNSETTLED_GROWTH = 1.1
SETTLED = 0.01


def alps_mask(
    weight: Tensor, matrix: Tensor, rate: float, dtype: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """Mark the weights that stay.

    Args:
        weight: (rows, n).
        matrix: second moments of the inputs, (n, n), or (n + 1, n + 1) with a bias.
        rate: fraction removed, 0 to 1.
        dtype: of the iterations; the eigenvectors are found in float64.

    Returns:
        Boolean (rows, n) with exactly floor(rows * n * rate + 0.5) zeros.

    Source: Meng et al. 2024, algorithm 1, with a penalty that grows on a fixed schedule.
    """
    dense, hessian = standardize(weight, matrix)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    moved = ((dense @ vectors) * eigenvalues).to(dtype)  # dense @ Hs, in the eigenbasis
    dense, eigenvalues, vectors = dense.to(dtype), eigenvalues.to(dtype), vectors.to(dtype)
    count = weights_to_remove(weight.numel(), rate)

    penalty, sparse, dual = PENALTY, dense, torch.zeros_like(dense)
    mask = keep_highest(dense.abs(), count)
    with full_float32(matrix.device):
        for _ in range(ITERATIONS):
            pulled = (sparse - dual) @ vectors
            total = ((moved + penalty * pulled) / (eigenvalues + penalty)) @ vectors.T + dual
            before, mask = mask, keep_highest(total.abs(), count)
            sparse = torch.where(mask, total, 0.0)
            # not divided by the growth, as its role of a multiplier suggests: that was 1-4 % worse
            dual = total - sparse
            unsettled = int((mask & ~before).sum()) > SETTLED * int(mask.sum())
            penalty *= GROWTH * (UNSETTLED_GROWTH if unsettled else 1)
    return mask


ALPS = mask_method("alps", "Meng et al. 2024, ALPS (arXiv 2406.07831)", alps_mask)
