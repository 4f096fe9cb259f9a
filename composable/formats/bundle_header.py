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
from composable.formats.container import Format, Layout, are_counts, check_types, header_json

FORMAT = Format(
    *("composable.bundle", "4", "a bundle", "made for", "make it again with prune.py"),
    remedy_for_model="give the model it was made from, or run prune.py on this one",
)
#: How heads leave an attention whose query heads share key/value heads.
PER_GROUP, WHOLE_GROUPS = "per-group", "whole-groups"
METADATA = ("checksum", "fingerprint", "format", "options", "variants", "version")
TYPES = {
    "module": str, "kind": str, "rate": float, "method": str | None, "parts": dict,
    "through": str | None, "plain": list, "kept_units": list | None, "gqa": str | None,
    "removed": bool, "tensors": list, "stats": dict,
}  # fmt: skip
PART_TYPES = {"rate": float, "method": str}


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
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the file appends to the tensor's name -> dtype and shape of what it holds there."""
        if self.kept is None:
            return {"": ("F32", self.shape)}
        bits = -(-math.prod(self.shape) // 8)
        return {".values": ("F32", (self.kept,)), ".mask": ("U8", (bits,))}


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


def parts_of(records: Iterable[Record]) -> list[tuple[int, Stored, str]]:
    """List what the file holds, in its order: all float32 (so they stay aligned), then the masks.

    Returns:
        Index of the variant, tensor, and a key of the tensor's `parts`.
    """
    parts = [(one.index, tensor, key) for one in records for tensor in one.stored
             for key in tensor.parts]  # fmt: skip
    return sorted(parts, key=lambda part: part[2] == ".mask")


def lay_out(records: Iterable[Record]) -> Layout:
    """Place every tensor in the data, see `container.lay_out`."""
    return container.lay_out(
        (f"{index}/{tensor.name}{suffix}", *tensor.parts[suffix])
        for index, tensor, suffix in parts_of(records)
    )


class Header(NamedTuple):
    """What the header of a bundle says."""

    fingerprint: str
    options: dict[str, Any]
    records: list[Record]


def build_header(header: Header) -> bytes:
    """Return the JSON header, padded to a multiple of 8 bytes, with its checksum filled in."""
    metadata = {
        "fingerprint": header.fingerprint,
        "options": canonical_json(header.options),
        "variants": canonical_json([_to_json(record) for record in header.records]),
    }
    return container.build_header(FORMAT, metadata, lay_out(header.records))


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


def parse_header(text: bytes, size: int) -> Header:
    """Read a header, with its padding, that `size` bytes follow; check everything that it says.

    Raises:
        FormatError: another format, a newer one, damaged, or it breaks a rule of the format.
    """
    metadata, entries = container.parse_metadata(text, FORMAT, METADATA)
    options = header_json(metadata["options"], dict)
    variants = header_json(metadata["variants"], list)
    records = [_record(i, value) for i, value in enumerate(variants)]
    if len({(record.module, record.entry) for record in records}) < len(records):
        raise FormatError("two variants of one module have the same rate and method")
    container.check_places(entries, lay_out(records), text, size)
    return Header(metadata["fingerprint"], options, records)


def _record(index: int, value: Any) -> Record:
    """Check one record of the header: its keys, their values, the rules between them."""
    what = f"variant {index}"
    check_types(what, value, TYPES)
    stored = [container.record(f"{what}, a tensor", each, Stored) for each in value["tensors"]]
    for part in value["parts"].values():
        check_types(f"{what}, a part", part, PART_TYPES)
    if value["plain"] != sorted({str(key) for key in value["plain"]}):
        raise FormatError(f"{what}: plain {value['plain']!r:.60} are no ascending keys")
    record = Record(
        **{key: value[key] for key in ("module", "kind", "kept_units", "removed", "stats", "gqa")},
        entry=_entry(what, value),
        plain=frozenset(value["plain"]),
        index=index,
        stored=tuple(tensor._replace(shape=tuple(tensor.shape)) for tensor in stored),
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
        or (are_counts(units) and sorted(set(units)) == units),
        f"gqa is {PER_GROUP} or {WHOLE_GROUPS}": record.gqa in (None, PER_GROUP, WHOLE_GROUPS),
        "shapes are sizes": all(are_counts(tensor.shape) for tensor in stored),
        "kept values are counted": are_counts(tensor.kept or 0 for tensor in stored),
        "tensors are sorted by name": names == sorted(set(names)),
        "stats are finite": all(map(container.is_finite, record.stats.values())),
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
    container.check_rules(f'{what} ("{record.module}")', rules)
