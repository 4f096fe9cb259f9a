"""Neuron-wise l1: the neurons of a feed-forward with the smallest weights go."""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.methods.base import Evidence, Method, Pruned, kept_units

log = logging.getLogger("composable")


def neuron_importance(incoming: Sequence[Tensor], outgoing: Tensor) -> Tensor:
    """Rank neurons by the l1 norm of all their weights.

    Args:
        incoming: weights of up and, where there is one, gate, each (neurons, hidden).
        outgoing: weight of down, (hidden, neurons).

    Returns:
        Importance per neuron, (neurons,), float64; higher is kept. Biases are left out.

    Source: Li et al. 2017 (arXiv 1608.08710) for units of a layer by the l1 norm of their weights.
    """
    rows = torch.stack([weight.detach().double().abs().sum(1) for weight in incoming])
    return rows.sum(0) + outgoing.detach().double().abs().sum(0)


def importance_of(ffn: nn.Module, module: Module) -> Tensor:
    """Rank the neurons of an ffn, see `neuron_importance`."""
    if any(role == "gate" for role, _ in module.parts):
        _warn_of_gates()
    incoming = [
        ffn.get_parameter(f"{child}.weight") for role, child in module.parts if role != "down"
    ]
    return neuron_importance(incoming, ffn.get_parameter(f"{module.part('down')}.weight"))


@functools.cache  # once a run, not once a module
def _warn_of_gates() -> None:
    log.warning(
        "neuron_l1: in an ffn with a gate, neurons chosen by their weights are worse than random "
        "ones; use a method that looks at inputs (exchange, stat, unit_wanda, fluctuation)."
    )


def _prune(ffn: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    return Pruned(kept_units=kept_units(importance_of(ffn, module), rate))


NEURON_L1 = Method(
    name="neuron_l1",
    kinds=("ffn",),
    reference="Li et al. 2017, Pruning Filters for Efficient ConvNets (arXiv 1608.08710)",
    prune=_prune,
)
