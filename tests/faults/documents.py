"""File formats as trees that can be edited: bytes to a tree and back, seals made right again."""

import csv
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from composable.formats import container
from composable.models import checkpoint
from tests.faults.craft import Path, to_json


class Document(NamedTuple):
    """A format.

    Attributes:
        read: bytes -> tree of dicts, lists, arrays and values.
        write: the tree, and where it was edited -> bytes.
    """

    read: Callable[[bytes], Any]
    write: Callable[[Any, Path], bytes]


JSON = Document(json.loads, lambda tree, _: to_json(tree, indent=1).encode("utf-8", "replace"))
JSON_LINES = Document(
    lambda data: [json.loads(line) for line in data.splitlines()],
    lambda tree, _: "".join(to_json(each) + "\n" for each in tree).encode("utf-8", "replace"),
)
TEXT_LINES = Document(
    lambda data: data.decode().splitlines(),
    lambda tree, _: "".join(f"{_cell(line)}\n" for line in tree).encode("utf-8", "replace"),
)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def table(**form: Any) -> Document:
    """Rows of cells, by the module csv."""

    def read(data: bytes) -> Any:
        return list(csv.reader(io.StringIO(data.decode()), **form))

    def write(tree: Any, _: Path) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", **form)
        rows = [row if isinstance(row, list) else [row] for row in tree]
        writer.writerows([[_cell(cell).replace("\x00", "?") for cell in row] for row in rows])
        return text.getvalue().encode("utf-8", "replace")

    return Document(read, write)


CSV = table()
TSV = table(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, escapechar="\\")


def zipped(inner: Document) -> Document:
    """A document in gzip."""
    return Document(
        lambda data: inner.read(gzip.decompress(data)),
        lambda tree, path: gzip.compress(inner.write(tree, path), 1, mtime=0),
    )


