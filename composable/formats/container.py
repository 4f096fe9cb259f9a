"""A safetensors file within a .npy of bytes: what bundles and calibration files have in common."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from composable.errors import FormatError, MismatchError
from composable.files import open_input, parse_json

T = TypeVar("T")
ARRAY_HEADER = 128  # bytes of numpy's version 1.0 header for any 1-D uint8 array
HEADER_LIMIT = 100_000_000  # as in the safetensors library
PREFIX = b'{"__metadata__":{"checksum":"'  # what every header starts with; 64 hex digits follow
CHECKSUM = slice(len(PREFIX), len(PREFIX) + 64)
HEX = re.compile("[0-9a-f]{64}")  # a SHA-256
ITEM_SIZE = {"F64": 8, "F32": 4, "U8": 1}


class Format(NamedTuple):
    """A kind of file: name and version in its metadata, and words of messages about it.

    Attributes:
        noun: what a message calls the file, such as "a bundle".
        made: how it comes from a model, such as "made for".
        remedy: what to do about a damaged file.
        remedy_for_model: what to do about one of another model.
    """

    name: str
    version: str
    noun: str
    made: str = ""
    remedy: str = ""
    remedy_for_model: str = ""

    def open(self, kind: Callable[[Path], T], path: Path, fingerprint: str | None) -> T:
        """Open a .npy file as `kind`, which checks its header; None stands for any model.

        Raises:
            FormatError: another format, a newer one, or damaged.
            MismatchError: of another model.
            OSError: the file cannot be read.
        """
        try:
            found: Any = kind(Path(path))
        except FormatError as error:
            raise FormatError(f"{path}: {error}; {self.remedy}.") from error
        self.check_model(path, found.fingerprint, fingerprint)
        return found

    def check_model(self, path: Path, found: str, wanted: str | None) -> None:
        """Refuse a file of another model, see `open`."""
        if wanted not in (None, found):
            raise MismatchError(
                f"{path}: {self.made} another model (fingerprint {found[:12]}, this one has "
                f"{wanted[:12]}); {self.remedy_for_model}."
            )


#: What the header says of every tensor, by name, in the order of the file.
Layout = dict[str, dict[str, Any]]


def lay_out(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> Layout:
    """Place tensors (name, dtype, shape) without holes; FormatError if two have one name."""
    placed: Layout = {}
    end = 0
    for name, dtype, shape in tensors:
        if name in placed:
            raise FormatError(f'two tensors have the name "{name}" in the file')
        begin, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
        placed[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return placed


def _data_size(layout: Layout) -> int:
    return max((entry["data_offsets"][1] for entry in layout.values()), default=0)


def file_start(header: bytes, data_size: int) -> bytes:
    """Return all that comes before the data: array header, length, header."""
    return array_header(8 + len(header) + data_size) + len(header).to_bytes(8, "little") + header


def array_header(size: int) -> bytes:
    """Return what np.save writes before `size` bytes of a 1-D uint8 array."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


class Data:
    """The data of an open file: parts of it are copied from the disk when they are asked for.

    A copy cannot change once its digest has been compared, as a view of the file could; and a file
    that is renamed over this one is not seen.
    """

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def __len__(self) -> int:
        return self._size

    def read(self, begin: int, end: int) -> np.ndarray:
        """Copy bytes, uint8; FormatError where the file has become shorter."""
        found = np.empty(end - begin, np.uint8)
        self._file.seek(self._start + begin)
        if self._file.readinto(found.data) != len(found):  # type: ignore[attr-defined]
            raise FormatError("the file was cut off while it was read")
        return found


def open_payload(path: Path, noun: str) -> tuple[bytes, Data]:
    """Open a .npy file, whose array header must be ours to the byte; `noun` says what is expected.

    Returns:
        Its header, and its data, for which the file stays open.

    Raises:
        FormatError: another file, truncated or extended.
        OSError: the file cannot be read.
    """
    file = open_input(path)
    try:
        start = file.read(ARRAY_HEADER)
        size = file.seek(0, 2)
        if size <= ARRAY_HEADER or start != array_header(size - ARRAY_HEADER):
            raise FormatError(_why_no_array(start, size, noun))
        left = size - ARRAY_HEADER - 8
        length = int.from_bytes(Data(file, ARRAY_HEADER, 8).read(0, min(8, left + 8)), "little")
        if left < 0 or length > min(left, HEADER_LIMIT):
            raise FormatError(f"damaged (header length {length})")
        header = Data(file, ARRAY_HEADER + 8, length).read(0, length).tobytes()
    except BaseException:
        file.close()
        raise
    return header, Data(file, size - left + length, left - length)


def _why_no_array(start: bytes, size: int, noun: str) -> str:
    pattern = rb"\x93NUMPY\x01\x00v\x00{'descr': '\|u1', .*'shape': \((\d{1,18}),\)"
    declared = re.match(pattern, start)
    if declared and (expected := int(declared[1]) + ARRAY_HEADER) != size:
        state = "truncated" if size < expected else "extended"
        return f"{state} ({size} bytes, its first line promises {expected})"
    if re.search(rb"'\|?O\d*'", start):
        return f"a pickle in disguise (.npy of objects, which could run code), not {noun}"
    for magic, kind in ((b"\x80", "a pickle"), (b"PK", "a zip file (.pth or .npz)")):
        if start.startswith(magic):
            return f"{kind} under another name, which could run code, not {noun}"
    if start.startswith(b"\x93NUMPY"):
        return f"a .npy file, but not the plain uint8 array that {noun} is"
    return "not a .npy file" if start else f"an empty file, expected {noun}"


