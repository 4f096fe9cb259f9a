"""Variants, and the .npy of variants: read, check, write, choose (docs/formats.md)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from composable.errors import ConfigError, FormatError, MismatchError
from composable.families.base import KINDS
from composable.files import atomic_write, canonical_json, digest_of
from composable.formats import container
from composable.formats.config import Entry
from composable.formats.container import Format, Layout, are_counts, check_types, header_json
from composable.progress import bytes_of

FORMAT = Format(
    "composable.bundle",
    "4",
    noun="a bundle",
    made="made for",
    remedy="make it again with prune.py",
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


def _parts_of(records: Iterable[Record]) -> list[tuple[int, Stored, str]]:
    """List what the file holds, in its order: all float32 (so they stay aligned), then the masks.

    Each is the index of the variant, the tensor, and a key of the tensor's `parts`.
    """
    parts = [(one.index, tensor, key) for one in records for tensor in one.stored
             for key in tensor.parts]  # fmt: skip
    return sorted(parts, key=lambda part: part[2] == ".mask")


def _lay_out(records: Iterable[Record]) -> Layout:
    """Place every tensor in the data, see `container.lay_out`."""
    return container.lay_out(
        (f"{index}/{tensor.name}{suffix}", *tensor.parts[suffix])
        for index, tensor, suffix in _parts_of(records)
    )


@dataclass(eq=False)
class Variant(Description):
    """One module after pruning.

    Attributes:
        tensors: by name relative to the module, float32, zero where masked.
        masks: bool, True = kept, for the masked ones among `tensors`.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether it has weights that can be fitted to its dense module's output."""
        return bool(self.tensors) and not self.removed

    @property
    def digest(self) -> str:
        """SHA-256 of what a composed model takes from this variant; equal to its record's."""
        return _describe(self).digest


@dataclass
class Bundle:
    """Variants of one dense model; `options` is a JSON object (method options, history)."""

    fingerprint: str
    variants: list[Variant]
    options: dict[str, Any] = field(default_factory=dict)


def write(path: Path, bundle: Bundle) -> None:
    """Write a bundle tensor by tensor, whole or not at all; same bundle, same bytes.

    Raises:
        FormatError: a value is not finite, or the variants break a rule of the format.
        OSError: the file cannot be written; an older one stays.
    """
    try:
        records = _describe_all(path, bundle.variants)
        metadata = {
            "fingerprint": bundle.fingerprint,
            "options": canonical_json(bundle.options),
            "variants": canonical_json([_to_json(record) for record in records]),
        }
        text, size = container.build_header(FORMAT, metadata, _lay_out(records))
        _parse_header(text, size)  # what could not be read must not be written
    except FormatError as error:
        raise FormatError(f"{path}: not written: {error}.") from error
    with atomic_write(Path(path)) as file, bytes_of(f"write {path.name}", size) as stage:
        file.write(container.file_start(text, size))
        for index, tensor, suffix in _parts_of(records):
            encoded = _encode(bundle.variants[index], tensor.name, suffix)
            file.write(encoded.data)
            stage.update(encoded.nbytes)


def _describe_all(path: Path, variants: Sequence[Variant]) -> list[Record]:
    sizes = [sum(tensor.nbytes for tensor in variant.tensors.values()) for variant in variants]
    records = []
    with bytes_of(f"hash {path.name}", sum(sizes)) as stage:
        for index, (variant, size) in enumerate(zip(variants, sizes, strict=True)):
            records.append(_describe(variant, index))
            stage.update(size)
    return records


def _describe(variant: Variant, index: int = 0) -> Record:
    """Check a variant's tensors and stats, and say how they will be stored."""
    if not variant.masks.keys() <= variant.tensors.keys():
        raise FormatError(f'"{variant.module}": a mask has no tensor of the same name')
    if not all(math.isfinite(value) for value in variant.stats.values()):
        raise FormatError(f'"{variant.module}": stats {variant.stats} are not finite')
    for name, tensor in variant.tensors.items():
        _check_tensor(f'"{variant.module}", tensor "{name}"', tensor, variant.masks.get(name))
    stored = tuple(_describe_tensor(variant, name) for name in sorted(variant.tensors))
    return Record(**variant.facts(), index=index, stored=stored)


