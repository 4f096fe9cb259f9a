"""Fluctuation: the units go that vary least, so that a constant could stand for them."""

from torch import Tensor

from composable.linalg.grams import Gram
from composable.methods.inputs import unit_method


def column_scores(weight: Tensor, inputs: Gram) -> Tensor:
    """Multiply the variance of each input by the squared norm of its weights.

    Args:
        weight: (rows, n).
        inputs: statistics of the n inputs.

    Returns:
        (n,) float64; higher is kept.

    Source: An et al. 2023, equation 5.
    """
    count = max(inputs.count, 1)
    variance = inputs.matrix.diagonal() / count - (inputs.total / count).square()
    return variance.clamp_min(0) * weight.to(variance).square().sum(0)


FLUCTUATION = unit_method("fluctuation", "An et al. 2023, FLAP (arXiv 2312.11983)", column_scores)
