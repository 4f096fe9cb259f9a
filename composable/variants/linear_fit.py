"""Refit a linear of several variants from second moments, and measure what that gained."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from composable.formats.bundle import Variant
from composable.linalg import solver
from composable.linalg.grams import Gram, Regression
from composable.variants.last_linear import LastLinear
from composable.variants.store import Fit, Fits

log = logging.getLogger("composable")
#: `solver.refit` whose ridge, linear solver and device are given.
Refit = Callable[..., list[Tensor]]


def fit_linear(
    linear: LastLinear,
    variants: Mapping[str, Variant],
    texts: tuple[Gram, Gram],
    refit: Refit,
) -> dict[str, Fits]:
    """Refit the last linear of several variants of a module to the dense linear's output.

    The ridge pulls toward the variant's own weights.

    Args:
        linear: the dense one.
        variants: any names -> variants; what precedes the linear is as in the dense module.
        texts: moments of the linear's inputs on the calibration and on the held-out texts.
        refit: `solver.refit` with its settings.

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
        refitted = _refitted(linear.weight, pruned, matrices[0], refit)
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


def _refitted(
    dense: Tensor, pruned: Sequence[tuple[Tensor, Tensor]], matrix: Tensor, refit: Refit
) -> list[Tensor]:
    """Solve for all variants: together those that have the dense weights, others one by one.

    A variant is its weight and mask, (rows, n) both; `matrix` has the second moments of the inputs.
    """
    is_dense = [torch.equal(weight, torch.where(mask, dense, 0.0)) for weight, mask in pruned]
    masks = [mask for (_, mask), same in zip(pruned, is_dense, strict=True) if same]
    together = iter(refit(matrix, dense, masks) if masks else ())
    cross = None if all(is_dense) else dense.double() @ matrix
    return [
        next(together) if same else refit(matrix, weight, [mask], cross=cross)[0]
        for (weight, mask), same in zip(pruned, is_dense, strict=True)
    ]


def fit_output(
    linear: LastLinear, variant: Variant, moments: Regression, refit: Refit
) -> dict[str, Tensor]:
    """Refit the last linear of a variant, under its mask, to targets and inputs of its own.

    Args:
        linear: the dense one, for the names.
        variant: with the weights that the ridge pulls to, also where its mask will remove them.
        moments: of inputs and targets on the calibration texts.
        refit: as for `fit_linear`.

    Returns:
        Weight and bias, named as in the variant.
    """
    weight, mask = linear.own(variant)
    matrix, cross = moments.inputs.matrix, moments.cross
    if linear.has_bias:
        matrix, cross = moments.inputs.augmented(), moments.augmented_cross()
    return linear.named(refit(matrix, weight, [mask], cross=cross)[0])
