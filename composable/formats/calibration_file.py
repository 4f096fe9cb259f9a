"""The .npy of a calibration: second moments of the inputs of linears (docs/formats.md)."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from composable.errors import FormatError, MismatchError, UserError
from composable.files import atomic_write, canonical_json
from composable.formats import container
from composable.formats.container import ITEM_SIZE, Format, check_types, header_json, sha256
from composable.linalg.grams import Gram

FORMAT = Format("composable.calibration", "2", "a calibration")
METADATA = ("checksum", "fingerprint", "format", "info", "inputs", "version")
SPLITS = ("train", "valid")  # the calibration texts; those held out, which may be missing
MOMENTS = ("matrix", "total")
HEX = re.compile("[0-9a-f]{64}")
UNKNOWN = "0" * 64  # a digest that is not known yet
REMEDY = (
    "delete it, or name another file, and prune.py or block_level_finetuning.py will measure it "
    "again"
)


@dataclass
class Input:
    """One input tensor of the dense model as the header describes it.

    Attributes:
        linears: paths of those that read it, in the order in which they run.
        width: features, n.
        tokens: number of tokens by split.
        sha256: of the stored tensors, by split and moment: "train.matrix".
    """

    linears: tuple[str, ...]
    width: int
    tokens: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)


class Header(NamedTuple):
    """What the header of a calibration says.

    Attributes:
        fingerprint: of the dense model.
        info: split -> its texts: `identity` (see `tasks.samples.identity_of`), `samples`, and
            `tokens` by stack.
        inputs: in the order in which the model meets them.
    """

    fingerprint: str
    info: dict[str, Any]
    inputs: list[Input]

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that are measured, in the order of the file."""
        return tuple(split for split in SPLITS if split in self.info)


class Part(NamedTuple):
    """Where a tensor of the safetensors file lies in the data."""

    shape: tuple[int, ...]
    begin: int
    end: int
    dtype: str = "F64"


def build_header(header: Header) -> bytes:
    """Return the JSON header; its length does not depend on the digests."""
    metadata = {
        "fingerprint": header.fingerprint,
        "format": FORMAT.name,
        "info": canonical_json(header.info),
        "inputs": canonical_json([vars(item) for item in header.inputs]),
        "version": FORMAT.version,
    }
    return container.build_header(metadata, lay_out(header))


def lay_out(header: Header) -> dict[str, Part]:
    """Place every tensor in the data, without holes; return them by their names in the file."""
    placed: dict[str, Part] = {}
    end = 0
    for split in header.splits:  # the first split stays where it is as the second is added
        for index, item in enumerate(header.inputs):
            for moment in MOMENTS:
                size = _packed_size(item.width) if moment == "matrix" else item.width
                begin, end = end, end + size * ITEM_SIZE["F64"]
                placed[f"{index}/{split}.{moment}"] = Part((size,), begin, end)
    return placed


def data_size(header: Header) -> int:
    """Bytes of all tensors together."""
    return max((part.end for part in lay_out(header).values()), default=0)


def parse_header(header: bytes, size: int) -> Header:
    """Read a header and check everything that it says.

    Args:
        header: its bytes, with the padding.
        size: bytes that follow it in the file.

    Raises:
        FormatError: another format, a newer one, damaged, or it breaks a rule of the format.
    """
    metadata, entries = container.parse_metadata(header, FORMAT, METADATA)
    info = header_json(metadata["info"], dict)
    _check_info(info)
    values = header_json(metadata["inputs"], list)
    inputs = [_input(f"input {index}", value, info) for index, value in enumerate(values)]
    linears = [linear for item in inputs for linear in item.linears]
    if len(set(linears)) < len(linears):
        raise FormatError("a linear reads two inputs")
    found = Header(metadata["fingerprint"], info, inputs)
    container.check_places(entries, lay_out(found), header, size)
    return found