def _describe_tensor(variant: Variant, name: str) -> Stored:
    kept = int(variant.masks[name].sum()) if name in variant.masks else None
    described = Stored(name, tuple(variant.tensors[name].shape), kept, "")
    arrays = (_encode(variant, name, suffix) for suffix in described.parts)
    return described._replace(sha256=container.sha256(*arrays))


def _check_tensor(what: str, tensor: torch.Tensor, mask: torch.Tensor | None) -> None:
    if tensor.dtype != torch.float32:
        raise FormatError(f"{what} is {tensor.dtype}, expected torch.float32")
    if not torch.isfinite(tensor).all():
        raise FormatError(f"{what} has NaN or infinite values; try a lower learning rate")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise FormatError(f"{what}: its mask is not a bool tensor of shape {tuple(tensor.shape)}")
    if (tensor.detach() * ~mask).any():  # finite, so a product shows what is under the mask
        raise FormatError(f"{what} is not zero everywhere its mask is False")


def _encode(variant: Variant, name: str, suffix: str) -> np.ndarray:
    """Return one stored tensor as its bytes, 1-D uint8 (a view where no copy is needed)."""
    values = variant.tensors[name].detach().cpu().contiguous().numpy()
    if suffix:
        mask = variant.masks[name].cpu().numpy()
        if suffix == ".mask":
            return np.packbits(mask)
        values = values.reshape(-1)[np.flatnonzero(mask)]
    return values.astype("<f4", copy=False).reshape(-1).view(np.uint8)


def _to_json(record: Record) -> dict[str, Any]:
    facts = record.facts()
    entry: Entry = facts.pop("entry")
    parts = entry.parts.items()
    return {
        **facts,
        "rate": float(entry.rate),
        "method": entry.method,
        "parts": {key: {"rate": float(part.rate), "method": part.method} for key, part in parts},
        "through": entry.through,
        "plain": sorted(record.plain),
        "tensors": [tensor._asdict() for tensor in record.stored],
        "stats": {key: float(value) for key, value in record.stats.items()},
    }


def _parse_header(text: bytes, size: int) -> tuple[str, dict[str, Any], list[Record], Layout]:
    """Check all that a header says, which `size` bytes follow; return what it says."""
    metadata, entries = container.parse_metadata(text, FORMAT, METADATA)
    options = header_json(metadata["options"], dict)
    variants = header_json(metadata["variants"], list)
    records = [_record(i, value) for i, value in enumerate(variants)]
    if len({(record.module, record.entry) for record in records}) < len(records):
        raise FormatError("two variants of one module have the same rate and method")
    layout = _lay_out(records)
    container.check_places(entries, layout, text, size)
    return metadata["fingerprint"], options, records, layout


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
    container.check_rules(f'{what} ("{record.module}")', _rules(record))
    return record


def _entry(what: str, value: dict[str, Any]) -> Entry:
    keys = ("rate", "method", "parts", "through")
    wanted = {key: value[key] for key in keys if value[key] not in (None, {})}
    try:
        entry = Entry.parse(wanted, what, name=value["module"])
    except ConfigError as error:
        raise FormatError(str(error).rstrip(".")) from error
    if not entry.removals or not all(each.method for each in entry.removals.values()):
        raise FormatError(f"{what}: {entry} needs a rate above 0 and a method")
    return entry


