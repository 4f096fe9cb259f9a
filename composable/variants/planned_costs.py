"""What a configuration will cost, counted on shapes before anything is pruned."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from composable.families import Module
from composable.formats.config import METRICS, Configuration, covered
from composable.methods.base import kept_heads, kept_units, weights_to_remove
from composable.models import cost
from composable.models.checkpoint import Checkpoint
from composable.models.structure import Edit, name_after_removal, ordered, removed_layers
from composable.models.surgery import apply_structure


def planned_costs(
    dense: Checkpoint,
    configuration: Configuration,
    lengths: Mapping[str, float] | None = None,
    whole_groups: bool = False,
) -> dict[str, float]:
    """Count what the composed model will have.

    Args:
        dense: the dense model; left as it is.
        configuration: one that fits it.
        lengths: see `cost.total`.
        whole_groups: see `Module`.

    Returns:
        "macs", "parameters" and "layer_parameters", see `cost.total`; "unmasked_parameters": those
        that no mask sets to 0, where every linear loses exactly its rate.
    """
    family, model = dense.family, _on_meta(dense.model)
    modules = {module.name: module for module in family.modules(model)}
    edits: list[Edit] = []
    for name, entry in configuration.items():
        module = replace(modules[name], whole_groups=whole_groups)
        if entry.rate == 1 and module.kind == "layer":
            first, *others = covered(name, entry)
            edits.append(Edit(first, "remove" if entry.method is None else "map"))
            edits += [Edit(other, "remove") for other in others]
        elif entry.rate == 1:
            edits.append(Edit(name, "remove"))
        elif entry.rate > 0 and module.kind in ("attention", "ffn"):
            edits.append(Edit(name, "keep", _any_units(module, entry.rate)))
    structure = ordered(edits)
    apply_structure(model, family, structure)
    removed = removed_layers(structure, family)
    masked = 0
    for name, entry in configuration.items():
        if modules[name].kind == "linear" and entry.rate > 0:
            path = name_after_removal(name, family, removed)
            masked += weights_to_remove(model.get_parameter(f"{path}.weight").numel(), entry.rate)
    found = {one.replace("-", "_"): cost.total(model, family, one, lengths) for one in METRICS}
    return {**found, "unmasked_parameters": found["parameters"] - masked}


def _any_units(module: Module, rate: float) -> tuple[int, ...]:
    """Choose as many units as stay at a rate; which ones makes no difference to the shapes."""
    alike = torch.ones(module.units)
    kept = (
        kept_heads(alike, module, rate) if module.kind == "attention" else kept_units(alike, rate)
    )
    return tuple(kept)


def _on_meta(model: Any) -> Any:
    """Copy a model without its weights; what is tied stays tied."""
    empty: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, empty)