def _read_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _write_torch(tree: Any, _: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


TORCH = Document(_read_torch, _write_torch)
IN_MODEL = ("config", "generation_config", "structure", "info")


def _read_model(data: bytes) -> Any:
    tree = _read_torch(data)
    return {**tree, **{key: json.loads(tree[key]) for key in IN_MODEL}}


def _write_model(tree: Any, path: Path) -> bytes:
    texts = {key: to_json(tree[key], sort_keys=True) for key in IN_MODEL if key in tree}
    return b"".join(checkpoint.sealed(_write_torch({**tree, **texts}, path)))


MODEL = Document(_read_model, _write_model)


def _read_safetensors(data: bytes) -> Any:
    length = int.from_bytes(data[:8], "little")
    return {
        "header": json.loads(data[8 : 8 + length]),
        "data": np.frombuffer(data[8 + length :], "u1"),
    }


def _write_safetensors(tree: Any, _: Path) -> bytes:
    header = to_json(tree.get("header")).encode("utf-8", "replace")
    header += b" " * (-len(header) % 8)
    data = np.ascontiguousarray(tree["data"]).tobytes() if "data" in tree else b""
    return len(header).to_bytes(8, "little") + header + data


SAFETENSORS = Document(_read_safetensors, _write_safetensors)


def _read_part(data: bytes) -> Any:
    length = int.from_bytes(data[32:40], "little")  # behind the digest
    described = json.loads(data[40 : 40 + length])
    return {"facts": described, "tensors": safetensors.torch.load(data[40 + length :])}


def _write_part(tree: Any, _: Path) -> bytes:
    described = to_json(tree.get("facts")).encode("utf-8", "replace")
    tensors = {name: tensor.contiguous() for name, tensor in tree.get("tensors", {}).items()}
    return len(described).to_bytes(8, "little") + described + safetensors.torch.save(tensors)


#: A finished part of a least-squares run; its digest is left to whoever places the file.
PART = Document(_read_part, _write_part)


def sealed_array(*texts: str) -> Document:
    """A bundle or a calibration; `texts` of its metadata are JSON themselves, the last: records."""

    def read(data: bytes) -> Any:
        payload = _read_safetensors(data[container.ARRAY_HEADER :])
        metadata = payload["header"].pop("__metadata__")
        arrays = {
            name: payload["data"][slice(*entry["data_offsets"])].view(
                {"F64": "<f8", "F32": "<f4", "U8": "u1"}[entry["dtype"]]
            )
            for name, entry in payload["header"].items()
        }
        metadata |= {name: json.loads(metadata[name]) for name in texts}
        return {"metadata": metadata, "layout": payload["header"], "data": arrays}

    def write(tree: Any, path: Path) -> bytes:
        metadata, arrays = dict(tree.get("metadata", {})), tree.get("data", {})
        if path[0] == "data":  # the numbers were edited: their digests are made right
            _digest_again(metadata.get(texts[-1], []), arrays)
        metadata |= {name: to_json(metadata[name]) for name in texts if name in metadata}
        metadata.pop("checksum", None)
        whole = {"checksum": "0" * 64, **dict(sorted(metadata.items()))}
        text = to_json({"__metadata__": whole, **tree.get("layout", {})}, separators=(",", ":"))
        header = text.encode("utf-8", "replace")
        header += b" " * (-len(header) % 8)
        place = container.CHECKSUM
        header = header[: place.start] + container.header_checksum(header) + header[place.stop :]
        data = b"".join(np.ascontiguousarray(each).tobytes() for each in arrays.values())
        return container.file_start(header, len(data)) + data

    return Document(read, write)


def _digest_again(records: Any, arrays: dict[str, Any]) -> None:
    for index, record in enumerate(records):
        if isinstance(record.get("sha256"), dict):  # of a calibration
            for name in record["sha256"]:
                record["sha256"][name] = _digest(arrays, f"{index}/{name}")
        for tensor in record.get("tensors", ()):
            name = f"{index}/{tensor['name']}"
            whole = (name,) if tensor["kept"] is None else (f"{name}.values", f"{name}.mask")
            tensor["sha256"] = _digest(arrays, *whole)


def _digest(arrays: dict[str, Any], *names: str) -> str:
    found = [np.ascontiguousarray(arrays[name]) for name in names if name in arrays]
    return container.sha256(*(each.view("u1").reshape(-1) for each in found))


def _read_npz(data: bytes) -> Any:
    found = dict(np.load(io.BytesIO(data)))
    return found | ({"header": json.loads(found["header"].tobytes())} if "header" in found else {})


def _write_npz(tree: Any, _: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in tree.items():
            if name == "header":
                value = np.frombuffer(
                    to_json(value, sort_keys=True).encode("utf-8", "replace"), "u1"
                )
            content = io.BytesIO()
            np.save(content, value, allow_pickle=True)
            archive.writestr(f"{name}.npy", content.getvalue())
    return buffer.getvalue()


#: Arrays, of which `header` is JSON where it is there.
ARRAYS = Document(_read_npz, _write_npz)


def _read_numbers(data: bytes) -> Any:
    """The first bytes as 32-bit numbers, where lengths, counts and types are; the rest as it is."""
    head = data[: min(len(data), 4096) // 4 * 4]
    return {"numbers": list(struct.unpack(f"<{len(head) // 4}I", head)), "rest": data[len(head) :]}


def _write_numbers(tree: Any, _: Path) -> bytes:
    numbers = tree.get("numbers", [])
    packed = [_pack(each) for each in (numbers if isinstance(numbers, list) else [numbers])]
    rest = tree.get("rest", b"")
    return b"".join(packed) + (rest if isinstance(rest, bytes) else b"")


def _pack(value: Any) -> bytes:
    if isinstance(value, bool) or not isinstance(value, int):
        return to_json(value).encode("utf-8", "replace")[:64]
    return (value % 2 ** (64 if abs(value) >= 2**32 else 32)).to_bytes(
        8 if abs(value) >= 2**32 else 4, "little"
    )


#: A binary format of which nothing is known but that it is full of numbers.
NUMBERS = Document(_read_numbers, _write_numbers)
