"""Linear map: in place of a block of layers, the least-squares fit of what the block adds."""

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.linalg.grams import Regression
from composable.linalg.solver import RIDGE, refit, regression_error
from composable.methods.base import Evidence, Method, Pruned


def refit_residual(moments: Regression, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Fit b - a = W a + c by least squares with a ridge on W.

    Args:
        moments: inputs a (tokens, features), targets b - a.
        ridge: see `solver.refit`; it pulls towards plain deletion.

    Returns:
        W (features, features) and c (features,), float32, on the CPU; 0 in rows that gain nothing.
    """
    cross = moments.augmented_cross()
    start = torch.zeros_like(cross)
    (found,) = refit(
        moments.inputs.augmented(), start, [torch.ones_like(start).bool()], ridge, cross=cross,
        device=cross.device,
    )  # fmt: skip
    return found[:, :-1].contiguous(), found[:, -1].contiguous()


def fit(holder: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    """Fit a map for a block on the calibration texts; keep it if the held-out texts bear it out.

    `holder` and `module` are the block's first layer, `rate` is 1; its evidence is `states`.

    Returns:
        `weight` and `bias` of x + W x + c, or no tensors where deletion is as good; the squared
        error on the held-out texts, relative to what the block adds: `error_before` (of deletion,
        so 1) and `error_after`.
    """
    assert evidence.states is not None
    train, held_out = evidence.states
    weight, bias = refit_residual(train)
    error = regression_error(held_out, weight, bias) / max(held_out.target_square, 1e-300)
    if not error < 1:
        return Pruned(stats={"error_before": 1.0, "error_after": 1.0})
    tensors = {"weight": weight, "bias": bias}
    return Pruned(tensors=tensors, stats={"error_before": 1.0, "error_after": error})


LINEAR_MAP = Method(
    name="linear_map",
    kinds=("layer",),
    reference="ridge regression of block outputs on block inputs",
    prune=fit,
    needs=("states",),
    replaces=True,
)
