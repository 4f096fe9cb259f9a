"""Exchange: stat's choice, then kept and removed neurons swap places as long as that helps."""

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.linalg.systems import cholesky
from composable.methods.base import Evidence, Method, Pruned
from composable.methods.inputs import moments, outgoing, standardize
from composable.methods.stat import neuron_pivots
from composable.models.surgery import units_to_remove

#: The search ends where no swap would lower the error by more than this part of it. To go on to the
#: very end took up to a third more swaps, for an error that was lower by less than 1 %.
GAIN = 1e-4
#: It also ends after so many swaps for each neuron, a limit that no model tried came to: they took
#: 0.01 to 0.05 for each of 1,536 neurons (a second), and 0.05 to 0.12 for each of 512.
SWAPS = 0.25
#: And it ends after so many multiplications, some half a minute on a core: a swap takes a product
#: of all pairs over all outputs, so an ffn of 11,008 neurons with 4,096 outputs gets 24 swaps.
WORK = 3e12


def exchange(weight: Tensor, matrix: Tensor, kept: list[int]) -> list[int]:
    """Swap kept and removed inputs of a linear as long as its error after the refit falls.

    Args:
        weight: (rows, n).
        matrix: second moments of its inputs, (n, n), or (n + 1, n + 1) with a bias.
        kept: inputs to begin with.

    Returns:
        As many inputs, ascending.

    Source: the local search of Meng et al. 2024, over all pairs at once and exact: each time the
    swap is made that lowers the squared error of the refit, with its ridge, most.
    """
    values, hessian = standardize(weight, matrix)
    is_kept = torch.zeros(len(hessian), dtype=torch.bool)
    is_kept[kept] = True
    ids, count = torch.cat([is_kept.nonzero(), (~is_kept).nonzero()]).flatten(), len(kept)
    values, hessian = values[:, ids], hessian[ids][:, ids]
    table = _fitted(values, hessian, count)
    error = float((values[:, count:] * table[len(ids) :, count:]).sum())
    for _ in range(most_swaps(len(values), count, len(ids))):
        gains = swap_gains(table, count)
        gain, place = gains.max(), divmod(int(gains.argmax()), gains.shape[1])
        if not gain > GAIN * error:
            break
        error -= float(gain)
        pair = [place[0], count + place[1]]
        for one in pair:
            _sweep(table, one)
        for order in (ids, table, table.T):
            order[pair] = order[pair[::-1]]
    return sorted(ids[:count].tolist())


def most_swaps(rows: int, count: int, total: int) -> int:
    """Bound the swaps of a linear with so many outputs, kept inputs and inputs."""
    pairs = count * (total - count)
    return min(int(SWAPS * total) + 1, int(WORK / (pairs * rows))) if pairs else 0


def _fitted(values: Tensor, hessian: Tensor, count: int) -> Tensor:
    """Fit outputs by the first `count` inputs; the table that `_sweep` changes input by input.

    Returns:
        (n + rows, n). With A the moments, I the inputs in the fit and J the others: -A_II^-1,
        M = A_II^-1 A_IJ, its transpose, and what is left of A_JJ; below these the weights of I, and
        the products of J with what is left of the outputs.
    """
    inverse = torch.cholesky_inverse(cholesky(hessian[:count, :count]))
    table = torch.cat([hessian, values @ hessian])
    left = table[:, :count] @ inverse
    table[:, count:] -= left @ hessian[:count, count:]
    table[:, :count] = left
    table[:count, :count] = -inverse
    table[:count, count:] = left[count : len(hessian)].T
    return table


def _sweep(table: Tensor, one: int) -> None:
    """Take an input into the fit, or out of it, in place."""
    pivot, row = float(table[one, one]), table[one].clone()
    column = table[:, one].clone()
    table.addr_(column, row, alpha=-1 / pivot)
    table[:, one], table[one] = column / abs(pivot), row / abs(pivot)
    table[one, one] = -1 / pivot


def swap_gains(table: Tensor, count: int) -> Tensor:
    """Say by how much the error falls when an input leaves the fit and another comes in.

    Args:
        table: see `_fitted`.
        count: inputs in the fit, which are the first.

    Returns:
        (count, n - count): one that leaves by one that comes.
    """
    n = table.shape[1]
    power, mixed, left = (
        -table.diagonal()[:count, None],
        table[:count, count:],
        table.diagonal()[count:n],
    )
    weights, products = table[n:, :count], table[n:, count:]
    rise = weights.square().sum(0)[:, None] / power
    more = mixed.square() / power
    gain = products.square().sum(0) + 2 * (weights.T @ products) * mixed / power + more * rise
    return gain / (left + more) - rise


def _prune(ffn: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    down = ffn.get_submodule(module.output)
    matrix = moments(down, module, EXCHANGE.name, evidence.inputs)
    weight, inputs = outgoing(ffn, module, EXCHANGE.name, evidence)
    order = neuron_pivots(weight, inputs.matrix).order
    kept = order[: module.units - units_to_remove(module.units, rate)]
    return Pruned(kept_units=exchange(weight, matrix, kept))


EXCHANGE = Method(
    name="exchange",
    kinds=("ffn",),
    reference="Meng et al. 2024, OSSCAR: local search (arXiv 2403.12983)",
    prune=_prune,
    needs=("inputs",),
)
