"""The container of bundles and calibrations, in a format of its own: what is read, what refused."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from composable.errors import FormatError
from composable.formats import container
from composable.formats.container import Format
from tests.npy import as_npy, rewrite_header

FORMAT = Format("composable.test", "7", "a test file")
KEYS = ("checksum", "digest", "format", "version")


LAYOUT = {
    "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
    "b": {"dtype": "U8", "shape": [2], "data_offsets": [12, 14]},
}
DATA = np.frombuffer(np.array([1, -2.5, 0.25], np.float32).tobytes() + b"\x07\xff", np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two tensors, and their digest as a value of the format's own."""
    metadata = {"digest": container.sha256(DATA)}
    start = container.file_start(*container.build_header(FORMAT, metadata, LAYOUT))
    (tmp_path / "x.npy").write_bytes(start + DATA.tobytes())
    return tmp_path / "x.npy"


def read(path: Path) -> bytes:
    """Read as bundles and calibrations do: the container's checks, then the format's digests."""
    header, data = container.open_payload(path, FORMAT.noun)
    metadata, entries = container.parse_metadata(header, FORMAT, KEYS)
    container.check_places(entries, LAYOUT, header, len(data))
    found = data.read(0, len(data))
    if container.sha256(found) != metadata["digest"]:
        raise FormatError("damaged (the digest differs)")
    return found.tobytes()


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_read(path: Path) -> None:
    assert read(path) == DATA.tobytes()
    payload = np.load(path, allow_pickle=False).tobytes()
    tensors = safetensors.torch.load(payload)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [1.0, -2.5, 0.25], "b": [7, 255]
    }  # fmt: skip
    length = int.from_bytes(payload[:8], "little")
    assert length % 8 == 0
    assert set(json.loads(payload[8 : 8 + length])["__metadata__"]) == set(KEYS)


@pytest.mark.parametrize("size", [1, 9, 10, 12345, 10**9, 10**17])
def test_array_header_is_numpys_for_every_size(size: int) -> None:
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    assert container.array_header(size) == buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file, expected a test file"),
        (b"hello world, this is text" * 20, "not a .npy file"),
        (pickle.dumps({"a": list(range(100))}), "a pickle under another name, which could run"),
        (b"PK\x03\x04" + bytes(200), "a zip file (.pth or .npz) under another name"),
        (b"\x93NUM", "not a .npy file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': ", "not the plain uint8 array that a test file is"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    assert expected in refused(tmp_path / "x.npy")


def test_other_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for array in (np.zeros(300), np.zeros((3, 100), np.uint8), np.zeros(300, np.int8)):
        np.save(path, array)
        assert "a .npy file, but not the plain uint8 array" in refused(path)
    for size in (0, 1, 7, 8, 300):
        as_npy(path, bytes(size))
        refused(path)
    as_npy(path, safetensors.torch.save({"a": torch.ones(100)}))
    assert "format None, expected" in refused(path)


@pytest.mark.parametrize("dtype", [object, [("a", object), ("b", "u1")]])
def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path: Path, dtype: Any) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    array = np.zeros(1, dtype)
    array[0] = Bomb() if dtype is object else (Bomb(), 1)
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert "a pickle in disguise" in refused(tmp_path / "x.npy")
    assert not (tmp_path / "ran").exists()


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        message = refused(path)
        assert size < 128 or "truncated" in message
    for size in range(128, len(content)):  # also where the array header was made to agree
        as_npy(path, content[128:size])
        refused(path)


def test_an_extended_file_is_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    promise = f"extended ({len(content) + 1} bytes, its first line promises {len(content)})"
    assert promise in refused(path)
    as_npy(path, content[128:] + b"\0")
    assert "offsets of the tensors are wrong" in refused(path)


def test_every_flipped_bit_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        refused(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"dtype":"F32"', '"dtype":"I32"', "names, types, shapes or offsets"),
        ('"data_offsets":[0,', '"data_offsets":[1,', "names, types, shapes or offsets"),
        ('"shape":[3]', '"shape":[1,3]', "names, types, shapes or offsets"),
        ('"a":', '"c":', "names, types, shapes or offsets"),
        ('"a":', '"x":1,"a":', "names, types, shapes or offsets"),
        ('"a":', '"a":1,"a":', 'key "a" occurs twice'),
        ('"shape":[3]', '"shape":[NaN]', "NaN is not a number that JSON knows"),
        ('"shape":[3]', f'"shape":{"[" * 10**5}{"]" * 10**5}', "damaged"),
        ('"version":"7"', '"version":"6"', "(format version '6', this program reads '7')"),
        ("composable.test", "composable.tset", "'composable.tset', expected 'composable.test'"),
        ('"digest"', '"digset"', "has not the keys"),
        ('"digest":"', '"digest":1,"x":"', "has not the keys"),
    ],
)
def test_a_wrong_header_with_a_right_checksum(
    path: Path, old: str, new: str, expected: str
) -> None:
    rewrite_header(path, old, new)
    assert expected in refused(path)