def _rules(record: Record) -> dict[str, bool]:
    """Say for each rule between the values of a record whether it is kept."""
    units, entry, stored = record.kept_units, record.entry, record.stored
    names = [tensor.name for tensor in stored]
    return {
        f"kind is one of {', '.join(KINDS)}": record.kind in KINDS,
        "kept_units are numbers, ascending": units is None
        or (are_counts(units) and sorted(set(units)) == units),
        f"gqa is {PER_GROUP} or {WHOLE_GROUPS}": record.gqa in (None, PER_GROUP, WHOLE_GROUPS),
        "shapes are sizes": all(are_counts(tensor.shape) for tensor in stored),
        "shapes have at most 8 sizes": all(len(tensor.shape) <= 8 for tensor in stored),
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


class Reader:
    """An open bundle: its header is checked; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        text, self._data = container.open_payload(path, FORMAT.noun)
        found = _parse_header(text, len(self._data))
        self.path, (self.fingerprint, self.options, self.records, self._layout) = path, found

    def load(self, record: Record) -> Variant:
        """Read one of `records`, and no other's bytes; FormatError where they are damaged."""
        variant = Variant(**record.facts())
        for tensor in record.stored:
            try:
                self._load_tensor(variant, record.index, tensor)
            except FormatError as error:
                what = f'tensor "{tensor.name}" of "{record.module}" is damaged ({error})'
                raise FormatError(f"{self.path}: {what}; {FORMAT.remedy}.") from error
        return variant

    def load_all(self) -> list[Variant]:
        """Read and verify every variant."""
        return [self.load(record) for record in self.records]

    def _load_tensor(self, variant: Variant, index: int, tensor: Stored) -> None:
        places = [self._layout[f"{index}/{tensor.name}{suffix}"] for suffix in tensor.parts]
        values, *packed = container.read_numbers(self._data, places, tensor.sha256, "<f4")
        if packed:
            mask = container.unpack_mask(packed[0], tensor.shape)
            if (found := np.count_nonzero(mask)) != tensor.kept:
                raise FormatError(f"{found} mask bits are set, there are {tensor.kept} values")
            variant.masks[tensor.name] = torch.from_numpy(mask)
            full = np.zeros(mask.size, "<f4")
            full[np.flatnonzero(mask)] = values  # six times as fast as by a random mask
            values = full
        variant.tensors[tensor.name] = torch.from_numpy(
            values.astype(np.float32, copy=False).reshape(tensor.shape)
        )


def open_bundle(path: Path, fingerprint: str | None = None) -> Reader:
    """Open a bundle and check its whole header; arguments and errors as of `Format.open`."""
    return FORMAT.open(Reader, path, fingerprint)


def choose(
    readers: Sequence[Reader], configuration: dict[str, Entry], number: int | None = None
) -> list[tuple[Reader, Record]]:
    """Find the variants that answer a configuration.

    Args:
        readers: open bundles of one dense model.
        configuration: parts merged; what is untouched needs no variant.
        number: of the configuration in conf.json, for the message.

    Returns:
        One pair for every module that is pruned, itself or in a part, in this order.

    Raises:
        MismatchError: no variant answers an entry, or two different ones do.
    """
    return [
        _choose_one(readers, module, entry, number)
        for module, entry in configuration.items()
        if entry.removals
    ]


def _choose_one(
    readers: Sequence[Reader], module: str, wanted: Entry, number: int | None
) -> tuple[Reader, Record]:
    pairs = [(reader, r) for reader in readers for r in reader.records if r.module == module]
    found = [pair for pair in pairs if _answers(pair[1], wanted)]
    if not found:
        names = ", ".join(str(reader.path) for reader in readers)
        have = ", ".join(dict.fromkeys(_label(r, wanted) for _, r in pairs)) or "none"
        which = "the configuration" if number is None else f"configuration {number}"
        raise MismatchError(
            f'{names}: no variant of "{module}" at {wanted} (has {have}); '
            f"prune it, or change {which}."
        )
    first, *others = found
    for other in others:
        if other[1].digest != first[1].digest:
            both = " and ".join(f"{reader.path} ({r.entry})" for reader, r in (first, other))
            raise MismatchError(
                f'two different variants of "{module}" answer {wanted}: {both}; leave one bundle '
                "out, or, where the methods differ, name one in the configuration."
            )
    return first


def _answers(record: Record, wanted: Entry) -> bool:
    """Tell whether a variant may stand for an entry: the same is removed, by the right methods."""
    have, want = record.entry.removals, wanted.removals
    return have.keys() == want.keys() and all(
        have[key].rate == each.rate
        and have[key].through == each.through
        and (key in record.plain if each.method is None else have[key].method == each.method)
        for key, each in want.items()
    )


def _label(record: Record, wanted: Entry) -> str:
    """Say what a variant answers; methods only where they matter."""
    entry = record.entry
    is_plain = record.plain == entry.removals.keys()
    if is_plain and not any(each.method for each in wanted.removals.values()):
        entry = Entry(entry.rate, parts={key: Entry(p.rate) for key, p in entry.parts.items()})
    return str(entry).removeprefix("rate ")
