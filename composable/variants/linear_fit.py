"""Refit a linear of several variants from second moments, and measure what that gained."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from composable.formats.bundle import Variant
from composable.linalg import solver
from composable.linalg.grams import Gram, Regression
from composable.variants.last_linear import LastLinear, joined
from composable.variants.store import Fit, Fits

log = logging.getLogger("composable")


class SolverOptions(NamedTuple):
    """Arguments of `solver.refit`."""

    ridge: float = solver.RIDGE
    linear_solver: str = "pcg"
    device: str = "cpu"


def fit_linear(
    linear: LastLinear,
    variants: Mapping[str, Variant],
    texts: tuple[Gram, Gram],
    options: SolverOptions,
) -> dict[str, Fits]:
    """Refit the last linear of several variants of a module to the dense linear's output.

    The ridge pulls toward the variant's own weights.

    Args:
        linear: the dense one.
        variants: any names -> variants; what precedes the linear is as in the dense module.
        texts: moments of the linear's inputs on the calibration and on the held-out texts.
        options: see `solver.refit`.

    Returns:
        The same names -> fits "pruned" and "ls"; a part of the seconds counts for each.
    """
    started = time.perf_counter()
    pruned = [linear.read(variant) for variant in variants.values()]
    matrices = [gram.augmented() if linear.has_bias else gram.matrix for gram in texts]
    refitted = [weight for weight, _ in pruned]
    if solver.is_constant(matrices[0]):
        log.warning(
            "%s: its inputs never vary; the weights stay as pruned.", linear.module.output_path
        )
    else:
        refitted = _refit(linear.weight, pruned, matrices[0], options)
    values = [gram.count * len(linear.weight) for gram in texts]
    norm = solver.squared_error(matrices[1], linear.weight) / values[1]

    def fit(weight: Tensor, tensors: dict[str, Tensor], seconds: float) -> Fit:
        sums = [solver.squared_error(matrix, weight - linear.weight) for matrix in matrices]
        return Fit(tensors, sums[0] / values[0], sums[1] / values[1], norm, seconds)

    seconds = (time.perf_counter() - started) / len(variants)
    return {
        name: {
            "pruned": fit(start, {}, 0.0),
            "ls": fit(end, linear.write(end, variants[name]), seconds),
        }
        for name, (start, _), end in zip(variants, pruned, refitted, strict=True)
    }


def _refit(
    dense: Tensor,
    pruned: Sequence[tuple[Tensor, Tensor]],
    matrix: Tensor,
    options: SolverOptions,
) -> list[Tensor]:
    """Solve for all variants: together those that have the dense weights, others one by one.

    Args:
        dense: weight of the dense linear, (rows, n).
        pruned: weight and mask (rows, n) of every variant.
        matrix: second moments (n, n) of the inputs.
        options: see `solver.refit`.
    """
    is_dense = [torch.equal(weight, torch.where(mask, dense, 0.0)) for weight, mask in pruned]
    masks = [mask for (_, mask), same in zip(pruned, is_dense, strict=True) if same]
    together = iter(solver.refit(matrix, dense, masks, **options._asdict()) if masks else ())
    cross = None if all(is_dense) else dense.double() @ matrix
    return [
        next(together)
        if same
        else solver.refit(matrix, weight, [mask], cross=cross, **options._asdict())[0]
        for (weight, mask), same in zip(pruned, is_dense, strict=True)
    ]


def fit_output(
    linear: LastLinear, variant: Variant, moments: Regression, options: SolverOptions
) -> dict[str, Tensor]:
    """Refit the last linear of a variant, under its mask, to targets and inputs of its own.

    Args:
        linear: the dense one, for the names.
        variant: with the weights that the ridge pulls to, also where its mask will remove them.
        moments: of inputs and targets on the calibration texts.
        options: see `solver.refit`.

    Returns:
        Weight and bias, named as in the variant.
    """
    weight = joined(linear.own(variant.tensors))
    mask = torch.ones(weight.shape, dtype=torch.bool)
    kept = variant.masks[f"{linear.prefix}weight"]
    mask[:, : kept.shape[1]] = kept
    matrix, cross = moments.inputs.matrix, moments.cross
    if linear.has_bias:
        matrix, cross = moments.inputs.augmented(), moments.augmented_cross()
    (found,) = solver.refit(matrix, weight, [mask], cross=cross, **options._asdict())
    return linear.named(found)
