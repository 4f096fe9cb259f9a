"""What methods make of a linear's input statistics: checks, weights on their scale, masks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from composable.errors import ShapeError, UserError
from composable.families import Module
from composable.linalg.grams import Gram
from composable.linalg.solver import DEAD, RIDGE, scaled
from composable.methods.base import (
    Evidence,
    Method,
    Pruned,
    keep_best,
    keep_highest,
    weights_to_remove,
)


def moments(linear: nn.Module, module: Module, method: str, inputs: Gram | None) -> Tensor:
    """Return what the data say of the inputs of a linear.

    Args:
        linear: with `weight` (rows, n), and `bias` or not.
        module: for messages.
        method: for messages.
        inputs: statistics of the n inputs.

    Returns:
        (n, n) float64; (n + 1, n + 1) with a last column of ones where the linear has a bias, which
        no method removes but which the refit may use.

    Raises:
        UserError: no statistics, or some that are not finite.
        ShapeError: they are of another width.
    """
    if inputs is None:
        raise UserError(
            f'"{module.name}": method {method} needs the statistics of the inputs, and there are '
            "none; measure them on calibration texts, or use a method that reads weights alone."
        )
    columns = linear.get_parameter("weight").shape[1]
    if len(inputs.total) != columns:
        raise ShapeError(
            f'"{module.name}": the statistics are of {len(inputs.total)} inputs, the weight has '
            f"{columns} columns; calibrate with this model."
        )
    matrix = inputs.matrix if getattr(linear, "bias", None) is None else inputs.augmented()
    if not bool(torch.isfinite(matrix).all()):
        raise UserError(
            f'"{module.name}": the statistics of the inputs hold values that are not finite; '
            "calibrate in float32, and check that the dense model's outputs are finite."
        )
    return matrix


def input_scale(power: Tensor) -> Tensor:
    """Turn the power of each input into the factor of its weights.

    Inputs that are (as good as) always zero get a tiny common factor instead of none: their weights
    go first, the smallest before the others. Where all inputs are zero all factors are equal, and
    the methods do (alps: nearly, sparsegpt: block by block) what l1 does.

    Args:
        power: sums or means of squares, shape (n,).

    Returns:
        Square roots, shape (n,), above zero.
    """
    floor = DEAD * power.max()
    return power.clamp_min(floor).sqrt() if floor > 0 else torch.ones_like(power)


def standardize(weight: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Express a linear for inputs of power one.

    Args:
        weight: (rows, n).
        matrix: second moments of its inputs, (n, n), or (n + 1, n + 1) with a bias.

    Returns:
        The weight times the inputs' scale, (rows, n) float64 on the matrix's device, and the
        moments on that scale, (n, n), with the ridge of the refit that follows. A bias is always
        kept and always refitted, so it is solved for beforehand (the Schur complement): what is
        left are moments about the mean.
    """
    columns = weight.shape[1]
    units = scaled(matrix, RIDGE)
    moments, scale = units.matrix[:columns, :columns], input_scale(matrix.diagonal()[:columns])
    if len(matrix) > columns:
        mean = units.matrix[:columns, columns]
        moments = moments - torch.outer(mean, mean) / units.matrix[columns, columns]
        root = (moments.diagonal() / (1 + RIDGE)).sqrt()
        moments, scale = moments / root / root[:, None], scale * root
    values = weight.detach().to(scale) * scale
    return values, moments


def mask_method(
    name: str, reference: str, mask_of: Callable[[Tensor, Tensor, float], Tensor]
) -> Method:
    """Make a method that masks weights of a linear.

    Args:
        name: see `Method`, as for the reference.
        reference: the paper.
        mask_of: (weight (rows, n), `moments` of its inputs, rate) -> True where a weight stays.
    """

    def prune(linear: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
        matrix = moments(linear, module, name, evidence.inputs)
        return Pruned(mask=mask_of(linear.get_parameter("weight"), matrix, rate).cpu())

    return Method(name, ("linear",), reference, prune, ("inputs",))


def mask_of_scores(
    scores_of: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Keep the weights of the highest scores (rows, n), made of the weight and its moments."""
    return lambda weight, matrix, rate: keep_highest(
        scores_of(weight, matrix), weights_to_remove(weight.numel(), rate)
    )


def unit_method(name: str, reference: str, scores_of: Callable[[Tensor, Gram], Tensor]) -> Method:
    """Make a method that ranks heads and neurons by the inputs of the linear they flow into.

    Args:
        name: see `Method`, as for the reference.
        reference: the paper.
        scores_of: (weight (rows, n), statistics of its inputs) -> importance of each input, (n,);
            those of a head are added.
    """

    def prune(holder: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
        weight, inputs = outgoing(holder, module, name, evidence)
        return keep_best(scores_of(weight, inputs).view(module.units, -1).sum(1), module, rate)

    return Method(name, ("attention", "ffn"), reference, prune, ("inputs",))


def outgoing(
    holder: nn.Module, module: Module, method: str, evidence: Evidence
) -> tuple[Tensor, Gram]:
    """Return the weight that all units flow into, and the statistics of its inputs, checked."""
    linear = holder.get_submodule(module.output)
    moments(linear, module, method, evidence.inputs)
    assert evidence.inputs is not None  # or that would have been refused
    return linear.get_parameter("weight").detach(), evidence.inputs