Types = dict[str, tuple[type, ...]]
TEXTS: Types = {"identity": (str,), "samples": (int,), "tokens": (dict,)}
INPUT: Types = {"linears": (list,), "sha256": (dict,), "tokens": (dict,), "width": (int,)}


def _check_info(info: dict[str, Any]) -> None:
    is_whole = "valid" in info
    check_types("info", info, dict.fromkeys(SPLITS[: 1 + is_whole], (dict,)))
    for split, texts in info.items():
        what = f"info, {split}"
        check_types(what, texts, TEXTS)
        if not HEX.fullmatch(texts["identity"]):
            raise FormatError(f"{what}: identity is not 64 hex digits")
        if not _are_counts([texts["samples"], *texts["tokens"].values()]):
            raise FormatError(f"{what}: samples and tokens are not counts")


def _input(what: str, value: Any, splits: Iterable[str]) -> Input:
    """Check one record of the header: its keys, their values."""
    check_types(what, value, INPUT)
    names = [f"{split}.{moment}" for split in splits for moment in MOMENTS]
    check_types(f"{what}, sha256", value["sha256"], dict.fromkeys(names, (str,)))
    check_types(f"{what}, tokens", value["tokens"], dict.fromkeys(splits, (int,)))
    rules = {
        "linears are names, at least one": value["linears"]
        and all(type(linear) is str and linear for linear in value["linears"]),
        "width is a count above 0": value["width"] and _are_counts([value["width"]]),
        "tokens are counts": _are_counts(value["tokens"].values()),
        "digests are 64 hex digits": all(map(HEX.fullmatch, value["sha256"].values())),
    }
    for rule, is_kept in rules.items():
        if not is_kept:
            raise FormatError(f"{what} breaks the rule: {rule}")
    return Input(**{**value, "linears": tuple(value["linears"])})


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**53 for value in values)


def _packed_size(width: int) -> int:
    """Numbers in the upper triangle, diagonal included."""
    return width * (width + 1) // 2


def write(path: Path, header: Header, grams: Iterable[Gram]) -> None:
    """Write a calibration input by input, whole or not at all; same moments, same bytes.

    Args:
        path: the .npy file.
        header: its inputs get their digests here.
        grams: moments of every input, split by split; taken one at a time, so that they can be
            measured while the file is written.

    Raises:
        FormatError: what was to be written breaks a rule of the format.
        UserError: a moment is not finite.
        OSError: the file cannot be written; an older one stays.
    """
    size = data_size(header)
    for item in header.inputs:
        names = (f"{split}.{moment}" for split in header.splits for moment in MOMENTS)
        item.sha256 = dict.fromkeys(names, UNKNOWN)
    with atomic_write(Path(path)) as file:
        start = container.file_start(build_header(header), size)
        file.write(start)
        given = iter(grams)
        for split, item in product(header.splits, header.inputs):
            # no name for it here: it must be gone before the next is measured
            _write_gram(file, item, split, next(given))
        text = build_header(header)
        parse_header(text, size)  # what could not be read again must not be written
        assert len(container.file_start(text, size)) == len(start), "the digests are known now"
        file.seek(0)
        file.write(container.file_start(text, size))


def _write_gram(file: BinaryIO, item: Input, split: str, gram: Gram) -> None:
    """Append the moments of one split, and note their digests."""
    assert (gram.count, len(gram.total)) == (item.tokens[split], item.width), item
    if not (torch.isfinite(gram.matrix).all() and torch.isfinite(gram.total).all()):
        raise UserError(
            f'the inputs of "{item.linears[0]}" hold NaN or infinity, or their squares do: finite '
            "values were expected; check the model with evaluate.py."
        )
    matrix, total = (
        moment.cpu().numpy().astype("<f8", copy=False) for moment in (gram.matrix, gram.total)
    )
    for name, rows in (("matrix", _upper_rows(matrix)), ("total", iter([total]))):
        item.sha256[f"{split}.{name}"] = _append(file, rows)


def _upper_rows(matrix: np.ndarray) -> Iterator[np.ndarray]:
    return (matrix[row, row:] for row in range(len(matrix)))


