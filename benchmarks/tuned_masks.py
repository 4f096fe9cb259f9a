"""Tuned masks: one least-squares scale for every kept unit, folded into what reads it.

What is left to choose after units went, where their consumer keeps its weights but for one factor
a unit. The refit of `variants.least_squares` may change every weight, so it has more freedom.

Source: Kwon et al. 2022 (arXiv 2204.09656), mask tuning; there from the activations of the pruned
model, layer by layer, here from the dense model's second moments, as everything else is fitted.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from composable.formats.bundle import Variant
from composable.linalg.grams import Gram
from composable.models.checkpoint import Checkpoint

#: Pull of each scale toward 1, relative to the power of what its unit adds to the output.
RIDGE = 1e-2
#: A module with a scale beyond this, on either side, stays untuned.
LARGEST = 10.0


def unit_products(weight: Tensor, moments: Tensor, units: int) -> Tensor:
    """Multiply what every two units add to the output, summed over rows and tokens.

    Args:
        weight: of the linear that all units flow into, (rows, units * size).
        moments: second moments of its inputs, (units * size, units * size).
        units: neurons, of size 1, or heads.

    Returns:
        G (units, units) float64: tr((Z_i W_i^T)^T (Z_j W_j^T)), block sums of M * (W^T W).
    """
    dense = weight.detach().to(moments)
    size = weight.shape[1] // units
    return (moments * (dense.T @ dense)).view(units, size, units, size).sum((1, 3))


def scales(products: Tensor, kept: Sequence[int], ridge: float = RIDGE) -> Tensor | None:
    """Choose the scales of the kept units by which they best stand for all.

    Args:
        products: `unit_products`.
        kept: ascending ids.
        ridge: see `RIDGE`; 0 for plain least squares.

    Returns:
        s (kept,) with the least ||Z W^T - Z_I diag(s) W_I^T||^2; None where one is beyond
        `LARGEST` or no number.
    """
    ids = torch.tensor([*kept], dtype=torch.long, device=products.device)
    own = products[ids][:, ids]
    missing = products[ids].sum(1) - own.sum(1)
    power = own.diagonal()
    # a unit that is always 0 has no say; its scale stays 1
    pull = torch.where(power > 0, ridge * power, torch.ones_like(power))
    found, failed = torch.linalg.solve_ex(own + torch.diag(pull), missing)
    is_sound = not bool(failed) and bool((1 + found).abs().le(LARGEST).all())
    return 1 + found if is_sound else None


def tune(
    dense: Checkpoint, variants: Sequence[Variant], inputs: Callable[[str], Gram]
) -> tuple[list[Variant], int]:
    """Scale what every kept unit adds, each module by itself.

    Args:
        dense: the dense model.
        variants: of attentions and ffns, with the dense weights of their units.
        inputs: path of a linear -> moments of its inputs in the dense model.

    Returns:
        The variants, in the same order, and how many of them stayed as they were although units
        are gone.
    """
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    products: dict[str, Tensor] = {}
    found, untuned = [], 0
    for variant in variants:
        module = modules[variant.module]
        if not variant.kept_units or len(variant.kept_units) == module.units:
            found.append(variant)
            continue
        if module.name not in products:
            weight = dense.model.get_parameter(f"{module.output_path}.weight").cpu()
            moments = inputs(module.output_path).matrix
            products[module.name] = unit_products(weight, moments, module.units)
        chosen = scales(products[module.name], variant.kept_units)
        untuned += chosen is None
        name = f"{module.output}.weight"
        own = variant.tensors[name]
        each = own.shape[1] // len(variant.kept_units)
        tensors = {}
        if chosen is not None:
            tensors[name] = own * chosen.repeat_interleave(each).to(own)
        found.append(dataclasses.replace(variant, tensors=variant.tensors | tensors))
    return found, untuned
