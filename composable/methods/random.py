"""Random: units go by lot, the control that every other choice has to beat."""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from composable.families import Module
from composable.methods.base import Evidence, Method, Pruned, keep_best


def seed_of(seed: int, module: str) -> int:
    """Make the seed of a module from that of a run, so that no module depends on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:8], "big")


def draw(units: int, seed: int) -> Tensor:
    """Draw the importance of every unit: (units,) float64."""
    return torch.from_numpy(np.random.default_rng(seed).random(units))


def _prune(holder: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    assert evidence.seed is not None  # it is needed
    return keep_best(draw(module.units, evidence.seed), module, rate)


RANDOM = Method(
    name="random",
    kinds=("attention", "ffn"),
    reference="a control: what any method has to beat",
    prune=_prune,
    needs=("seed",),
)
