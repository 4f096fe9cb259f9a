"""Variant, and the .npy of variants: read, check, write, choose (docs/formats.md)."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from composable.config import Entry
from composable.errors import ConfigError, FormatError, MismatchError
from composable.files import atomic_write, canonical_json, digest_of

T = TypeVar("T")
FORMAT, VERSION = "composable.bundle", "1"
KINDS = ("attention", "ffn", "linear", "layer")
ARRAY_HEADER = 128  # bytes of numpy's version 1.0 header for any 1-D uint8 array
HEADER_LIMIT = 100_000_000  # as in the safetensors library
PREFIX = b'{"__metadata__":{"checksum":"'  # what every header starts with; 64 hex digits follow
CHECKSUM = slice(len(PREFIX), len(PREFIX) + 64)
METADATA = ("checksum", "fingerprint", "format", "options", "variants", "version")
ITEM_SIZE = {"F32": 4, "U8": 1}


@dataclass
class Description:
    """What is known of a variant without its tensors.

    Attributes:
        module: path of the module in the dense model.
        kind: attention, ffn, linear or layer.
        entry: what it was made for; the methods are those really used, never None.
        plain: made for a plain number too, so it answers plain entries as well.
        kept_heads: ascending, numbered as in the dense module; None where heads do not matter.
        removed: the module is gone; there are no tensors.
        stats: finite numbers such as error_before and error_after.
        plain_o: like `plain`, for the `o` part of a pair.
    """

    module: str
    kind: str
    entry: Entry
    plain: bool
    kept_heads: list[int] | None = None
    removed: bool = False
    stats: dict[str, float] = field(default_factory=dict)
    plain_o: bool = False


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
    def digest(self) -> str:
        """SHA-256 of what a composed model takes from this variant; equal to its record's."""
        return _content_digest(self, _describe(self))


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
        """SHA-256 of module, kind, kept heads, removed and tensors; not of rate, method, stats."""
        return _content_digest(self, self.stored)


@dataclass
class Bundle:
    """Variants of one dense model; `options` is a JSON object (method options, history)."""

    fingerprint: str
    variants: list[Variant]
    options: dict[str, Any] = field(default_factory=dict)


class Part(NamedTuple):
    """One tensor of the safetensors file: whose it is, and where it lies in the data."""

    variant: int
    name: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


def write(path: Path, bundle: Bundle) -> None:
    """Write a bundle tensor by tensor, whole or not at all; same bundle, same bytes.

    Raises:
        FormatError: a value is not finite, or the variants break a rule of the format.
        OSError: the file cannot be written; an older one stays.
    """
    try:
        stored = [_describe(variant) for variant in bundle.variants]
        layout = _layout(stored)
        header = _build_header(bundle, stored, layout)
        _parse(header, _end(layout))  # what could not be read again must not be written
    except FormatError as error:
        raise FormatError(f"{path}: not written: {error}.") from error
    with atomic_write(Path(path)) as file:
        file.write(_array_header(8 + len(header) + _end(layout)))
        file.write(len(header).to_bytes(8, "little") + header)
        for part in layout.values():
            file.write(_encode(bundle.variants[part.variant], part.name, part.suffix).data)


def _describe(variant: Variant) -> tuple[Stored, ...]:
    """Check a variant's tensors and stats, and say how they will be stored."""
    if not variant.masks.keys() <= variant.tensors.keys():
        raise FormatError(f'"{variant.module}": a mask has no tensor of the same name')
    if not all(math.isfinite(value) for value in variant.stats.values()):
        raise FormatError(f'"{variant.module}": stats {variant.stats} are not finite')
    for name, tensor in variant.tensors.items():
        _check_tensor(f'"{variant.module}", tensor "{name}"', tensor, variant.masks.get(name))
    return tuple(_describe_tensor(variant, name) for name in sorted(variant.tensors))


def _describe_tensor(variant: Variant, name: str) -> Stored:
    mask = variant.masks.get(name)
    kept = None if mask is None else int(mask.sum())
    described = Stored(name, tuple(variant.tensors[name].shape), kept, "")
    arrays = (_encode(variant, name, suffix) for suffix in described.suffixes)
    return described._replace(sha256=_sha256(*arrays))


def _check_tensor(what: str, tensor: torch.Tensor, mask: torch.Tensor | None) -> None:
    if tensor.dtype != torch.float32:
        raise FormatError(f"{what} is {tensor.dtype}, expected torch.float32")
    if not torch.isfinite(tensor).all():
        raise FormatError(f"{what} has NaN or infinite values; try a lower learning rate")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise FormatError(f"{what}: its mask is not a bool tensor of shape {tuple(tensor.shape)}")
    if tensor.detach()[~mask].any():
        raise FormatError(f"{what} is not zero everywhere its mask is False")


