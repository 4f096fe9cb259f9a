"""Optimal brain surgeon: the weights go whose loss the others of their row can best make up for."""

import torch
from torch import Tensor

from composable.linalg.systems import cholesky
from composable.methods.inputs import mask_method, mask_of_scores, standardize


def obs_scores(weight: Tensor, matrix: Tensor) -> Tensor:
    """Rank weights by the loss that removing each alone leaves after the rest of its row adapts.

    Args:
        weight: (rows, n).
        matrix: second moments of the inputs, (n, n), or (n + 1, n + 1) with a bias.

    Returns:
        abs(weight) / sqrt(diagonal of the inverse), (rows, n), float64; higher is kept. The loss is
        half the square.

    Source: Hassibi & Stork 1993, equation 5, with the ridge of the refit.
    """
    values, hessian = standardize(weight, matrix)
    return values.abs() / torch.cholesky_inverse(cholesky(hessian)).diagonal().sqrt()


OBS = mask_method(
    "obs",
    "Hassibi & Stork 1993, Second order derivatives for network pruning",
    mask_of_scores(obs_scores),
)
