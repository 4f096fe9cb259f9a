"""Description of a variant, and the header of a bundle: layout, build, parse, check."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from composable.errors import ConfigError, FormatError
from composable.families.base import KINDS
from composable.files import canonical_json, digest_of
from composable.formats import container
from composable.formats.config import Entry, check_block
from composable.formats.container import ITEM_SIZE, Format, check_types, header_json

FORMAT = Format("composable.bundle", "4", "a bundle")
#: How heads leave an attention whose query heads share key/value heads.
PER_GROUP, WHOLE_GROUPS = "per-group", "whole-groups"
METADATA = ("checksum", "fingerprint", "format", "options", "variants", "version")


@dataclass
class Description:
    """What is known of a variant without its tensors.

    Attributes:
        module: path of the module in the dense model.
        kind: one of `families.base.KINDS`.
        entry: what it was made for; the methods are those really used, never None above rate 0.
        plain: keys of `entry.removals` that were made for a plain number too, so that they answer
            entries without a method as well.
        kept_units: ascending ids of heads or neurons, numbered as in the dense module; None where
            none left.
        removed: the module is gone; there are no tensors but those of what stands in its place.
        stats: finite numbers such as error_before and error_after.
        gqa: with grouped queries, how heads left: PER_GROUP or WHOLE_GROUPS; else None.
    """

    module: str
    kind: str
    entry: Entry
    plain: frozenset[str] = frozenset()
    kept_units: list[int] | None = None
    removed: bool = False
    stats: dict[str, float] = field(default_factory=dict)
    gqa: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return the attributes above by name, without those that a subclass adds."""
        return {name: getattr(self, name) for name in Description.__dataclass_fields__}


class Stored(NamedTuple):
    """A tensor as the header describes it; `kept` counts the values of a masked one, else None."""

    name: str
    shape: tuple[int, ...]
    kept: int | None
    sha256: str

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the file appends to the tensor's name."""
        return ("",) if self.kept is None else (".values", ".mask")