def _encode(variant: Variant, name: str, suffix: str) -> np.ndarray:
    """Return one stored tensor as its bytes, 1-D uint8 (a view where no copy is needed)."""
    values = variant.tensors[name].detach().cpu().contiguous().numpy()
    if suffix:
        mask = variant.masks[name].cpu().numpy()
        if suffix == ".mask":
            return np.packbits(mask)
        values = values[mask]
    return values.astype("<f4", copy=False).reshape(-1).view(np.uint8)


def _build_header(
    bundle: Bundle, stored: Sequence[Sequence[Stored]], layout: dict[str, Part]
) -> bytes:
    """Return the JSON header, padded to a multiple of 8 bytes, with its checksum filled in."""
    variants = [_to_json(*pair) for pair in zip(bundle.variants, stored, strict=True)]
    metadata = {
        "checksum": "0" * 64,
        "fingerprint": bundle.fingerprint,
        "format": FORMAT,
        "options": canonical_json(bundle.options),
        "variants": canonical_json(variants),
        "version": VERSION,
    }
    entries = {"__metadata__": metadata, **_header_entries(layout)}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return header[: CHECKSUM.start] + _header_checksum(header) + header[CHECKSUM.stop :]


def _to_json(variant: Variant, stored: Sequence[Stored]) -> dict[str, Any]:
    o = variant.entry.o
    return {
        "module": variant.module,
        "kind": variant.kind,
        "rate": float(variant.entry.rate),
        "method": variant.entry.method,
        "o": None if o is None else {"rate": float(o.rate), "method": o.method},
        "plain": variant.plain,
        "plain_o": variant.plain_o,
        "kept_heads": variant.kept_heads,
        "removed": variant.removed,
        "tensors": [tensor._asdict() for tensor in stored],
        "stats": {key: float(value) for key, value in variant.stats.items()},
    }


