"""Optimal brain surgeon: the weights go whose loss the others of their row can best make up for."""

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.linalg.systems import cholesky
from composable.methods.base import Evidence, Method, Pruned, keep_highest, weights_to_remove
from composable.methods.inputs import moments, standardize


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


def _prune(linear: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    weight = linear.get_parameter("weight")
    scores = obs_scores(weight, moments(linear, module, OBS.name, evidence.inputs))
    return Pruned(mask=keep_highest(scores, weights_to_remove(weight.numel(), rate)).cpu())


OBS = Method(
    name="obs",
    kinds=("linear",),
    reference="Hassibi & Stork 1993, Second order derivatives for network pruning",
    prune=_prune,
    needs=("inputs",),
)
