"""Refit a linear of one or more variants from second moments, and measure what that gained."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from composable.linalg import solver
from composable.linalg.grams import Gram, Regression
from composable.variants.store import Fit


class How(NamedTuple):
    """Arguments of `solver.refit`."""

    ridge: float = 1e-2
    linear_solver: str = "pcg"
    device: str = "cpu"


@dataclass(frozen=True)
class Problem:
    """A linear of one variant, to be refitted on its inputs in the dense model.

    Attributes:
        start: weight as pruned, (rows, columns of the dense linear), 0 where nothing is left.
        mask: of the same shape, True where a weight stays.
    """

    start: Tensor
    mask: Tensor


def fit_linear(
    linear: nn.Module, problems: Mapping[str, Problem], texts: tuple[Gram, Gram], how: How
) -> dict[str, Fit]:
    """Refit a dense linear for several variants of it, all together.

    Args:
        linear: the dense one, with `weight` (rows, columns) and perhaps `bias`.
        problems: any name -> what is left of the weight.
        texts: moments of its inputs on the calibration and on the held-out texts.
        how: see `solver.refit`.

    Returns:
        The same names -> weight, bias and errors; a part of the seconds counts for each.
    """
    started = time.perf_counter()
    weight = _with_bias(linear.get_parameter("weight").detach(), linear)
    starts = [_with_bias(problem.start, linear) for problem in problems.values()]
    masks = [_pad(problem.mask, weight.shape[1]) for problem in problems.values()]
    matrices = [gram.augmented() if _has_bias(linear) else gram.matrix for gram in texts]
    fitted = starts
    if not solver.tells_nothing(matrices[0]):
        fitted = solver.refit(
            matrices[0], weight, masks, how.ridge, how.linear_solver, device=how.device
        )
    errors = [
        [solver.squared_error(matrix, w - weight) / (gram.count * len(weight)) for w in weights]
        for weights in (starts, fitted)
        for matrix, gram in zip(matrices, texts, strict=True)
    ]
    norm = solver.squared_output(matrices[1], weight) / (texts[1].count * len(weight))
    columns = linear.get_parameter("weight").shape[1]
    facts = {"norm": norm, "seconds": (time.perf_counter() - started) / len(problems)}
    names = ("train_before", "before", "train", "after")
    return {
        key: Fit(
            _split(fitted[i], columns),
            {**facts, **{what: values[i] for what, values in zip(names, errors, strict=True)}},
        )
        for i, key in enumerate(problems)
    }


def fit_output(
    tensors: Mapping[str, Tensor], mask: Tensor, texts: tuple[Regression, Regression], how: How
) -> Fit:
    """Refit a linear under a mask to targets that are not its own dense output.

    Args:
        tensors: `weight` (rows, columns), what the ridge pulls to, and perhaps `bias`.
        mask: of the weight's shape, True where it stays.
        texts: moments of inputs and targets on the calibration and on the held-out texts.
        how: see `solver.refit`.

    Returns:
        Weight and bias, with the errors `train` and `after`.
    """
    weight, bias = tensors["weight"], tensors.get("bias")
    columns, first = weight.shape[1], texts[0]
    matrix, cross = first.inputs.matrix, first.cross
    if bias is not None:
        weight = torch.cat([weight, bias[:, None]], 1)
        matrix, cross = first.inputs.augmented(), first.augmented_cross()
    masks = [_pad(mask, weight.shape[1])]
    fitted, *_ = solver.refit(
        matrix, weight, masks, how.ridge, how.linear_solver, cross=cross, device=how.device
    )
    found = _split(fitted, columns)
    errors = [
        solver.regression_error(moments, found["weight"], found.get("bias"))
        / (moments.inputs.count * len(weight))
        for moments in texts
    ]
    return Fit(found, dict(zip(("train", "after"), errors, strict=True)))


def _has_bias(linear: nn.Module) -> bool:
    return getattr(linear, "bias", None) is not None


def _with_bias(weight: Tensor, linear: nn.Module) -> Tensor:
    """Append the bias as a last column."""
    if not _has_bias(linear):
        return weight
    return torch.cat([weight, linear.get_parameter("bias").detach()[:, None]], 1)


def _pad(mask: Tensor, width: int) -> Tensor:
    """Widen a mask by the bias, which always stays."""
    extra = torch.ones(len(mask), width - mask.shape[1], dtype=torch.bool)
    return torch.cat([mask, extra], 1)


def _split(weight: Tensor, columns: int) -> dict[str, Tensor]:
    """Undo `_with_bias`."""
    tensors = {"weight": weight[:, :columns].contiguous()}
    if weight.shape[1] > columns:
        tensors["bias"] = weight[:, columns].contiguous()
    return tensors
