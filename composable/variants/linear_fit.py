"""Refit a linear of several variants from second moments, and measure what that gained."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from composable.formats.bundle import Variant
from composable.linalg import solver
from composable.linalg.grams import Gram, Regression
from composable.linalg.solver import Solution
from composable.variants.last_linear import LastLinear
from composable.variants.store import Fit, Fits

log = logging.getLogger("composable")
#: `solver.solve` whose ridge, linear solver and device are given.
Refit = Callable[..., Iterator[Solution]]


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
        refit: `solver.solve` with its settings.

    Returns:
        The same names -> fits "pruned" and "ls"; a part of the seconds counts for each.
    """
    started = time.perf_counter()
    pruned = [linear.read(variant) for variant in variants.values()]
    train, held_out = (gram.augmented() if linear.has_bias else gram.matrix for gram in texts)
    if solver.is_constant(train):
        log.warning(
            "%s: its inputs never vary; the weights stay as pruned.", linear.module.output_path
        )
    rows = len(linear.weight)
    norm = solver.squared_error(held_out, linear.weight) / (texts[1].count * rows)
    found: dict[str, Fits] = {}
    solutions = _solutions(linear.weight, pruned, train, refit)
    for name, (start, _), solution in zip(variants, pruned, solutions, strict=True):
        before, after = (
            solver.squared_error(held_out, weight - linear.weight) / (texts[1].count * rows)
            for weight in (start, solution.weight)
        )
        first = None  # needed only where the variant stays as pruned
        if before <= after:
            first = solver.squared_error(train, start - linear.weight) / (texts[0].count * rows)
        last = solution.error(linear.weight) / (texts[0].count * rows)
        tensors = linear.write(solution.weight, variants[name])
        found[name] = {
            "pruned": Fit({}, first, before, norm),
            "ls": Fit(tensors, last, after, norm, largest_coefficient=solution.largest_coefficient),
        }
    seconds = (time.perf_counter() - started) / len(variants)
    for fits in found.values():
        fits["ls"] = dataclasses.replace(fits["ls"], seconds=seconds)
    return found


def _solutions(
    dense: Tensor, pruned: Sequence[tuple[Tensor, Tensor]], matrix: Tensor, refit: Refit
) -> Iterator[Solution]:
    """Solve for all variants: together those that have the dense weights, others one by one.

    A variant is its weight and mask, (rows, n) both; `matrix` has the second moments of the inputs.
    """
    is_dense = [torch.equal(weight, torch.where(mask, dense, 0.0)) for weight, mask in pruned]
    masks = [mask for (_, mask), same in zip(pruned, is_dense, strict=True) if same]
    together = refit(matrix, dense, masks)
    cross = None if all(is_dense) else dense.double() @ matrix
    for (weight, mask), same in zip(pruned, is_dense, strict=True):
        yield next(together if same else refit(matrix, weight, [mask], cross=cross))


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
    return linear.named(next(refit(matrix, weight, [mask], cross=cross)).weight)
