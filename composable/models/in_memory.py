"""Models of transformers that never were in a file of ours: what our files would say of them."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor

from composable import families
from composable.families import Family
from composable.models.checkpoint import (
    Checkpoint,
    config_dict,
    fingerprint_of_stream,
    unique_tensors,
)


def describe(model: Any) -> Checkpoint:
    """Say what a model file would say of a model: its config, fingerprint and modules.

    All weights are hashed, which takes a second for some hundred million of them. Those that were
    moved to the disk or to another memory are fetched one at a time.

    Args:
        model: of transformers, of a supported family; it is left as it is, on any devices.

    Returns:
        A checkpoint with the model itself; for a family that changes the layout of its models, with
        a model in the changed layout.

    Raises:
        UserError: unknown family.
    """
    family = families.of(model)
    is_offloaded = any(has_offloaded_params(module) for module in model.modules())
    tensors = _fetched(model) if is_offloaded else unique_tensors(model.state_dict())
    shown = model
    # in the layout of our files the heads of a model can be seen
    attentions = [module for module in family.modules(model) if module.kind == "attention"]
    if family.prepare is not None and not any(module.units for module in attentions):
        shown = _prepared(model, family, dict(tensors))
        tensors = unique_tensors(shown.state_dict())
    config = config_dict(model)
    info = {"source": getattr(model.config, "name_or_path", "")}
    return Checkpoint(
        shown, None, config, fingerprint=fingerprint_of_stream(config, tensors), info=info
    )


def _fetched(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what `unique_tensors` does of a model whose weights are partly elsewhere."""
    first: dict[str, str] = {}  # where weights are elsewhere, only their names say what is tied
    for name in sorted(model.state_dict()):
        source = model.all_tied_weights_keys.get(name, name)
        if first.setdefault(source, name) == name:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            with align_module_device(module, torch.device("cpu")):
                tensor = getattr(module, leaf)
            yield name, tensor


def _prepared(model: Any, family: Family, tensors: dict[str, Tensor]) -> Any:
    """Make a model of the same weights in the layout of our files."""
    for name, source in model.all_tied_weights_keys.items():
        tied = tensors[name] if name in tensors else tensors[source]
        tensors |= {other: tied for other in (name, source) if other not in tensors}
    with init_empty_weights(include_buffers=False):
        made = type(model)(model.config)
    made.load_state_dict(tensors, assign=True)
    assert family.prepare is not None
    family.prepare(made)
    return made
