"""scores.npz, the file of scores: write, read, check."""

import dataclasses
import io
import logging
import lzma
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable import files
from composable.errors import ConfigError, FormatError
from composable.families.base import KINDS
from composable.files import atomic_write, canonical_json
from composable.formats.config import Entry
from composable.formats.container import (
    HEX,
    are_counts,
    check_types,
    header_json,
    is_finite,
    record,
)  # fmt: skip
from composable.formats.scores import (
    FORMAT,
    BlockDistances,
    Candidates,
    ModuleCost,
    Numbers,
    Order,
    Origin,
    Scores,
    TextsRead,
    Tree,
    UnitImportance,
)
from composable.formats.sealed_file import check_sizes

log = logging.getLogger("composable")
#: How a pickle starts, and the one that torch.save puts into its archives.
PICKLE, TORCH_PICKLE = re.compile(b"\x80[\x02-\x05]"), "data.pkl"
MOST_COMPRESSED = 1 << 26  # bytes that archives of other programs, which compress, may become
HEADER = {
    "format": str, "version": str, "method": str, "options": dict, "model": dict,
    "texts": dict | None, "modules": list, "versions": dict, "units": list, "distances": list,
    "orders": list, "trees": list, "candidates": dict | None, "constants": dict,
}  # fmt: skip
Arrays = Mapping[str, NDArray[Any]]


def save(path: Path, scores: Scores) -> None:
    """Write a file of scores, whole or not at all; equal scores, equal bytes.

    Raises:
        FormatError: what was to be written breaks a rule of the format.
        OSError: it cannot be written.
    """
    named = _arrays_of(scores).items()
    arrays = {name: np.ascontiguousarray(values, dtype="<f8") for name, values in named}
    text = _build(scores)
    _parse(text, arrays)  # what could not be read again must not be written
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, header=np.frombuffer(text, np.uint8), **arrays)


