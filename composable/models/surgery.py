"""The only code that changes shapes: keep heads and neurons, remove modules, mask weights."""

import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from composable.errors import ShapeError
from composable.families import Family, Module
from composable.families.base import Layers, cache_of
from composable.models.structure import Structure, check, mapped_layers, removed_layers


class Zeros(nn.Module):
    """A removed linear or feed-forward: zeros in the shape of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros of the input's shape."""
        return torch.zeros_like(hidden_states)


class NoAttention(nn.Module):
    """A removed attention: adds nothing, but tells the cache how many tokens it has seen.

    Positions are taken from the length of the first layer's cache.

    Args:
        layer_idx: number of its layer; None where there is no cache.
    """

    def __init__(self, layer_idx: int | None = None):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zeros of the input's shape, and no attention weights."""
        _count_tokens(cache_of(kwargs), hidden_states, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class LinearMap(nn.Linear):
    """What stands in the place of a block of layers: x + W x + c.

    Args:
        width: of the states.
        output: see `Family.layer_output`.
        layer_idx: see `NoAttention`.
    """

    def __init__(
        self,
        width: int,
        output: Callable[[Tensor, tuple[Any, ...]], Any] | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__(width, width)
        self.layer_idx = layer_idx
        self._output = output

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return what a layer of the family returns."""
        cache = next((it for it in (*args, *kwargs.values()) if isinstance(it, Cache)), None)
        _count_tokens(cache, hidden_states, self.layer_idx)
        states = hidden_states + super().forward(hidden_states)
        return states if self._output is None else self._output(states, (hidden_states, *args))


def _count_tokens(cache: Any, hidden_states: Tensor, layer_idx: int | None) -> None:
    """Tell a cache how many tokens have passed, with one head of width one."""
    if cache is not None and layer_idx is not None:
        empty = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        own.update(empty, empty, layer_idx)


def units_to_remove(units: int, rate: float) -> int:
    """Count the units that go: floor(units * rate + 0.5), at least one stays unless rate is 1."""
    if rate >= 1:
        return units
    return min(int(units * rate + 0.5), units - 1)


def head_rows(kept: list[int], head_size: int) -> Tensor:
    """Rows of q, k, v (columns of o) that belong to heads `kept`, in their order."""
    heads = torch.tensor(kept, dtype=torch.long, device="cpu")
    return (heads[:, None] * head_size + torch.arange(head_size, device="cpu")).flatten()


def kept_groups(module: Module, kept: list[int]) -> list[int]:
    """Key/value heads that the query heads `kept` read, ascending.

    Raises:
        ShapeError: they keep unequally many query heads each.
    """
    readers = [0] * module.groups
    for head in kept:
        readers[head * module.groups // module.units] += 1
    if len({count for count in readers if count}) > 1:
        raise ShapeError(
            f'"{module.name}": heads {kept} leave its {module.groups} key/value heads with '
            f"{readers} query heads; every one that stays needs equally many."
        )
    return [group for group, count in enumerate(readers) if count]


def unit_rows(module: Module, kept: list[int]) -> dict[str, Tensor]:
    """Say what belongs to the units `kept`.

    Returns:
        Path of every part -> ids of its rows (of the output's part: columns) that stay.
    """
    if module.kind == "ffn":
        neurons = torch.tensor(kept, dtype=torch.long, device="cpu")
        return {child: neurons for _, child in module.parts}
    queries = head_rows(kept, module.head_size)
    shared = head_rows(kept_groups(module, kept), module.head_size)
    return {child: shared if role in ("k", "v") else queries for role, child in module.parts}


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


def keep_units(holder: nn.Module, module: Module, kept: list[int]) -> None:
    """Physically remove all heads or neurons but `kept`.

    Args:
        holder: the module that has the parts, with all the units that `module` names.
        module: its description, an attention or an ffn.
        kept: ascending ids; may be empty.

    Raises:
        ShapeError: an id does not exist, the ids are not ascending, or the key/value heads that
            stay keep unequally many query heads.
    """
    check_units(module, kept)
    for child, ids in unit_rows(module, kept).items():
        linear: Any = holder.get_submodule(child)
        side = "columns" if child == module.output else "rows"
        put(holder, child, slice_linear(linear, **{side: ids}))


def check_units(module: Module, kept: list[int]) -> None:
    """Raise ShapeError where `kept` are no ascending ids of units that a module has."""
    if kept != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < module.units):
        what = "heads" if module.kind == "attention" else "neurons"
        raise ShapeError(
            f'"{module.name}" has {what} 0 to {module.units - 1}; kept {what} {kept!s:.60} were '
            "asked for, expected ascending ids among them."
        )


def own_shapes(
    holder: nn.Module, module: Module, kept: list[int] | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of what `own_tensors` returns; ShapeError as of `keep_units`."""
    found = {name: tuple(weight.shape) for name, weight in own_parameters(holder, module).items()}
    if kept is None:
        return found
    check_units(module, kept)
    for child, ids in unit_rows(module, kept).items():
        rows, columns = found[f"{child}.weight"]
        if child == module.output:
            found[f"{child}.weight"] = (rows, len(ids))
        else:
            found[f"{child}.weight"] = (len(ids), columns)
            found |= {name: (len(ids),) for name in (f"{child}.bias",) if name in found}
    return found


def own_tensors(
    holder: nn.Module, module: Module, kept: list[int] | None = None
) -> dict[str, Tensor]:
    """Copy the weights that belong to a module alone (not T5's shared bias table).

    Returns:
        Name relative to `holder`, which has all its units -> weight or bias, of the units `kept`
        only; of all where that is None.
    """
    found = {name: weight.detach() for name, weight in own_parameters(holder, module).items()}
    for child, ids in unit_rows(module, kept).items() if kept is not None else ():
        if child == module.output:
            found[f"{child}.weight"] = found[f"{child}.weight"][:, ids]
        else:
            found |= {n: found[n][ids] for n in (f"{child}.weight", f"{child}.bias") if n in found}
    return {name: tensor.clone() for name, tensor in found.items()}


def own_parameters(holder: nn.Module, module: Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to a module alone, by name relative to `holder`."""
    if not module.parts:
        return dict(holder.named_parameters())
    return {
        f"{child}.{name}": weight
        for _, child in module.parts
        for name, weight in holder.get_submodule(child).named_parameters()
    }


def put(holder: nn.Module, path: str, module: nn.Module) -> None:
    """Set a child by its path."""
    parent, _, child = path.rpartition(".")
    setattr(holder.get_submodule(parent), child, module)


def adapt(holder: nn.Module, module: Module, family: Family, kept: list[int] | None) -> None:
    """Let an attention run with the heads it has left.

    Args:
        holder: the attention, sliced already.
        module: its description before.
        family: of the model.
        kept: ids of its heads; None where it keeps all, but others of the model may not.
    """
    if family.adapt_attention is not None:
        family.adapt_attention(holder, kept)
    elif kept:
        core = holder.get_submodule(family.core)
        counts = {
            "heads": len(kept),
            "width": len(kept) * module.head_size,
            "per_group": len(kept) // len(kept_groups(module, kept)),
        }
        for attribute, what in family.counters:
            setattr(core, attribute, counts[what])


def apply_structure(model: PreTrainedModel, family: Family, structure: Structure) -> None:
    """Give a dense `model` (also on the meta device) the shapes that its edits describe.

    Args:
        model: any model of the family, also one that was not made by this program.
        family: of the model.
        structure: the edits; linear maps are put in their places, to be filled.

    Raises:
        ShapeError: edits that do not fit the model or each other, a unit that does not exist, a
            stack without layers, a config that lists something by layer which the family does not
            know of.
    """
    modules = {module.name: module for module in family.modules(model)}
    check(structure, family, modules)
    kept = {
        edit.module: list(edit.units) for edit in structure if modules[edit.module].kind != "layer"
    }
    for name, units in kept.items():
        module = modules[name]
        if units or (module.kind == "attention" and family.adapt_attention):
            keep_units(model.get_submodule(module.holder), module, units)
        else:
            _remove(model, module, family)
    attentions = [module for module in modules.values() if module.kind == "attention"]
    if any(module.name in kept for module in attentions):
        for module in attentions:
            adapt(model.get_submodule(module.name), module, family, kept.get(module.name))
    _remove_layers(model, family, removed_layers(structure, family), mapped_layers(structure))


def _remove(model: nn.Module, module: Module, family: Family) -> None:
    """Replace an attention or an ffn by one that adds nothing."""
    holder = model.get_submodule(module.holder)
    if module.kind == "attention":
        core = holder.get_submodule(family.core)
        index = getattr(core, "layer_idx", None)
        if family.core:  # its output goes through o, which must not need the width of the heads
            put(holder, family.core, NoAttention(index))
            put(holder, module.output, nn.Identity())
        else:
            put(model, module.name, NoAttention(index))
    elif module.holder == module.name:
        put(model, module.name, Zeros())
    else:  # the linears lie among others
        for _, child in module.parts:
            put(holder, child, Zeros() if child == module.output else nn.Identity())


def _remove_layers(
    model: Any, family: Family, names: Collection[str], maps: Collection[str]
) -> None:
    """Take whole layers out, put maps in the place of others; let the config count what stays."""
    paths_of = layer_paths(model, family)
    for layers in family.layers:
        path = paths_of[layers.stack]
        present = model.get_submodule(path)
        gone = {i for i in range(len(present)) if f"{path}.{i}" in names}
        mapped = {i for i in range(len(present)) if f"{path}.{i}" in maps}
        if gone | mapped:
            _check_removal(model.config, path, present, gone | mapped, layers)
            if family.before_layer_removal is not None:
                family.before_layer_removal(present, gone | mapped)
            for index in mapped:
                has_cache = any(hasattr(part, "layer_idx") for part in present[index].modules())
                present[index] = LinearMap(
                    model.config.hidden_size, family.layer_output, index if has_cache else None
                )
            stay = nn.ModuleList(layer for i, layer in enumerate(present) if i not in gone)
            put(model, path, stay)
            _renumber(stay)
            for name in layers.lists:
                values = getattr(model.config, name, None)
                if values is not None:
                    kept = [value for i, value in enumerate(values) if i not in gone]
                    setattr(model.config, name, kept)
        for count in layers.counts:
            setattr(model.config, count, len(present) - len(gone))


def layer_paths(model: nn.Module, family: Family) -> dict[str, str]:
    """Find the list of layers of every stack: stack -> its path.

    Raises:
        ShapeError: a stack has none.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = {}
    for layers in family.layers:
        path = next((name for name in lists if re.fullmatch(layers.path, name)), None)
        if path is None:
            raise ShapeError(f'no list of layers "{layers.path}" in this {type(model).__name__}.')
        found[layers.stack] = path
    return found


def _check_removal(
    config: Any, path: str, present: nn.ModuleList, gone: set[int], layers: Layers
) -> None:
    if len(gone) == len(present):
        raise ShapeError(f'all {len(gone)} layers of "{path}" would go; at least one must stay.')
    for name, value in config.to_dict().items():
        by_layer = isinstance(value, list) and len(value) == len(present) and "layer" in name
        if by_layer and name not in layers.lists:
            raise ShapeError(
                f"the config's {name} has an entry for each layer, and its family does not say so; "
                "add it to its table (docs/adding.md)."
            )


def _renumber(layers: nn.ModuleList) -> None:
    """Give the key/value caches of the remaining layers the indices 0, 1, ...."""
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index  # type: ignore[assignment]


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Set every masked weight to exactly zero, in place; masks are True where a weight stays."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            # where, not a product: a weight that became infinite must not turn into NaN
            parameters[name].copy_(torch.where(mask, parameters[name], 0.0))