def _append(file: BinaryIO, rows: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.data)
        file.write(row.data)
    return digest.hexdigest()


class Calibration:
    """An open calibration: all of its header is checked; moments are read when asked for.

    Attributes:
        path: the file.
        header: what it says.
        fingerprint: of the dense model it was measured on.
        info: of the texts, see `Header`.
        names: paths of the linears it covers, in the order in which they run.
    """

    def __init__(self, path: Path) -> None:
        text, self._data = container.open_payload(path, FORMAT.noun)
        self.path, self.header = path, parse_header(text, len(self._data))
        self.fingerprint, self.info, inputs = self.header
        self._layout = lay_out(self.header)
        self._index = {name: i for i, item in enumerate(inputs) for name in item.linears}
        self.names = tuple(self._index)

    def inputs(self, linear: str) -> Gram:
        """Read the moments of a linear's input on the calibration texts.

        Raises:
            FormatError: their bytes are damaged.
            MismatchError: they were not measured.
        """
        return self._load(linear, "train")

    def held_out(self, linear: str) -> Gram:
        """Read the moments of a linear's input on the held-out texts; errors as of `inputs`."""
        if "valid" not in self.info:
            raise MismatchError(f"{self.path}: was measured without held-out texts; {REMEDY}.")
        return self._load(linear, "valid")

    def require(self, linears: Iterable[str]) -> None:
        """Refuse to go on without the moments of `linears`.

        Raises:
            MismatchError: one was not measured.
        """
        missing = [linear for linear in linears if linear not in self._index]
        if missing:
            raise MismatchError(
                f'{self.path}: has no moments of "{missing[0]}" (has those of '
                f"{len(self.names)} linears); {REMEDY}."
            )

    def _load(self, linear: str, split: str) -> Gram:
        self.require([linear])
        index = self._index[linear]
        item = self.header.inputs[index]
        packed = self._read(index, f"{split}.matrix")
        total = torch.from_numpy(self._read(index, f"{split}.total"))
        matrix = torch.from_numpy(_unpack(packed, item.width))
        return Gram(matrix, total, item.tokens[split])

    def _read(self, index: int, name: str) -> np.ndarray:
        """Copy one tensor from the file and verify it."""
        part, item = self._layout[f"{index}/{name}"], self.header.inputs[index]
        raw = self._data[part.begin : part.end]
        values = raw.view("<f8").astype(np.float64)
        if sha256(raw) == item.sha256[name] and np.isfinite(values).all():
            return values
        is_changed = sha256(raw) != item.sha256[name]
        fault = "its SHA-256 differs from the header's" if is_changed else "NaN or infinite values"
        what = f'tensor "{index}/{name}", of "{item.linears[0]}", is damaged ({fault})'
        raise FormatError(f"{self.path}: {what}; {REMEDY}.")


def _unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """Undo the packing: (n(n+1)/2,) to a symmetric (n, n)."""
    matrix = np.empty((width, width))
    begin = 0
    for row in range(width):
        end = begin + width - row
        matrix[row, row:] = matrix[row:, row] = packed[begin:end]
        begin = end
    return matrix


def open_calibration(path: Path, fingerprint: str | None = None) -> Calibration:
    """Open a calibration and check its whole header.

    Args:
        path: the .npy file.
        fingerprint: of the dense model it has to belong to; None accepts any.

    Raises:
        FormatError: not a calibration, a newer one, or damaged.
        MismatchError: measured on another model.
        OSError: the file cannot be read.
    """
    try:
        calibration = Calibration(Path(path))
    except FormatError as error:
        raise FormatError(f"{path}: {error}; {REMEDY}.") from error
    if fingerprint is not None and fingerprint != calibration.fingerprint:
        raise MismatchError(
            f"{path}: measured on another model (fingerprint {calibration.fingerprint[:12]}, this "
            f"one has {fingerprint[:12]}); {REMEDY}."
        )
    return calibration