def load(path: Path) -> Scores:
    """Read a file of scores, also one that short-transformers wrote (`arr_0` or `result` alone).

    Raises:
        FormatError: another file, one of another version, or damaged.
        OSError: it cannot be read.
    """
    content = files.read_bytes(path)
    try:
        arrays = _read(content)
        if "header" in arrays:
            header = arrays.pop("header")
            return _parse(header.astype(np.uint8, casting="no").tobytes(), arrays)
        if "format" in arrays:
            met = f"version {str(arrays['version'])[:20]} of the format"
            raise FormatError(f"{met}, this program reads {FORMAT.version}")
        found = _of_another_program(arrays)
    except _PickleError as error:
        raise FormatError(
            f"{path}: no scores but {error}, as models and published rankings "
            "(head_ranking_body.pkl) are; it is not read, as reading a pickle can run code; "
            "measure again with rank_importance.py, method trajectory, output scores.npz."
        ) from error
    except (FormatError, ConfigError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: no file of scores ({error}); {FORMAT.remedy}.") from error
    log.warning(
        "%s: is of another program and does not say of which model; whether it is of this one "
        "cannot be checked.",
        path,
    )
    return found


class _PickleError(FormatError):
    """A file is a pickle; the message says of which kind."""


def _read(content: bytes) -> dict[str, NDArray[Any]]:
    """Read every array of an .npz; the checksums of the archive are compared."""
    if PICKLE.match(content):
        raise _PickleError("a pickle of Python")
    file = io.BytesIO(content)
    check_sizes(file, most=MOST_COMPRESSED)
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name: name.removesuffix(".npy") for name in archive.namelist()}
            if any(name.rpartition("/")[2] == TORCH_PICKLE for name in names):
                raise _PickleError("a pickle of torch.save")
            if len({*names.values()}) < len(archive.namelist()):
                raise ValueError("two arrays of one name")
            return {name: _array(archive.read(member)) for member, name in names.items()}
    except (
        *(ValueError, EOFError, KeyError, RuntimeError, MemoryError, SyntaxError, TypeError),
        *(NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
    ) as error:
        raise FormatError(f"no readable .npz: {error}") from error


def _array(content: bytes) -> NDArray[Any]:
    """Read an .npy, whose size has to be that which its shape promises."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an .npy of another version than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or dtype.kind not in "biufU" or not dtype.itemsize:
        raise ValueError(f"an array of {dtype!s:.40}, which is not read")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"an array of shape {shape!s:.60} in {len(content)} bytes")
    values = np.frombuffer(content, dtype, offset=file.tell())
    # a copy, as bytes are read-only, which torch warns of
    return values.reshape(shape, order="F" if is_fortran else "C").copy()


def _of_another_program(arrays: Arrays) -> Scores:
    found = arrays["result" if "result" in arrays else "arr_0"]
    if found.ndim == 2 and len(found) == found.shape[1]:  # it has 0 where there is no block
        rows, columns = np.indices(found.shape)
        found = np.where(rows + columns < len(found), found, np.nan)
    return Scores(distances=[BlockDistances("", "", _matrix(found, len(found)))])


def _build(scores: Scores) -> bytes:
    """Return the header of scores: canonical JSON."""
    origin, candidates = scores.origin, scores.candidates
    assert origin is not None, "scores of another program are not written"
    header = dataclasses.asdict(origin)
    if origin.texts is not None:
        header["texts"]["mean_tokens"] = origin.texts.mean_tokens
    header |= {
        "format": FORMAT.name,
        "version": FORMAT.version,
        "model": {"source": origin.model, "fingerprint": header.pop("fingerprint")},
        "units": [
            {"module": name, "components": sorted(one.components)}
            for name, one in scores.units.items()
        ],
        "distances": [
            {"stack": one.stack, "distance": one.distance, "samples": one.samples}
            for one in scores.distances
        ],
        "orders": [dataclasses.asdict(one) for one in scores.orders],
        "trees": [dataclasses.asdict(one) for one in scores.trees],
        "constants": dict(scores.constants),
        "candidates": candidates and {
            "modules": candidates.modules,
            "entries": [entry.to_json() for entry in candidates.entries],
            "columns": sorted(candidates.columns),
        },
    }  # fmt: skip
    return canonical_json(header).encode()


def _arrays_of(scores: Scores) -> dict[str, Numbers]:
    """Name the arrays as the file does."""
    found = {f"distances/{one.stack}/{one.distance}": one.values for one in scores.distances}
    for name, one in scores.units.items():
        found[f"units/{name}/importance"] = one.importance
        found |= {f"units/{name}/{key}": values for key, values in one.components.items()}
    columns = scores.candidates.columns if scores.candidates else {}
    return found | {f"candidates/{name}": values for name, values in columns.items()}


def _parse(text: bytes, arrays: Arrays) -> Scores:
    """Read a header and the arrays that it names."""
    header = header_json(text, dict)
    if (header.get("format"), header.get("version")) != FORMAT[:2]:
        met = f"{header.get('format')!r:.40} {header.get('version')!r:.20}"
        raise FormatError(f"format {met}, this program reads {FORMAT.name} {FORMAT.version}")
    header.setdefault("constants", {})  # of files that were written before there were any
    check_types("header", header, HEADER)
    constants = header["constants"]
    are_sound = all(map(is_finite, constants.values()))
    _check(are_sound, f"constants {constants!r:.80} are no finite numbers")
    origin, candidates = _origin(header), header["candidates"]
    reader = _Tables(origin.modules, arrays)
    found = Scores(
        origin,
        dict(map(reader.units, header["units"])),
        list(map(reader.distances, header["distances"])),
        list(map(reader.order, header["orders"])),
        list(map(reader.tree, header["trees"])),
        None if candidates is None else reader.candidates(candidates),
        constants,
    )
    _check(
        found.units or found.distances or found.orders or found.trees or found.candidates,
        "there are no scores in it",
    )
    _check(len(found.units) == len(header["units"]), "units of a module are listed twice")
    _check(sorted(reader.named) == sorted(arrays), "its arrays are not those that its header names")
    return found


def _origin(header: dict[str, Any]) -> Origin:
    model, texts = header["model"], header["texts"]
    check_types("model", model, {"source": str, "fingerprint": str})
    fingerprint = model["fingerprint"]
    _check(HEX.fullmatch(fingerprint), f"fingerprint {fingerprint!r:.20} is no SHA-256")
    _check(all(type(v) is str for v in header["versions"].values()), "versions are no strings")
    modules = [record("modules", one, ModuleCost) for one in header["modules"]]
    for one in modules:
        is_sound = one.kind in KINDS and one.stack in ("encoder", "decoder") and one.units >= 0
        _check(is_sound and is_finite(one.macs_per_unit), f"module {one.name}: {one}")
    return Origin(
        *(header["method"], header["options"], model["source"], fingerprint, modules),
        *(None if texts is None else _texts(texts), header["versions"]),
    )


def _texts(value: dict[str, Any]) -> TextsRead:
    mean = value.pop("mean_tokens", None)
    found = record("texts", value, TextsRead)
    _check(HEX.fullmatch(found.sha256), f"texts, sha256 {found.sha256!r:.20} is no SHA-256")
    counts = [found.samples, *found.tokens.values()]
    _check(all(counts) and are_counts(counts), "texts: no counts above 0")
    _check(found.mean_tokens == mean, "texts: mean_tokens is not tokens by samples")
    return found


class _Tables:
    """Reads tables from their records in a header; `named` are the arrays that were read."""

    def __init__(self, modules: Sequence[ModuleCost], arrays: Arrays) -> None:
        self.modules = {module.name: module for module in modules}
        self.arrays, self.named = arrays, list[str]()
        _check(len(self.modules) == len(modules), "a module is listed twice")

    def units(self, value: Any) -> tuple[str, UnitImportance]:
        check_types("units", value, {"module": str, "components": list})
        name, components = value["module"], value["components"]
        self._known(name)
        what = f"units of {name}"
        _check_names(f"{what}: components", components, taken="importance")
        importance = self._finite(f"units/{name}/importance")
        # of a layer they are tokens, as many as pass it
        is_layer = self.modules[name].kind == "layer"
        count = importance.size if is_layer else self.modules[name].units
        found = {key: self._finite(f"units/{name}/{key}") for key in components}
        _check(
            importance.shape == (count,) and count > 0
            and all(one.ndim in (1, 2) and len(one) == count for one in found.values()),
            f"{what}: arrays are not of shape ({count},) or ({count}, K)",
        )  # fmt: skip
        return name, UnitImportance(importance, found)

    def distances(self, value: Any) -> BlockDistances:
        check_types("distances", value, {"stack": str, "distance": str, "samples": int})
        stack = value["stack"]
        layers = sum((m.kind, m.stack) == ("layer", stack) for m in self.modules.values())
        _check(value["samples"] > 0, "distances of no samples")
        values = _matrix(self._array(f"distances/{stack}/{value['distance']}"), layers)
        return BlockDistances(**value, values=values)

    def order(self, value: Any) -> Order:
        found = record("orders", value, Order)
        names = [*found.modules, *found.protected]
        self._known(*names)
        _check(found.modules and len(set(names)) == len(names), f"the order {names!r:.80}")
        _check(
            len(found.scores) == len(found.modules) and all(map(is_finite, found.scores)),
            "an order whose scores are not one finite number for each module",
        )
        return found

    def tree(self, value: Any) -> Tree:
        found = record("trees", value, Tree)
        for path in (found.root, *found.dependents):
            is_inside = any(f"{path}.".startswith(f"{name}.") for name in self.modules)
            _check(is_inside, f"a tree of {path!r:.60}, which is in no module")
        paths = [*found.dependents, *found.operations]
        _check(all(type(path) is str for path in paths), "a tree of what is no path")
        _check(
            are_counts(found.units) and found.parameters > 0 and is_finite(found.importance),
            f"tree of {found.root}: units, parameters or importance that it cannot have",
        )  # fmt: skip
        return found

    def candidates(self, value: Any) -> Candidates:
        check_types("candidates", value, dict.fromkeys(("modules", "entries", "columns"), list))
        names, columns = value["modules"], value["columns"]
        self._known(*names)
        _check(len(names) == len(value["entries"]), "candidates: not one entry for each module")
        _check_names("candidates: columns", columns)
        pairs = zip(names, value["entries"], strict=True)
        entries = [Entry.parse(entry, "candidates", name=name) for name, entry in pairs]
        found = {key: self._array(f"candidates/{key}") for key in columns}
        _check(
            all(one.shape == (len(names),) and not np.isinf(one).any() for one in found.values()),
            f"candidates: columns that are not {len(names)} numbers each",
        )
        return Candidates(names, entries, found)

    def _known(self, *names: Any) -> None:
        for name in names:
            _check(
                type(name) is str and name in self.modules,
                f"{name!r:.60} is no module of its header",
            )

    def _array(self, name: str) -> NDArray[Any]:
        self.named.append(name)
        _check(name in self.arrays, f"the array {name} is missing")
        _check(self.arrays[name].dtype == "<f8", f"the array {name} is no float64")
        return self.arrays[name]

    def _finite(self, name: str) -> Numbers:
        values = self._array(name)
        _check(np.isfinite(values).all(), f"the array {name} holds NaN or infinity")
        return values


def _matrix(values: NDArray[Any], layers: int) -> Numbers:
    """Check distances by block size and first layer, see `BlockDistances`."""
    _check(
        values.shape == (layers, layers) and layers > 0,
        f"distances of shape {values.shape}, of {layers} layers {(layers, layers)} was expected",
    )
    _check(values.dtype.kind == "f" and not np.isinf(values).any(), "distances that are infinite")
    rows, columns = np.indices(values.shape)
    _check(np.isnan(values[rows + columns >= layers]).all(), "distances where there is no block")
    return values.astype(np.float64)


def _check_names(what: str, keys: Sequence[Any], taken: str = "") -> None:
    are_names = all(type(key) is str and re.fullmatch("[a-z][a-z0-9_]*", key) for key in keys)
    _check(are_names and taken not in keys, f"{what} {keys!r:.60} are no names")


def _check(is_sound: Any, message: str) -> None:
    """Refuse what breaks a rule of docs/formats.md."""
    if not is_sound:
        raise FormatError(message)
