"""How a composed model differs from its dense model: a list of edits, and their form in a file."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from composable.errors import FormatError, ShapeError
from composable.families import Family, Module


class Action(NamedTuple):
    """What an edit does to a module.

    Attributes:
        kinds: of the modules it is for, see `families.base.KINDS`.
        result: what became of the module, for messages.
        lists_units: whether it says which units stay; if not, its value in a file is `true`.
    """

    kinds: tuple[str, ...]
    result: str
    lists_units: bool = False


#: Every action by its key in a file; `surgery.apply_structure` carries them out.
ACTIONS = {
    "keep": Action(("attention", "ffn"), "some of its units are gone", lists_units=True),
    "remove": Action(("attention", "ffn", "layer"), "it is gone"),
    "map": Action(("layer",), "a linear map stands in its place"),
}


@dataclass(frozen=True)
class Edit:
    """What happened to one module of the dense model.

    Attributes:
        module: its name, in the numbering of the dense model.
        action: a key of `ACTIONS`.
        units: of "keep": ascending ids of the heads or neurons that stay, as the dense module
            numbers them.

    Raises:
        ShapeError: an unknown action, or units that do not go with it.
    """

    module: str
    action: str
    units: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ShapeError(
                f'"{self.module}": unknown edit "{self.action}"; known are {", ".join(ACTIONS)}.'
            )
        are_ids = all(type(unit) is int and unit >= 0 for unit in self.units)
        if not are_ids or list(self.units) != sorted(set(self.units)):
            raise ShapeError(
                f'"{self.module}": {self.action} {list(self.units)}; expected ascending ids.'
            )
        if bool(self.units) != ACTIONS[self.action].lists_units:
            expected = "no ids of units" if self.units else "ids of the units that stay"
            raise ShapeError(f'"{self.module}": {self.action} expects {expected}.')


#: Edits in the order of their modules' names; () for a dense model.
Structure = tuple[Edit, ...]


def ordered(edits: Iterable[Edit]) -> Structure:
    """Bring edits into the one order that files have, so that equal models are equal files.

    Raises:
        ShapeError: two edits of one module.
    """
    found = tuple(sorted(edits, key=lambda edit: edit.module))
    for one, other in pairwise(found):
        if one.module == other.module:
            raise ShapeError(
                f'"{one.module}" has two edits, {one.action} and {other.action}; expected one.'
            )
    return found


def to_json(structure: Structure) -> list[dict[str, Any]]:
    """Return what a model file says of its structure (docs/formats.md)."""
    return [
        {"module": edit.module, edit.action: list(edit.units) or True}
        for edit in ordered(structure)
    ]


def from_json(value: Any) -> Structure:
    """Read what `to_json` returned.

    Raises:
        FormatError: it has another form, or another order.
        ShapeError: an edit that cannot be.
    """
    if not isinstance(value, list):
        raise FormatError(
            f"its structure is {value!r:.60}, expected a list of edits; make it again."
        )
    structure = tuple(_edit(item) for item in value)
    if structure != ordered(structure):
        raise FormatError("its edits are not in the order of their modules; make it again.")
    return structure


def _edit(item: Any) -> Edit:
    if isinstance(item, dict) and len(item) == 2 and isinstance(item.get("module"), str):
        ((action, value),) = ((key, item[key]) for key in item if key != "module")
        if value is True or (isinstance(value, list) and value):
            return Edit(item["module"], action, () if value is True else tuple(value))
    raise FormatError(
        f"its structure has the edit {item!r:.60}, expected a module and one of "
        f"{', '.join(ACTIONS)}; make it again."
    )


def check(structure: Structure, family: Family, modules: Mapping[str, Module]) -> None:
    """Compare edits with the modules of the dense model.

    Raises:
        ShapeError: an unknown module, an edit that is not for its kind, a module of a layer that is
            gone, two edits of one module.
    """
    ordered(structure)
    gone = {*removed_layers(structure, family), *mapped_layers(structure)}
    for edit in structure:
        module, place = modules.get(edit.module), family.place(edit.module)
        if module is None:
            raise ShapeError(
                f'no module "{edit.module}" in this model; it was pruned from another one.'
            )
        kinds = ACTIONS[edit.action].kinds
        if module.kind not in kinds:
            expected = " or ".join(kinds)
            raise ShapeError(
                f'"{edit.module}" is of kind {module.kind}; {edit.action} needs {expected}.'
            )
        if place and place[1] != edit.module and place[1] in gone:
            raise ShapeError(f'"{edit.module}" has an edit, but its layer is gone; leave it out.')


def removed_layers(structure: Structure, family: Family) -> list[str]:
    """Names of the layers that are gone without a trace, in the numbering of the dense model."""
    return [
        edit.module
        for edit in structure
        if edit.action == "remove" and (place := family.place(edit.module)) and not place[2]
    ]


def mapped_layers(structure: Structure) -> list[str]:
    """Names of the layers in whose place there is a linear map, numbered as in the dense model."""
    return [edit.module for edit in structure if edit.action == "map"]


def name_after_removal(name: str, family: Family, removed: Collection[str]) -> str | None:
    """Translate any module's name from the dense numbering of layers to the composed model's.

    Returns:
        The new name; None if it lies in one of the `removed_layers`.
    """
    place = family.place(name)
    if place is None:
        return name
    layer = place[1]
    if layer in removed:
        return None
    path, _, number = layer.rpartition(".")
    index = int(number) - sum(f"{path}.{lower}" in removed for lower in range(int(number)))
    return f"{path}.{index}{name.removeprefix(layer)}"
