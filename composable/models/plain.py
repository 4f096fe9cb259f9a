"""A composed model as transformers builds it: all layers of one size, by zeros where need be."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from composable.errors import MismatchError
from composable.families import Family, Module
from composable.models import checkpoint as model_file
from composable.models.checkpoint import Checkpoint
from composable.models.structure import ACTIONS, mapped_layers, name_after_removal, removed_layers
from composable.models.surgery import head_rows, kept_groups, put

log = logging.getLogger("composable")


@dataclass(frozen=True)
class Part:
    """An attention or ffn, and what it has left.

    Attributes:
        module: as it is in the dense model, under its name after whole layers went.
        units: ids of the heads or neurons that stayed; () where it is gone.
        groups: ids of their key/value heads; of an ffn its neurons.
    """

    module: Module
    units: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def per_group(self) -> int:
        """Query heads of each key/value head; of an ffn 1."""
        return len(self.units) // len(self.groups) if self.groups else 0

    @property
    def noun(self) -> str:
        """What its units are."""
        return "heads" if self.module.kind == "attention" else "neurons"


@dataclass(frozen=True)
class Size:
    """How many units every attention, or every ffn, gets: `groups` times `per_group`."""

    groups: int
    per_group: int

    @property
    def units(self) -> int:
        """Heads or neurons."""
        return self.groups * self.per_group


def build(checkpoint: Checkpoint, path: Path, pad: bool = False) -> tuple[PreTrainedModel, int]:
    """Make a model of transformers' own classes that computes what a composed model does.

    A config has one number of heads and of neurons for all layers. What has fewer is filled up with
    zeros: the columns of `o` and of an ffn's down that read the new units are zero, so the outputs
    are the same. A T5's heads share a table of position biases, by which they get their places.

    Args:
        checkpoint: the model; those of its tensors that stay as they are become the new one's.
        path: where it was read, for messages.
        pad: whether zeros may be added.

    Returns:
        The model, with its weights as they are in this program (see `Family.prepare`), and the
        number of attentions and ffns that were filled up.

    Raises:
        MismatchError: transformers cannot build it, or not without zeros.
    """
    structure, family = checkpoint.structure, checkpoint.family
    for name in mapped_layers(structure):
        raise MismatchError(
            f'{path}: "{name}" ({ACTIONS["map"].result}) is nothing that transformers can build; '
            "remove these layers without a map."
        )
    removed = removed_layers(structure, family)
    model = model_file.build(
        checkpoint.config, tuple(edit for edit in structure if edit.module in removed)
    )
    parts = _parts(checkpoint, model, removed)
    places = _places(parts, family)
    config: Any = model.config
    sizes = {"ffn": _ffn_size(parts, family), "attention": Size(0, 0)}
    sizes["attention"] = _attention_size(parts, places, family, config, pad)
    narrow = [part for part in parts if not _fills(part, places, sizes[part.module.kind])]
    if narrow and not pad:
        raise MismatchError(_refusal(path, narrow[0], sizes, family))
    for key, value in _values(sizes, parts, family).items():
        setattr(config, key, value)
    tensors = {
        name: tensor.detach()
        for name, tensor in checkpoint.model.named_parameters(remove_duplicate=False)
    }
    _fill(model, tensors, parts, places, sizes)
    _cut_tables(tensors, parts, sizes["attention"], family)
    for name, absent in list(model.named_parameters(remove_duplicate=False)):
        tensor = tensors.get(name, torch.zeros(absent.shape, dtype=checkpoint.model.dtype))
        put(model, name, nn.Parameter(tensor))  # type: ignore[arg-type]
    model_file.tie_shared(model)
    generation: Any = getattr(checkpoint.model, "generation_config", None)
    model.generation_config = generation
    if narrow:
        log.info(
            "%s: %d attentions and ffns were filled up with zeros, to %d heads and %d neurons",
            *(path, len(narrow), sizes["attention"].units, sizes["ffn"].units),
        )
    return model.eval(), len(narrow)


def _parts(checkpoint: Checkpoint, model: nn.Module, removed: Sequence[str]) -> list[Part]:
    """List the attentions and ffns with what they have left; `model` has the dense ones."""
    family = checkpoint.family
    kept = {
        name_after_removal(edit.module, family, removed): edit.units
        for edit in checkpoint.structure
        if edit.module not in removed
    }
    found = []
    for module in family.modules(model):
        if module.kind in ("attention", "ffn"):
            units = kept.get(module.name, tuple(range(module.units)))
            is_ffn = module.kind == "ffn"
            groups = units if is_ffn else tuple(kept_groups(module, [*units]))
            found.append(Part(module, units, groups))
    return found


def _reads_table(part: Part, family: Family) -> bool:
    return bool(family.head_table) and part.module.kind == "attention" and not part.module.is_cross


def _table_ids(parts: Sequence[Part], stack: str, family: Family) -> list[int]:
    """Heads of a stack whose columns of the shared table stay."""
    readers = (it for it in parts if it.module.stack == stack and _reads_table(it, family))
    return sorted({head for part in readers for head in part.units})


def _places(parts: Sequence[Part], family: Family) -> dict[str, list[int]]:
    """Say which key/value head, or neuron, of the new module each one becomes."""
    found = {}
    for part in parts:
        ids = [*part.groups]
        if _reads_table(part, family):
            ids = _table_ids(parts, part.module.stack, family)
        found[part.module.name] = [ids.index(group) for group in part.groups]
    return found


def _fills(part: Part, places: dict[str, list[int]], size: Size) -> bool:
    """Tell whether a module has all units that its size asks for, each in its place."""
    return len(places[part.module.name]) == size.groups and part.per_group == size.per_group


def _ffn_size(parts: Sequence[Part], family: Family) -> Size:
    """Find the smallest size that all ffns fit into; the dense one where the config has none."""
    ffns = [part for part in parts if part.module.kind == "ffn"]
    if "neurons" not in dict(family.sizes):
        return Size(ffns[0].module.units, 1)
    return Size(max([1, *(len(part.units) for part in ffns)]), 1)


def _attention_size(
    parts: Sequence[Part],
    places: dict[str, list[int]],
    family: Family,
    config: Any,
    pad: bool,
) -> Size:
    """Find the smallest size that all attentions fit into and, with `pad`, the config allows."""
    attentions = [part for part in parts if part.module.kind == "attention"]
    first = attentions[0].module
    dense = Size(first.groups, first.units // first.groups)
    if "heads" not in dict(family.sizes):
        return dense
    ends = (place + 1 for part in attentions for place in places[part.module.name])
    least = Size(max([1, *ends]), max([1, *(part.per_group for part in attentions)]))
    sizes = (
        Size(groups, per_group)
        for groups, per_group in product(
            range(least.groups, dense.groups + 1), range(least.per_group, dense.per_group + 1)
        )
    )
    for size in sorted(sizes, key=lambda it: it.units) if pad else [least]:
        if _allows(config, _values({"attention": size}, parts, family)):
            return size
    return dense  # no other number of heads is allowed


def _values(sizes: dict[str, Size], parts: Sequence[Part], family: Family) -> dict[str, int]:
    """Return the config values that say the sizes; of attentions only where some heads are gone."""
    known, first = dict(family.sizes), next(it.module for it in parts if it.module.groups)
    wanted = {"neurons": sizes["ffn"].units} if "ffn" in sizes else {}
    size = sizes["attention"]
    if (size.units, size.groups) != (first.units, first.groups):
        wanted |= {"heads": size.units, "groups": size.groups, "head_size": first.head_size}
    return {known[what]: value for what, value in wanted.items() if what in known}


def _allows(config: Any, changes: dict[str, int]) -> bool:
    """Tell whether the class of a config accepts other values."""
    try:
        type(config).from_dict(config.to_dict() | changes)
    except (StrictDataclassError, ValueError):
        return False
    return True


def _refusal(path: Path, part: Part, sizes: dict[str, Size], family: Family) -> str:
    module, size, name = part.module, sizes[part.module.kind], family.name
    left = f"{len(part.units)} of {module.units} {part.noun}" if part.units else "nothing"
    rule = f"transformers builds {name} models with {size.units} {part.noun} in every {module.kind}"
    advice = "give all of them one rate that leaves a number that their config accepts, or"
    if part.noun not in dict(family.sizes):
        advice = "their config cannot say otherwise;"
    elif _reads_table(part, family):
        rule = f"the self-attentions of a {name} stack share their position biases"
        advice = "all have to keep the same heads, and all stacks equally many, or"
    return f'{path}: "{module.name}" has {left} left; {rule}: {advice} fill up with zeros (pad).'


def _fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    parts: Sequence[Part],
    places: dict[str, list[int]],
    sizes: dict[str, Size],
) -> None:
    """Bring the linears of attentions and ffns to their sizes, in place of those in `tensors`."""
    dense = dict(model.named_parameters())
    for part in parts:
        module, size = part.module, sizes[part.module.kind]
        groups = places[module.name]
        units = [
            group * size.per_group + number for group in groups for number in range(part.per_group)
        ]
        for role, child in module.parts:
            ids, count = (groups, size.groups) if role in "kv" else (units, size.units)
            width = module.head_size or 1
            for kind in ("weight", "bias"):
                name = f"{module.holder}.{child}.{kind}"
                if name not in dense or (kind == "bias" and child == module.output):
                    continue
                side = 1 if child == module.output else 0
                shape = [*dense[name].shape]
                shape[side] = 0
                present = tensors.get(name, torch.zeros(shape, dtype=_dtype(tensors)))
                tensors[name] = _spread(present, head_rows(ids, width), count * width, side)


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return next(iter(tensors.values())).dtype


def _spread(tensor: Tensor, ids: Tensor, count: int, side: int) -> Tensor:
    """Put rows (or columns) to the places `ids` of `count`; the others are zero."""
    if ids.tolist() == list(range(count)):
        return tensor
    shape = [*tensor.shape]
    shape[side] = count
    return tensor.new_zeros(shape).index_copy_(side, ids, tensor)


def _cut_tables(
    tensors: dict[str, Tensor], parts: Sequence[Part], size: Size, family: Family
) -> None:
    """Leave the columns of the heads that are left in the tables that stacks share."""
    for part in parts:
        name = f"{part.module.holder}.{family.head_table}.weight"
        if _reads_table(part, family) and name in tensors:
            heads = torch.tensor(_table_ids(parts, part.module.stack, family), dtype=torch.long)
            table = tensors[name][:, heads]
            tensors[name] = _spread(table, torch.arange(len(heads)), size.units, 1)
