"""Unstructured l1: the weights of smallest absolute value go, per matrix."""

from typing import Any

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.methods.base import Method, Pruned


def keep_mask(weight: Tensor, rate: float) -> Tensor:
    """Mark the weights that stay when the smallest go.

    Args:
        weight: any shape.
        rate: fraction removed, 0 to 1.

    Returns:
        Boolean tensor of the same shape with exactly floor(n * rate + 0.5) zeros; of equal weights
        the one with the lower index goes first.

    Source: torch.nn.utils.prune.l1_unstructured with the integer amount; biases are left alone.
    """
    count = int(weight.numel() * rate + 0.5)
    # a stable sort, since topk leaves the order of ties open
    order = torch.sort(weight.detach().abs().flatten(), stable=True).indices
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[order[:count].to(mask.device)] = False
    return mask.view(weight.shape)


def _prune(linear: nn.Module, module: Module, rate: float, calibration: Any = None) -> Pruned:
    weight = linear.get_parameter("weight")
    return Pruned(mask=keep_mask(weight, rate))


L1 = Method(
    name="l1",
    kinds=("linear",),
    reference="Han et al. 2015, Learning both Weights and Connections (arXiv 1506.02626)",
    prune=_prune,
)