def _layout(stored: Sequence[Iterable[Stored]]) -> dict[str, Part]:
    """Place every tensor: all float32 first (so they stay aligned), then the masks, no holes."""
    parts = [
        Part(index, tensor.name, suffix, *_dtype_and_shape(tensor, suffix))
        for index, tensors in enumerate(stored)
        for tensor in tensors
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


def _header_entries(layout: dict[str, Part]) -> dict[str, Any]:
    return {
        key: {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [p.begin, p.end]}
        for key, p in layout.items()
    }


def _end(layout: dict[str, Part]) -> int:
    return max((part.end for part in layout.values()), default=0)


def _content_digest(of: Description, stored: Iterable[Stored]) -> str:
    return digest_of([of.module, of.kind, of.kept_heads, of.removed, [list(s) for s in stored]])


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


def _header_checksum(header: bytes) -> bytes:
    blank = header[: CHECKSUM.start] + b"0" * 64 + header[CHECKSUM.stop :]
    return hashlib.sha256(blank).hexdigest().encode()


class Reader:
    """An open bundle: all of its header is checked; tensors are read when asked for.

    Attributes:
        path, fingerprint, options: of the bundle.
        records: all variants, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        payload = _payload(path)
        length = int.from_bytes(payload[:8].tobytes(), "little")
        if len(payload) < 8 or length > min(len(payload) - 8, HEADER_LIMIT):
            raise FormatError(f"damaged (header length {length})")
        self._data = payload[8 + length :]
        metadata, self.records = _parse(payload[8 : 8 + length].tobytes(), len(self._data))
        self.path = path
        self.fingerprint: str = metadata["fingerprint"]
        self.options: dict[str, Any] = _json(metadata["options"], dict)
        self._layout = _layout([record.stored for record in self.records])

    def load(self, record: Record) -> Variant:
        """Read and verify one of `records`; no other variant's bytes are touched.

        Raises:
            FormatError: its bytes are damaged.
        """
        known = {name: getattr(record, name) for name in Description.__dataclass_fields__}
        variant = Variant(**known)
        for tensor in record.stored:
            try:
                self._load_tensor(variant, record.index, tensor)
            except FormatError as error:
                what = f'tensor "{tensor.name}" of "{record.module}"'
                raise _named(self.path, FormatError(f"{what} is damaged ({error})")) from error
        return variant

    def load_all(self) -> list[Variant]:
        """Read and verify every variant."""
        return [self.load(record) for record in self.records]

    def verify(self) -> None:
        """Read and verify every variant, one after another, and keep none.

        Raises:
            FormatError: one of them is damaged.
        """
        for record in self.records:
            self.load(record)

    def _load_tensor(self, variant: Variant, index: int, tensor: Stored) -> None:
        parts = [self._layout[f"{index}/{tensor.name}{suffix}"] for suffix in tensor.suffixes]
        arrays = [self._data[part.begin : part.end] for part in parts]
        if _sha256(*arrays) != tensor.sha256:
            raise FormatError("its SHA-256 differs from the header's")
        values = arrays[0].view("<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise FormatError("NaN or infinite values")
        if tensor.kept is not None:
            mask = _unpack(tensor, arrays[1])
            variant.masks[tensor.name] = torch.from_numpy(mask)
            full = np.zeros(tensor.shape, np.float32)
            full[mask] = values
            values = full
        variant.tensors[tensor.name] = torch.from_numpy(values.reshape(tensor.shape))


def _unpack(tensor: Stored, packed: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(packed).astype(bool)
    count = math.prod(tensor.shape)
    if int(bits.sum()) != tensor.kept or bits[count:].any():
        raise FormatError(f"{bits.sum()} mask bits are set, there are {tensor.kept} values")
    return bits[:count].reshape(tensor.shape)


def open_bundle(path: Path, fingerprint: str | None = None) -> Reader:
    """Open a bundle and check its whole header.

    Args:
        path: the .npy file.
        fingerprint: of the dense model it has to belong to; None accepts any.

    Raises:
        FormatError: not a bundle, a newer one, or damaged.
        MismatchError: made for another model.
        OSError: the file cannot be read.
    """
    try:
        reader = Reader(Path(path))
    except FormatError as error:
        raise _named(path, error) from error
    if fingerprint is not None and fingerprint != reader.fingerprint:
        raise MismatchError(
            f"{path}: made for another model (fingerprint {reader.fingerprint[:12]}, this one has "
            f"{fingerprint[:12]}); give the model it was made from, or run prune.py on this one."
        )
    return reader


def _named(path: Path, error: FormatError) -> FormatError:
    return FormatError(f"{path}: {error}; make it again with prune.py.")


def _payload(path: Path) -> np.ndarray:
    """Map the safetensors file inside the .npy, whose array header must be ours to the byte."""
    with open(path, "rb") as file:
        start = file.read(ARRAY_HEADER)
        size = file.seek(0, 2)
    if size <= ARRAY_HEADER or start != _array_header(size - ARRAY_HEADER):
        raise FormatError(_why_no_array(start, size))
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _array_header(size: int) -> bytes:
    """Return what np.save writes before `size` bytes of a 1-D uint8 array."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _why_no_array(start: bytes, size: int) -> str:
    declared = re.match(
        rb"\x93NUMPY\x01\x00v\x00{'descr': '\|u1', .*'shape': \((\d{1,18}),\)", start
    )
    if declared and (expected := int(declared[1]) + ARRAY_HEADER) != size:
        state = "truncated" if size < expected else "extended"
        return f"{state} ({size} bytes, its first line promises {expected})"
    if re.search(rb"'\|?O\d*'", start):
        return "a pickle in disguise (.npy of objects, which could run code), not a bundle"
    for magic, kind in ((b"\x80", "a pickle"), (b"PK", "a zip file (.pth or .npz)")):
        if start.startswith(magic):
            return f"{kind} under another name, which could run code, not a bundle"
    if start.startswith(b"\x93NUMPY"):
        return "a .npy file, but not the plain uint8 array that a bundle is"
    return "not a .npy file" if start else "an empty file, expected a bundle"


def _parse(header: bytes, data_size: int) -> tuple[dict[str, str], list[Record]]:
    """Check everything that a header says and return its metadata and records."""
    entries = _json(header, dict)
    metadata = entries.pop("__metadata__", None)
    _check_format(metadata)
    if not header.startswith(PREFIX) or _header_checksum(header) != header[CHECKSUM]:
        raise FormatError("damaged (the checksum of its header differs)")
    _check_types("metadata", metadata, dict.fromkeys(METADATA, (str,)))
    _json(metadata["options"], dict)
    records = [_record(i, value) for i, value in enumerate(_json(metadata["variants"], list))]
    if len({(record.module, record.entry) for record in records}) < len(records):
        raise FormatError("two variants of one module have the same rate and method")
    layout = _layout([record.stored for record in records])
    if entries != _header_entries(layout) or _end(layout) != data_size or len(header) % 8:
        raise FormatError("damaged (names, types, shapes or offsets of the tensors are wrong)")
    return metadata, records


def _check_format(metadata: Any) -> None:
    found = metadata if isinstance(metadata, dict) else {}
    if found.get("format") != FORMAT:
        raise FormatError(f"format {found.get('format')!r:.60}, expected {FORMAT!r}")
    if found.get("version") != VERSION:
        raise FormatError(
            f"made by a newer version (format version {found.get('version')!r:.20}, this program "
            f"reads {VERSION!r}; update composable to use it)"
        )


def _json(text: str | bytes, kind: type[T]) -> T:
    """Parse strict JSON of type `kind`: UTF-8, no key twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"damaged (header: {error!s:.80})") from error
    if not isinstance(value, kind):
        raise FormatError(f"damaged (header: {value!r:.40} is not a {kind.__name__})")
    return value


NONE = type(None)
TYPES: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "kind": (str,),
    "rate": (int, float),
    "method": (str,),
    "o": (dict, NONE),
    "plain": (bool,),
    "plain_o": (bool,),
    "kept_heads": (list, NONE),
    "removed": (bool,),
    "tensors": (list,),
    "stats": (dict,),
}
TENSOR_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "shape": (list,),
    "kept": (int, NONE),
    "sha256": (str,),
}


def _check_types(what: str, value: Any, types: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise FormatError(f"{what}: {value!r:.60} has not the keys of docs/formats.md")
    for key, allowed in types.items():
        if type(value[key]) not in allowed:
            raise FormatError(f"{what}: {key} {value[key]!r:.60} has the wrong type")


def _record(index: int, value: Any) -> Record:
    """Check one record of the header: its keys, their values, the rules between them."""
    what = f"variant {index}"
    _check_types(what, value, TYPES)
    for tensor in value["tensors"]:
        _check_types(f"{what}, a tensor", tensor, TENSOR_TYPES)
    record = Record(
        **{key: value[key] for key in Description.__dataclass_fields__ if key != "entry"},
        entry=_entry(what, value),
        index=index,
        stored=tuple(Stored(**{**t, "shape": tuple(t["shape"])}) for t in value["tensors"]),
    )
    _check_rules(what, record)
    return record


def _entry(what: str, value: dict[str, Any]) -> Entry:
    wanted = {key: value[key] for key in ("rate", "method", "o") if value[key] is not None}
    try:
        entry = Entry.parse(wanted, what)
    except ConfigError as error:
        raise FormatError(str(error).rstrip(".")) from error
    if entry.rate == 0 or (entry.o and (entry.o.rate == 0 or not entry.o.method)):
        raise FormatError(f"{what}: every part of {entry} needs a rate above 0 and a method")
    return entry


def _check_rules(what: str, record: Record) -> None:
    heads, o, stored = record.kept_heads, record.entry.o, record.stored
    names = [tensor.name for tensor in stored]
    rules = {
        f"kind is one of {', '.join(KINDS)}": record.kind in KINDS,
        "kept_heads are numbers, ascending": heads is None
        or (_are_counts(heads) and sorted(set(heads)) == heads),
        "shapes are sizes": all(_are_counts(tensor.shape) for tensor in stored),
        "kept values are counted": all(_are_counts([t.kept or 0]) for t in stored),
        "tensors are sorted by name": names == sorted(set(names)),
        "stats are finite": all(
            type(value) in (int, float) and abs(value) < math.inf for value in record.stats.values()
        ),
        "a removed variant has nothing else": not (record.removed and (stored or heads)),
        "rate 1 means removed": record.removed or record.entry.rate < 1,
        "only an attention is pruned as a pair": o is None or record.kind == "attention",
        "plain_o needs a pair": o is not None or not record.plain_o,
    }
    for rule, is_kept in rules.items():
        if not is_kept:
            raise FormatError(f'{what} ("{record.module}") breaks the rule: {rule}')


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


def choose(
    readers: Sequence[Reader], configuration: dict[str, Entry], number: int | None = None
) -> list[tuple[Reader, Record]]:
    """Find the variants that answer a configuration.

    Args:
        readers: open bundles of one dense model.
        configuration: pairs merged; rate 0 needs no variant.
        number: of the configuration in conf.json, for the message.

    Returns:
        One (reader, record) for every module with a rate above 0, in the configuration's order.

    Raises:
        MismatchError: no variant answers an entry, or two different ones do.
    """
    return [
        _choose_one(readers, module, entry, number)
        for module, entry in configuration.items()
        if entry.rate > 0
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
                "out, or name the method in the configuration."
            )
    return first


def _answers(record: Record, wanted: Entry) -> bool:
    """Tell whether a variant may stand for an entry: for a pair, both of its parts."""
    have = record.entry
    if have.o is None or wanted.o is None:
        return have.o is wanted.o and _part_answers(have, record.plain, wanted)
    both = (have, record.plain, wanted), (have.o, record.plain_o, wanted.o)
    return all(_part_answers(*part) for part in both)


def _part_answers(have: Entry, plain: bool, wanted: Entry) -> bool:
    right_method = plain if wanted.method is None else have.method == wanted.method
    return have.rate == wanted.rate and right_method


def _label(record: Record, wanted: Entry) -> str:
    """Say what a variant answers; methods only where they matter."""
    shows_method = wanted.method or not record.plain or record.entry.o
    entry = record.entry if shows_method else Entry(record.entry.rate)
    return str(entry).removeprefix("rate ")