def build_header(of: Format, metadata: Mapping[str, str], layout: Layout) -> tuple[bytes, int]:
    """Return the JSON header, padded to 8 bytes and with its checksum, and the size of the data.

    `metadata` lacks checksum, format and version.
    """
    whole = {"checksum": "0" * 64, "format": of.name, "version": of.version, **metadata}
    entries = {"__metadata__": dict(sorted(whole.items())), **layout}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = text[: CHECKSUM.start] + header_checksum(text) + text[CHECKSUM.stop :]
    return header, _data_size(layout)


def header_checksum(header: bytes) -> bytes:
    """Return the SHA-256, in hex digits, of a header with 64 zeros for its checksum."""
    blank = header[: CHECKSUM.start] + b"0" * 64 + header[CHECKSUM.stop :]
    return hashlib.sha256(blank).hexdigest().encode()


def parse_metadata(
    header: bytes, expected: Format, keys: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a header as far as all formats agree; `keys` of the metadata include the checksum.

    Returns:
        The metadata, and what it says of the tensors.

    Raises:
        FormatError: another format, a newer one, or damaged.
    """
    entries = header_json(header, dict)
    metadata = entries.pop("__metadata__", None)
    found = metadata if isinstance(metadata, dict) else {}
    if found.get("format") != expected.name:
        raise FormatError(f"format {found.get('format')!r:.60}, expected {expected.name!r}")
    if found.get("version") != expected.version:
        raise FormatError(
            f"made by another version (format version {found.get('version')!r:.20}, this program "
            f"reads {expected.version!r})"
        )
    if not header.startswith(PREFIX) or header_checksum(header) != header[CHECKSUM]:
        raise FormatError("damaged (the checksum of its header differs)")
    check_types("metadata", metadata, dict.fromkeys(keys, str))
    return found, entries


def check_places(entries: dict[str, Any], layout: Layout, header: bytes, size: int) -> None:
    """Raise FormatError where tensors or data size are not as laid out, or padding is missing."""
    if entries != layout or size != _data_size(layout) or len(header) % 8:
        raise FormatError("damaged (names, types, shapes or offsets of the tensors are wrong)")


def header_json(text: str | bytes, kind: type[T]) -> T:
    """Parse a part of a header; FormatError if it is no strict JSON (`files`) of type `kind`."""
    try:
        value = parse_json(text)
    except FormatError as error:
        raise FormatError(f"damaged (header: {error!s:.80})") from error
    if not isinstance(value, kind):
        raise FormatError(f"damaged (header: {value!r:.40} is not a {kind.__name__})")
    return value


def check_types(what: str, value: Any, types: Mapping[str, Any]) -> None:
    """Raise FormatError where keys of a JSON object, or exact types of its values, are not these.

    `types` says key -> type as in an annotation; what lists and objects hold is not checked.
    """
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise FormatError(f"{what}: {value!r:.60} has not the keys of docs/formats.md")
    for key, hint in types.items():
        if type(value[key]) not in _json_types(hint):
            raise FormatError(f"{what}: {key} {value[key]!r:.60} has the wrong type")


def _json_types(hint: Any) -> set[type]:
    """Types that `json` reads where an annotation says `hint`; a number may be a whole one."""
    if isinstance(hint, UnionType):
        return {kind for each in get_args(hint) for kind in _json_types(each)}
    plain = get_origin(hint) or hint
    special: Any = {float: {int, float}, Mapping: {dict}, Sequence: {list}, tuple: {list}}
    return set(special.get(plain, {plain}))


def record(what: str, value: Any, kind: type[T]) -> T:
    """Make a dataclass or named tuple of a JSON object with its attributes, see `check_types`."""
    check_types(what, value, get_type_hints(kind))
    return kind(**value)


def check_rules(what: str, rules: Mapping[str, Any]) -> None:
    """Refuse `what` where a rule, given by its text and whether it is kept, is broken."""
    for rule, is_kept in rules.items():
        if not is_kept:
            raise FormatError(f"{what} breaks the rule: {rule}")


def are_counts(values: Iterable[Any]) -> bool:
    """Tell whether all values are whole numbers from 0 on that any JSON reader can hold."""
    return all(type(value) is int and 0 <= value < 2**53 for value in values)


def unpack_mask(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Undo `np.packbits(mask)`: turn 1-D uint8 into booleans of `shape`.

    The bits come row-major, the first in the highest bit of a byte, zero padded.

    Raises:
        FormatError: too few or too many bytes, or bits that belong to no value.
    """
    count = math.prod(shape)
    if packed.shape != (-(-count // 8),):
        raise FormatError(f"a mask of shape {packed.shape} for {count} values")
    bits = np.unpackbits(packed).view(bool)
    if bits[count:].any():
        raise FormatError(f"a mask has bits after its {count} values")
    return bits[:count].reshape(shape)


def is_finite(value: Any) -> bool:
    """Tell whether what `json` read is a finite number."""
    return type(value) in (int, float) and abs(value) < math.inf


def sha256(*arrays: np.ndarray) -> str:
    """Hash the bytes of contiguous arrays, one after the other; 64 hex digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()


def read_numbers(
    data: Data, places: Iterable[Mapping[str, Any]], digest: str, dtype: str
) -> list[np.ndarray]:
    """Copy tensors that have one digest: the first as numbers of `dtype`, others as bytes.

    FormatError tells of damaged bytes, and of numbers that are not finite.
    """
    first, *others = (data.read(*place["data_offsets"]) for place in places)
    if sha256(first, *others) != digest:
        raise FormatError("its SHA-256 differs from the header's")
    if not np.isfinite(first.view(dtype)).all():
        raise FormatError("NaN or infinite values")
    return [first.view(dtype), *others]
