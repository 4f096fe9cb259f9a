"""A safetensors file within a .npy of bytes: what bundles and calibration files have in common."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from composable.errors import FormatError
from composable.files import parse_json

T = TypeVar("T")
ARRAY_HEADER = 128  # bytes of numpy's version 1.0 header for any 1-D uint8 array
HEADER_LIMIT = 100_000_000  # as in the safetensors library
PREFIX = b'{"__metadata__":{"checksum":"'  # what every header starts with; 64 hex digits follow
CHECKSUM = slice(len(PREFIX), len(PREFIX) + 64)
ITEM_SIZE = {"F64": 8, "F32": 4, "U8": 1}


class Format(NamedTuple):
    """A kind of file: what its metadata says, and what a message calls it ("a bundle")."""

    name: str
    version: str
    noun: str


class Place(Protocol):
    """Where a tensor lies in the data, as the header says it; what else it says is the format's."""

    @property
    def dtype(self) -> str:
        """A key of `ITEM_SIZE`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored tensor, row-major."""

    @property
    def begin(self) -> int:
        """First byte, from the start of the data."""

    @property
    def end(self) -> int:
        """Byte after the last."""


def header_entries(places: Mapping[str, Place]) -> dict[str, Any]:
    """Return what the header says of tensors."""
    return {
        key: {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [p.begin, p.end]}
        for key, p in places.items()
    }


def file_start(header: bytes, data_size: int) -> bytes:
    """Return all that comes before the data: array header, length, header."""
    return array_header(8 + len(header) + data_size) + len(header).to_bytes(8, "little") + header


def array_header(size: int) -> bytes:
    """Return what np.save writes before `size` bytes of a 1-D uint8 array."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def open_payload(path: Path, noun: str) -> tuple[bytes, np.ndarray]:
    """Map a file.

    Args:
        path: the .npy file; its array header must be ours to the byte.
        noun: what is expected, for the message.

    Returns:
        Its header, and its data as a uint8 array that is read from the disk where it is touched.

    Raises:
        FormatError: another file, truncated or extended.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(ARRAY_HEADER)
        size = file.seek(0, 2)
    if size <= ARRAY_HEADER or start != array_header(size - ARRAY_HEADER):
        raise FormatError(_why_no_array(start, size, noun))
    payload = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    length = int.from_bytes(payload[:8].tobytes(), "little")
    if len(payload) < 8 or length > min(len(payload) - 8, HEADER_LIMIT):
        raise FormatError(f"damaged (header length {length})")
    return payload[8 : 8 + length].tobytes(), payload[8 + length :]


def _why_no_array(start: bytes, size: int, noun: str) -> str:
    declared = re.match(
        rb"\x93NUMPY\x01\x00v\x00{'descr': '\|u1', .*'shape': \((\d{1,18}),\)", start
    )
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


def build_header(metadata: dict[str, str], places: Mapping[str, Place]) -> bytes:
    """Return the JSON header, padded to a multiple of 8 bytes, with its checksum filled in.

    Args:
        metadata: all but the checksum, sorted by key.
        places: of the tensors, in the order of the file.
    """
    entries = {"__metadata__": {"checksum": "0" * 64, **metadata}, **header_entries(places)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return text[: CHECKSUM.start] + header_checksum(text) + text[CHECKSUM.stop :]


def header_checksum(header: bytes) -> bytes:
    """Return the SHA-256, in hex digits, of a header with 64 zeros for its checksum."""
    blank = header[: CHECKSUM.start] + b"0" * 64 + header[CHECKSUM.stop :]
    return hashlib.sha256(blank).hexdigest().encode()


def parse_metadata(
    header: bytes, expected: Format, keys: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a header as far as all formats agree.

    Args:
        header: its bytes, with the padding.
        expected: the format it has to have.
        keys: of the metadata, checksum included.

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
    check_types("metadata", metadata, dict.fromkeys(keys, (str,)))
    return found, entries


def check_places(
    entries: dict[str, Any], places: Mapping[str, Place], header: bytes, data_size: int
) -> None:
    """Compare what a header says of its tensors, and the size of the data, with what must be.

    Raises:
        FormatError: they differ, or the header is not padded.
    """
    end = max((place.end for place in places.values()), default=0)
    if entries != header_entries(places) or end != data_size or len(header) % 8:
        raise FormatError("damaged (names, types, shapes or offsets of the tensors are wrong)")


def header_json(text: str | bytes, kind: type[T]) -> T:
    """Parse a part of a header: strict JSON (see `files.parse_json`) of type `kind`.

    Raises:
        FormatError: it is not.
    """
    try:
        value = parse_json(text)
    except FormatError as error:
        raise FormatError(f"damaged (header: {error!s:.80})") from error
    if not isinstance(value, kind):
        raise FormatError(f"damaged (header: {value!r:.40} is not a {kind.__name__})")
    return value


def check_types(what: str, value: Any, types: dict[str, tuple[type, ...]]) -> None:
    """Compare the keys of a JSON object, and the exact types of its values, with a table.

    Raises:
        FormatError: they differ.
    """
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise FormatError(f"{what}: {value!r:.60} has not the keys of docs/formats.md")
    for key, allowed in types.items():
        if type(value[key]) not in allowed:
            raise FormatError(f"{what}: {key} {value[key]!r:.60} has the wrong type")


def sha256(*arrays: np.ndarray) -> str:
    """Hash the bytes of contiguous arrays, one after the other; 64 hex digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    return digest.hexdigest()
