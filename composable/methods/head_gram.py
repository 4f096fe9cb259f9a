"""Heads by least squares: those go whose share of the output the others best make up for."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from composable.errors import ShapeError
from composable.families import Module
from composable.linalg.systems import cholesky
from composable.methods.base import Evidence, Method, Pruned
from composable.methods.inputs import moments, standardize
from composable.models.surgery import units_to_remove

#: Losses that differ by less, relative to the square of the dense output, count as equal.
TIE = 1e-10


def elimination_order(
    weight: Tensor, matrix: Tensor, heads: int, groups: int = 1, quota: int | None = None
) -> list[tuple[int, float]]:
    """Remove heads one by one, each time the one that costs least after a refit of the others.

    Args:
        weight: dense output projection, (rows, heads * head_size).
        matrix: second moments of its inputs, (n, n), or (n + 1, n + 1) with a bias.
        heads: number of heads; must divide the columns.
        groups: of equally many heads each, in their order.
        quota: how many heads of a group may go; by default all.

    Returns:
        All heads that may go in the order they do (of equal ones the lower index first), each with
        the loss after it went: squared error of the refitted output, summed over tokens and rows,
        with the ridge; T - tr(B^T A^-1 B) of the kept columns.

    Raises:
        ShapeError: the columns do not divide into `heads`.

    Source: greedy backward elimination on the exact loss of a linear regression, in the form of
    optimal brain surgeon (Hassibi & Stork 1993) for groups of weights: with G the inverse of the
    moments, removing the columns P adds tr(W_P G_PP^-1 W_P^T).
    """
    if heads < 1 or weight.shape[1] % heads:
        raise ShapeError(f"{weight.shape[1]} columns do not divide into {heads} heads.")
    values, hessian = standardize(weight, matrix)
    tie = TIE * float(((values @ hessian) * values).sum())
    inverse = torch.cholesky_inverse(cholesky(hessian))
    room = [heads // groups if quota is None else quota] * groups
    return list(_eliminate(values, inverse, heads, weight.shape[1] // heads, tie, room))


def _eliminate(
    values: Tensor, inverse: Tensor, heads: int, size: int, tie: float, room: list[int]
) -> Iterator[tuple[int, float]]:
    left = {head: slice(head * size, (head + 1) * size) for head in range(heads)}
    loss = 0.0
    while any(room):
        rises = {
            head: _rise(values, inverse, part)
            for head, part in left.items()
            if room[head * len(room) // heads]
        }
        lowest = min(rises.values())
        head = next(head for head, rise in rises.items() if rise <= lowest + tie)
        loss += rises[head]
        room[head * len(room) // heads] -= 1
        part = left.pop(head)
        # the others adapt, and so does the inverse to there being fewer inputs
        share = torch.linalg.solve(inverse[part, part], inverse[part])
        values = values - values[:, part] @ share
        inverse = inverse - inverse[:, part] @ share
        yield head, loss


def _rise(values: Tensor, inverse: Tensor, part: slice) -> float:
    """Return by how much the loss rises when the inputs `part` go and the others adapt."""
    factor = torch.linalg.cholesky(inverse[part, part])
    rotated = torch.linalg.solve_triangular(factor, values[:, part].T, upper=False)
    return float(rotated.square().sum())


def kept_heads(weight: Tensor, matrix: Tensor, module: Module, rate: float) -> list[int]:
    """Ascending ids of the heads that stay, as grouped queries allow, see `methods.base`."""
    heads, groups = module.units, module.groups
    if groups == heads or module.whole_groups:
        order = elimination_order(weight, matrix, groups)
        kept = sorted(unit for unit, _ in order[units_to_remove(groups, rate) :])
        return [unit * heads // groups + head for unit in kept for head in range(heads // groups)]
    quota = units_to_remove(heads // groups, rate)
    gone = {head for head, _ in elimination_order(weight, matrix, heads, groups, quota)}
    return [head for head in range(heads) if head not in gone]


def _prune(attention: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    o = attention.get_submodule(module.output)
    matrix = moments(o, module, HEAD_GRAM.name, evidence.inputs)
    kept = kept_heads(o.get_parameter("weight"), matrix, module, rate)
    return Pruned(kept_units=kept)


HEAD_GRAM = Method(
    name="head_gram",
    kinds=("attention",),
    reference="Hassibi & Stork 1993 for heads as units; refit as in ZipLM (arXiv 2302.04089)",
    prune=_prune,
    needs=("inputs",),
)
