"""The only code that changes shapes: keep heads, remove ffns, remove layers, mask weights."""

import re
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from composable.errors import ShapeError
from composable.families import Family, Module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Structure(TypedDict):
    """How a composed model differs in shape from its dense model; names in the dense numbering.

    Keys:
        kept_heads: attention -> ascending ids of its heads ([] where the attention is gone).
        removed_ffns: feed-forwards that add nothing any more.
        removed_layers: whole layers that are gone.
    """

    kept_heads: dict[str, list[int]]
    removed_ffns: list[str]
    removed_layers: list[str]


def empty_structure() -> Structure:
    """Return the structure of a dense model."""
    return {"kept_heads": {}, "removed_ffns": [], "removed_layers": []}


class Nothing(nn.Module):
    """A removed feed-forward: adds zero to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros of the input's shape."""
        return torch.zeros_like(hidden_states)


def units_to_remove(units: int, rate: float) -> int:
    """Count the units that go: floor(units * rate + 0.5), at least one stays unless rate is 1."""
    if rate >= 1:
        return units
    return min(int(units * rate + 0.5), units - 1)


def head_rows(kept: list[int], head_size: int) -> Tensor:
    """Rows of q, k, v (columns of o) that belong to heads `kept`, in their order."""
    heads = torch.tensor(kept, dtype=torch.long, device="cpu")
    return (heads[:, None] * head_size + torch.arange(head_size, device="cpu")).flatten()


def slice_linear(
    linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None
) -> nn.Linear:
    """Make a smaller linear from the given output rows and input columns of `linear`.

    Returns:
        A new linear with copies of the kept weights; the bias follows the rows.
    """
    weight: Tensor = linear.weight.detach()
    bias: Tensor | None = linear.bias
    if rows is not None:
        rows = rows.to(weight.device)
        weight = weight[rows]
        bias = None if bias is None else bias.detach()[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    # of width 1 at first: torch warns when it initializes a linear without weights
    small = nn.Linear(1, 1, bias=False, device="meta")
    small.out_features, small.in_features = weight.shape
    small.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        small.bias = nn.Parameter(bias.detach().clone())
    return small


def keep_heads(attention: nn.Module, module: Module, kept: list[int]) -> None:
    """Physically remove all heads but `kept` from q, k, v and o of `attention`.

    Args:
        attention: the module itself, with all the heads that `module` names.
        module: its description.
        kept: ascending head ids; may be empty.

    Raises:
        ShapeError: an id does not exist, or the ids are not ascending.
    """
    if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < module.heads):
        raise ShapeError(
            f'"{module.name}" has heads 0 to {module.heads - 1}; kept heads {kept} were asked for, '
            "expected ascending ids among them."
        )
    rows = head_rows(kept, module.head_size)
    for role in ("q", "k", "v"):
        name = module.part(role)
        setattr(attention, name, slice_linear(getattr(attention, name), rows=rows))
    name = module.part("o")
    setattr(attention, name, slice_linear(getattr(attention, name), columns=rows))


def apply_structure(model: "PreTrainedModel", family: Family, structure: Structure) -> None:
    """Give a dense `model` (also on the meta device) the shapes that `structure` describes.

    Raises:
        ShapeError: an unknown name, a head that does not exist, a stack without layers.
    """
    modules = {module.name: module for module in family.modules(model)}
    for name in (
        *structure["kept_heads"], *structure["removed_ffns"], *structure["removed_layers"]
    ):  # fmt: skip
        if name not in modules:
            raise ShapeError(f'no module "{name}" in this model; it was pruned from another one.')
    for name, kept in structure["kept_heads"].items():
        keep_heads(model.get_submodule(name), modules[name], kept)
    for name in structure["removed_ffns"]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Nothing())
    if structure["kept_heads"]:
        for module in modules.values():
            if module.kind == "attention":
                family.adapt_attention(
                    model.get_submodule(module.name), structure["kept_heads"].get(module.name)
                )
    if structure["removed_layers"]:
        _remove_layers(model, family, structure["removed_layers"])
    for path, *counts in family.layer_lists:
        for count in counts:
            setattr(model.config, count, len(_layers(model, path)))


def _remove_layers(model: "PreTrainedModel", family: Family, names: list[str]) -> None:
    for path, *_ in family.layer_lists:
        layers = _layers(model, path)
        removed = {index for index in range(len(layers)) if f"{path}.{index}" in names}
        if not removed:
            continue
        if len(removed) == len(layers):
            raise ShapeError(
                f'all {len(layers)} layers of "{path}" would go; at least one must stay.'
            )
        family.before_layer_removal(layers, removed)
        stay = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in removed)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, stay)
        _renumber(stay)


def _layers(model: nn.Module, path: str) -> nn.ModuleList:
    layers = model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise ShapeError(f'"{path}" is a {type(layers).__name__}, a list of layers was expected.')
    return layers


def _renumber(layers: nn.ModuleList) -> None:
    """Give the key/value caches of the remaining layers the indices 0, 1, ...."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]


def name_after_removal(name: str, family: Family, removed_layers: list[str]) -> str | None:
    """Translate a name from the dense numbering of layers to that of the composed model.

    Returns:
        The new name; None if it lies in a removed layer.
    """
    for path, *_ in family.layer_lists:
        match = re.match(re.escape(path) + r"\.(\d+)(?=\.|$)", name)
        if match:
            if match.group(0) in removed_layers:
                return None
            index = int(match.group(1))
            index -= sum(f"{path}.{lower}" in removed_layers for lower in range(index))
            return f"{path}.{index}{name[match.end() :]}"
    return name


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Set every masked weight to exactly zero, in place.

    Args:
        model: any module.
        masks: parameter name -> boolean tensor of its shape, True where the weight stays.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            # where, not a product: a weight that became infinite must not turn into NaN
            parameters[name].copy_(torch.where(mask, parameters[name], 0.0))