@dataclass
class Record(Description):
    """One variant of a bundle as the header describes it; `Reader.load` gets its tensors."""

    index: int = 0
    stored: tuple[Stored, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of module, block, kind, kept units, removed, tensors; no rate, method, stats."""
        stored = [list(tensor) for tensor in self.stored]
        block = [self.module, self.entry.through]
        return digest_of([block, self.kind, self.kept_units, self.removed, stored])


class Part(NamedTuple):
    """One tensor of the safetensors file: whose it is, and where it lies in the data."""

    variant: int
    name: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


class Header(NamedTuple):
    """What the header of a bundle says; `layout` is that of `records`, from `lay_out`."""

    fingerprint: str
    options: dict[str, Any]
    records: list[Record]
    layout: dict[str, Part]

    @property
    def data_size(self) -> int:
        """Bytes of all tensors together."""
        return max((part.end for part in self.layout.values()), default=0)


def build_header(header: Header) -> bytes:
    """Return the JSON header, padded to a multiple of 8 bytes, with its checksum filled in."""
    metadata = {
        "fingerprint": header.fingerprint,
        "format": FORMAT.name,
        "options": canonical_json(header.options),
        "variants": canonical_json([_to_json(record) for record in header.records]),
        "version": FORMAT.version,
    }
    return container.build_header(metadata, header.layout)


def _to_json(record: Record) -> dict[str, Any]:
    parts = record.entry.parts.items()
    return {
        "module": record.module,
        "kind": record.kind,
        "rate": float(record.entry.rate),
        "method": record.entry.method,
        "parts": {key: {"rate": float(part.rate), "method": part.method} for key, part in parts},
        "through": record.entry.through,
        "plain": sorted(record.plain),
        "kept_units": record.kept_units,
        "gqa": record.gqa,
        "removed": record.removed,
        "tensors": [tensor._asdict() for tensor in record.stored],
        "stats": {key: float(value) for key, value in record.stats.items()},
    }


def lay_out(records: Iterable[Record]) -> dict[str, Part]:
    """Place every tensor: all float32 first (so they stay aligned), then the masks, no holes.

    Returns:
        The parts by their names in the file, in its order.

    Raises:
        FormatError: two of them have the same name.
    """
    parts = [
        Part(record.index, tensor.name, suffix, *_dtype_and_shape(tensor, suffix))
        for record in records
        for tensor in record.stored
        for suffix in tensor.suffixes
    ]
    placed: dict[str, Part] = {}
    end = 0
    for part in sorted(parts, key=lambda part: part.dtype):
        key = f"{part.variant}/{part.name}{part.suffix}"
        if key in placed:
            raise FormatError(f'two tensors have the name "{key}" in the file')
        begin, end = end, end + math.prod(part.shape) * ITEM_SIZE[part.dtype]
        placed[key] = part._replace(begin=begin, end=end)
    return placed


def _dtype_and_shape(tensor: Stored, suffix: str) -> tuple[str, tuple[int, ...]]:
    if tensor.kept is None:
        return "F32", tensor.shape
    mask_size = -(-math.prod(tensor.shape) // 8)
    return ("F32", (tensor.kept,)) if suffix == ".values" else ("U8", (mask_size,))


def parse_header(header: bytes, data_size: int) -> Header:
    """Read a header and check everything that it says.

    Args:
        header: its bytes, with the padding.
        data_size: bytes that follow it in the file.

    Raises:
        FormatError: another format, a newer one, damaged, or it breaks a rule of the format.
    """
    metadata, entries = container.parse_metadata(header, FORMAT, METADATA)
    options = header_json(metadata["options"], dict)
    variants = header_json(metadata["variants"], list)
    records = [_record(i, value) for i, value in enumerate(variants)]
    if len({(record.module, record.entry) for record in records}) < len(records):
        raise FormatError("two variants of one module have the same rate and method")
    found = Header(metadata["fingerprint"], options, records, lay_out(records))
    container.check_places(entries, found.layout, header, data_size)
    return found


NONE = type(None)


TYPES: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "kind": (str,),
    "rate": (int, float),
    "method": (str, NONE),
    "parts": (dict,),
    "through": (str, NONE),
    "plain": (list,),
    "kept_units": (list, NONE),
    "gqa": (str, NONE),
    "removed": (bool,),
    "tensors": (list,),
    "stats": (dict,),
}


PART_TYPES: dict[str, tuple[type, ...]] = {"rate": (int, float), "method": (str,)}


TENSOR_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "shape": (list,),
    "kept": (int, NONE),
    "sha256": (str,),
}


def _record(index: int, value: Any) -> Record:
    """Check one record of the header: its keys, their values, the rules between them."""
    what = f"variant {index}"
    check_types(what, value, TYPES)
    for tensor in value["tensors"]:
        check_types(f"{what}, a tensor", tensor, TENSOR_TYPES)
    for part in value["parts"].values():
        check_types(f"{what}, a part", part, PART_TYPES)
    if value["plain"] != sorted({str(key) for key in value["plain"]}):
        raise FormatError(f"{what}: plain {value['plain']!r:.60} are no ascending keys")
    facts: dict[str, Any] = {"entry": _entry(what, value), "plain": frozenset(value["plain"])}
    record = Record(
        **{key: value[key] for key in Description.__dataclass_fields__ if key not in facts},
        **facts,
        index=index,
        stored=tuple(Stored(**{**t, "shape": tuple(t["shape"])}) for t in value["tensors"]),
    )
    _check_rules(what, record)
    return record


def _entry(what: str, value: dict[str, Any]) -> Entry:
    keys = ("rate", "method", "parts", "through")
    wanted = {key: value[key] for key in keys if value[key] not in (None, {})}
    try:
        entry = Entry.parse(wanted, what)
        check_block(value["module"], entry, what)
    except ConfigError as error:
        raise FormatError(str(error).rstrip(".")) from error
    if not entry.removals or not all(each.method for each in entry.removals.values()):
        raise FormatError(f"{what}: {entry} needs a rate above 0 and a method")
    return entry


def _check_rules(what: str, record: Record) -> None:
    units, entry, stored = record.kept_units, record.entry, record.stored
    names = [tensor.name for tensor in stored]
    rules = {
        f"kind is one of {', '.join(KINDS)}": record.kind in KINDS,
        "kept_units are numbers, ascending": units is None
        or (_are_counts(units) and sorted(set(units)) == units),
        f"gqa is {PER_GROUP} or {WHOLE_GROUPS}": record.gqa in (None, PER_GROUP, WHOLE_GROUPS),
        "shapes are sizes": all(_are_counts(tensor.shape) for tensor in stored),
        "kept values are counted": all(_are_counts([t.kept or 0]) for t in stored),
        "tensors are sorted by name": names == sorted(set(names)),
        "stats are finite": all(
            type(value) in (int, float) and abs(value) < math.inf for value in record.stats.values()
        ),
        "a removed variant has nothing else": not (record.removed and units)
        and not (record.removed and stored and record.kind != "layer"),
        "rate 1 means removed": record.removed or entry.rate < 1,
        "an attention above rate 0 or an ffn at rate 0 has parts": not entry.parts
        or record.kind == ("attention" if entry.rate > 0 else "ffn"),
        "a part that is left has a weight": all(
            part.rate == 1 or f"{key}.weight" in names for key, part in entry.parts.items()
        ),
        "plain are keys of what was pruned": record.plain <= entry.removals.keys(),
    }
    for rule, is_kept in rules.items():
        if not is_kept:
            raise FormatError(f'{what} ("{record.module}") breaks the rule: {rule}')


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)
