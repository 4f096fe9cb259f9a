"""The .npy of a calibration: second moments of the inputs of linears (docs/formats.md)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from composable.errors import FormatError, MismatchError, UserError
from composable.files import atomic_write, canonical_json
from composable.formats import container
from composable.formats.container import HEX, Format, Layout, are_counts, check_types, header_json
from composable.linalg.grams import Gram

METADATA = ("checksum", "fingerprint", "format", "info", "inputs", "version")
SPLITS = ("train", "valid")  # the calibration texts; those held out, which may be missing
MOMENTS = ("matrix", "total")
REMEDY = "delete it, or name another file, and it will be measured again"
FORMAT = Format("composable.calibration", "2", "a calibration", "measured on", REMEDY, REMEDY)
TEXTS = {"identity": str, "samples": int, "tokens": dict}


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


def _file_start(header: Header) -> bytes:
    """Return all before the data, checked; its length does not depend on the digests."""
    metadata = {
        "fingerprint": header.fingerprint,
        "info": canonical_json(header.info),
        "inputs": canonical_json([vars(item) for item in header.inputs]),
    }
    text, size = container.build_header(FORMAT, metadata, _lay_out(header))
    _parse_header(text, size)  # what could not be read again must not be written
    return container.file_start(text, size)


def _lay_out(header: Header) -> Layout:
    """Place every tensor in the data; of matrices the upper triangle, diagonal included."""
    return container.lay_out(
        (f"{index}/{split}.{moment}", "F64", (size,))
        for split in header.splits  # the first split stays where it is as the second is added
        for index, item in enumerate(header.inputs)
        for moment, size in (("matrix", item.width * (item.width + 1) // 2), ("total", item.width))
    )


def _parse_header(text: bytes, size: int) -> Header:
    """Read a header that `size` bytes follow, and check everything that it says."""
    metadata, entries = container.parse_metadata(text, FORMAT, METADATA)
    info = header_json(metadata["info"], dict)
    _check_info(info)
    values = header_json(metadata["inputs"], list)
    inputs = [_input(f"input {index}", value, info) for index, value in enumerate(values)]
    linears = [linear for item in inputs for linear in item.linears]
    if len(set(linears)) < len(linears):
        raise FormatError("a linear reads two inputs")
    found = Header(metadata["fingerprint"], info, inputs)
    container.check_places(entries, _lay_out(found), text, size)
    return found


def _check_info(info: dict[str, Any]) -> None:
    check_types("info", info, dict.fromkeys(SPLITS if "valid" in info else SPLITS[:1], dict))
    for split, texts in info.items():
        what = f"info, {split}"
        check_types(what, texts, TEXTS)
        if not HEX.fullmatch(texts["identity"]):
            raise FormatError(f"{what}: identity is not 64 hex digits")
        if not are_counts([texts["samples"], *texts["tokens"].values()]):
            raise FormatError(f"{what}: samples and tokens are not counts")


def _input(what: str, value: Any, splits: Iterable[str]) -> Input:
    """Check one record of the header: its keys, their values."""
    item = container.record(what, value, Input)
    item.linears = tuple(item.linears)
    names = [f"{split}.{moment}" for split in splits for moment in MOMENTS]
    check_types(f"{what}, sha256", item.sha256, dict.fromkeys(names, str))
    check_types(f"{what}, tokens", item.tokens, dict.fromkeys(splits, int))
    rules = {
        "linears are names, at least one": item.linears
        and all(type(linear) is str and linear for linear in item.linears),
        "width is a count above 0": item.width and are_counts([item.width]),
        "tokens are counts": are_counts(item.tokens.values()),
        "digests are 64 hex digits": all(map(HEX.fullmatch, item.sha256.values())),
    }
    container.check_rules(what, rules)
    return item


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
    for item in header.inputs:
        names = (f"{split}.{moment}" for split in header.splits for moment in MOMENTS)
        item.sha256 = dict.fromkeys(names, "0" * 64)  # not known yet
    with atomic_write(Path(path)) as file:
        start = _file_start(header)
        file.write(start)
        given = iter(grams)
        for split, item in product(header.splits, header.inputs):
            # no name for it here: it must be gone before the next is measured
            _write_gram(file, item, split, next(given))
        final = _file_start(header)
        assert len(final) == len(start), "the digests are known now"
        file.seek(0)
        file.write(final)


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
    upper = (matrix[row, row:] for row in range(len(matrix)))
    for moment, rows in zip(MOMENTS, (upper, [total]), strict=True):
        digest = hashlib.sha256()
        for row in rows:
            digest.update(row.data)
            file.write(row.data)
        item.sha256[f"{split}.{moment}"] = digest.hexdigest()


class Calibration:
    """An open calibration: its header is checked; moments are read when asked for.

    Attributes:
        names: paths of the linears it covers, in the order in which they run.
    """

    def __init__(self, path: Path) -> None:
        text, self._data = container.open_payload(path, FORMAT.noun)
        self.path, self.header = path, _parse_header(text, len(self._data))
        self.fingerprint, self.info, inputs = self.header
        self._layout = _lay_out(self.header)
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
        """Do what `inputs` does, for the held-out texts."""
        if "valid" not in self.info:
            raise MismatchError(f"{self.path}: was measured without held-out texts; {REMEDY}.")
        return self._load(linear, "valid")

    def tokens_per_input(self, linear: str) -> float:
        """Return how many calibration tokens there are for each column of a linear."""
        self.require([linear])
        item = self.header.inputs[self._index[linear]]
        return round(item.tokens["train"] / item.width, 2)

    def require(self, linears: Iterable[str]) -> None:
        """Raise MismatchError where the moments of one of `linears` were not measured."""
        missing = [linear for linear in linears if linear not in self._index]
        if missing:
            raise MismatchError(
                f'{self.path}: has no moments of "{missing[0]}" (has those of '
                f"{len(self.names)} linears); {REMEDY}."
            )

    def _load(self, linear: str, split: str) -> Gram:
        self.require([linear])
        item = self.header.inputs[self._index[linear]]
        packed, total = (self._read(linear, f"{split}.{moment}") for moment in MOMENTS)
        upper = np.tri(item.width, dtype=bool).T
        matrix = np.empty(upper.shape)
        matrix[upper] = matrix.T[upper] = packed
        return Gram(torch.from_numpy(matrix), torch.from_numpy(total), item.tokens[split])

    def _read(self, linear: str, name: str) -> np.ndarray:
        """Copy one tensor from the file and verify it."""
        index = self._index[linear]
        item, places = self.header.inputs[index], [self._layout[f"{index}/{name}"]]
        try:
            values = container.read_numbers(self._data, places, item.sha256[name], "<f8")
            return values[0].astype(np.float64, copy=False)
        except FormatError as error:
            what = f'tensor "{index}/{name}", of "{item.linears[0]}", is damaged ({error})'
            raise FormatError(f"{self.path}: {what}; {REMEDY}.") from error


def open_calibration(path: Path, fingerprint: str | None = None) -> Calibration:
    """Open a calibration and check its whole header; arguments and errors as of `Format.open`."""
    return FORMAT.open(Calibration, path, fingerprint)
