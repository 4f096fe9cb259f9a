"""Wanda for units: those go whose weights change the output least, each taken by itself."""

from torch import Tensor

from composable.linalg.grams import Gram
from composable.methods.inputs import unit_method
from composable.methods.wanda import wanda_scores


def column_scores(weight: Tensor, inputs: Gram) -> Tensor:
    """Sum the scores of all weights that read an input: (n,) float64; higher is kept.

    Args:
        weight: (rows, n).
        inputs: statistics of the n inputs.
    """
    return wanda_scores(weight, inputs.matrix.diagonal()).sum(0)  # sums of squares rank as means


UNIT_WANDA = unit_method(
    "unit_wanda", "Sun et al. 2023 (arXiv 2306.11695), summed over the outputs", column_scores
)
