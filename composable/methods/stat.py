"""STAT: the units stay that best stand for the others, by column-pivoted QR of the inputs."""

from torch import Tensor, nn

from composable.families import Module
from composable.linalg.pivots import Pivots, pivots
from composable.methods.base import Evidence, Method, Pruned
from composable.methods.inputs import outgoing
from composable.models.surgery import units_to_remove


def neuron_pivots(weight: Tensor, matrix: Tensor) -> Pivots:
    """Order the neurons of an ffn; sizes are of their outputs times the outgoing norms.

    Args:
        weight: of the down projection, (rows, n).
        matrix: second moments of its inputs, (n, n).

    Source: Flynn et al. 2024; the pivots of Z D with d_j = |W[:, j]|.
    """
    norms = weight.detach().to(matrix).norm(dim=0)
    return pivots(matrix * norms * norms[:, None], norms)


def head_order(weight: Tensor, matrix: Tensor, module: Module) -> list[int]:
    """Order the heads of an attention, the best first.

    Args:
        weight: of the output projection, (rows, heads * head_size).
        matrix: second moments of its inputs, (heads * head_size, heads * head_size).
        module: an attention. With grouped queries every group gives one head before any gives
            another; or whole groups are what is ordered, and their heads follow each other.

    Source: Flynn et al. 2024; the pivots of heads as columns of all their tokens and coordinates,
    so the traces of the blocks of `matrix`.
    """
    heads, groups = module.units, module.groups
    columns = groups if module.whole_groups else heads
    size = matrix.shape[0] // columns
    blocks = matrix.view(columns, size, columns, size)
    traces = blocks.diagonal(dim1=1, dim2=3).sum(2)
    norms = weight.detach().to(matrix).view(-1, columns, size).norm(dim=(0, 2))
    each = heads // columns
    order = pivots(traces, norms, groups if groups < columns else 1).order
    return [column * each + head for column in order for head in range(each)]


def _prune(holder: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    weight, inputs = outgoing(holder, module, STAT.name, evidence)
    if module.kind == "ffn":
        order = neuron_pivots(weight, inputs.matrix).order
    else:
        order = head_order(weight, inputs.matrix, module)
    gone = units_to_remove(module.steps, rate) * (module.units // module.steps)
    return Pruned(kept_units=sorted(order[: module.units - gone]))


STAT = Method(
    name="stat",
    kinds=("attention", "ffn"),
    reference="Flynn et al. 2024, STAT: Shrinking Transformers After Training (arXiv 2406.00061)",
    prune=_prune,
    needs=("inputs",),
)
