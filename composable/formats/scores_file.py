"""Scores of a whole model, what matters how much, as tables; scores.npz: write, read, check."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable import files
from composable.errors import ConfigError, FormatError, UserError
from composable.families.base import KINDS
from composable.files import atomic_write, canonical_json
from composable.formats.config import Entry
from composable.formats.container import (
    HEX,
    Format,
    are_counts,
    check_types,
    header_json,
    is_finite,
    record,
)  # fmt: skip
from composable.formats.sealed_file import check_sizes

log = logging.getLogger("composable")
MOST_COMPRESSED = 1 << 26  # bytes that archives of other programs, which compress, may become
FORMAT = Format(
    "composable.scores",
    "2",
    noun="a file of scores",
    made="measured on",
    remedy="make it again with rank_importance.py",
    remedy_for_model="run rank_importance.py on this one",
)
Numbers = NDArray[np.float64]
HEADER = {
    "format": str, "version": str, "method": str, "options": dict, "model": dict,
    "texts": dict | None, "modules": list, "versions": dict, "units": list, "distances": list,
    "orders": list, "trees": list, "candidates": dict | None, "constants": dict,
}  # fmt: skip
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ModuleCost:
    """A module of the measured model, see `families.Module`, and what one unit of it costs.

    Attributes:
        units: heads of an attention, neurons of an ffn, weights of a linear; a layer is one.
        macs_per_unit: multiply-accumulates for one sample of the mean length of the texts; of the
            usual lengths (`models.cost`) in a stack that no text passed.
    """

    name: str
    kind: str
    stack: str
    units: int
    macs_per_unit: float


@dataclass(frozen=True)
class TextsRead:
    """The calibration set of a measurement.

    Attributes:
        name: of the data.
        sha256: of all samples as the model sees them, see `tasks.samples.identity_of`.
        tokens: stack -> real tokens of all samples, for the stacks that they pass.
    """

    name: str
    sha256: str
    samples: int
    tokens: Mapping[str, int]

    @property
    def mean_tokens(self) -> dict[str, float]:
        """Stack -> real tokens of a sample on average."""
        return {stack: count / self.samples for stack, count in self.tokens.items()}


@dataclass(frozen=True)
class Origin:
    """What was measured, how, and on what.

    Attributes:
        method: name of the ranker.
        options: all of its options, as JSON has them.
        model: where the dense model, of which `fingerprint` and `modules` are, came from.
        texts: None for a ranker that reads none.
        versions: package -> its version.
    """

    method: str
    options: Mapping[str, Any]
    model: str
    fingerprint: str
    modules: Sequence[ModuleCost]
    texts: TextsRead | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class UnitImportance:
    """How much every unit of a module matters.

    Attributes:
        importance: (units,) float64; higher is kept.
        components: name -> what it was made of: (units,) or (units, K) float64.
    """

    importance: Numbers
    components: Mapping[str, Numbers] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BlockDistances:
    """How much every block of layers of one stack changes its input, by one distance.

    Attributes:
        stack, distance: names; "" in files of other programs.
        values: (layers, layers) float64 by block size - 1 and first layer; NaN where there is no
            block, or where it was not measured.
        samples: of the calibration set; 0 where that is not known.
    """

    stack: str
    distance: str
    values: Numbers
    samples: int = 0

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        return len(self.values)


@dataclass(frozen=True)
class Order:
    """An order in which modules leave one by one, each chosen when the ones before it had left.

    Attributes:
        modules: names, the first to go first.
        scores: of each when it was chosen; the lower, the less it mattered.
        distance: by which it was chosen; "" where by none.
        protected: names of modules that had to stay.
    """

    modules: Sequence[str]
    scores: Sequence[float]
    distance: str = ""
    protected: Sequence[str] = ()


@dataclass(frozen=True)
class Tree:
    """Weights that can only leave together.

    Attributes:
        root: the module, or the path of a linear in one, that leaves by choice.
        units: of the root that leave; () for all of it.
        dependents: paths of linears that lose rows or columns with it.
        operations: paths of what has nothing left to do, such as an activation.
        parameters: how many leave.
        importance: of all of them; higher is kept.
    """

    root: str
    units: Sequence[int]
    dependents: Sequence[str]
    operations: Sequence[str]
    parameters: int
    importance: float


@dataclass(frozen=True, eq=False)
class Candidates:
    """Variants that could be made, and what each would cost or save.

    Attributes:
        modules: name of the module of each.
        entries: of each, as conf.json has it.
        columns: name -> (candidates,) float64, such as error or macs; NaN where not measured.
    """

    modules: Sequence[str]
    entries: Sequence[Entry]
    columns: Mapping[str, Numbers]


@dataclass(frozen=True)
class Scores:
    """What a file of scores holds: where it comes from, and any of five tables.

    Attributes:
        origin: None in files of other programs.
        units: by name of the module.
        distances: every stack by every distance; the first is the main one.
        constants: numbers of the whole model that the importances were made with.
    """

    origin: Origin | None = None
    units: Mapping[str, UnitImportance] = field(default_factory=dict)
    distances: Sequence[BlockDistances] = ()
    orders: Sequence[Order] = ()
    trees: Sequence[Tree] = ()
    candidates: Candidates | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def stacks(self) -> list[str]:
        """Stacks of which there are distances of blocks."""
        return list(dict.fromkeys(one.stack for one in self.distances))

    def require_model(self, fingerprint: str, path: Path) -> None:
        """Raise MismatchError for scores of another model, which other programs' do not name."""
        if self.origin is not None:
            FORMAT.check_model(path, self.origin.fingerprint, fingerprint)

    @property
    def reading(self) -> Any:
        """What the model made of the texts, see `Checkpoint.reading`; None where it is not said."""
        return self.origin.options.get("reading") if self.origin else None

    def blocks(self, stack: str | None = None, distance: str | None = None) -> BlockDistances:
        """Return a stack's distances of blocks: of its only one, by the first, where None.

        Raises:
            UserError: there are none, or a model of two stacks leaves open which one is meant.
        """
        if not self.distances:
            method = self.origin.method if self.origin else "another program"
            raise UserError(
                f"the scores (of {method}) hold no distances of blocks of layers; measure them "
                "with rank_importance.py, method layer_distance."
            )
        if stack is None and len(self.stacks) > 1:
            raise UserError(f"the scores are of {' and '.join(self.stacks)}; name one stack.")
        here = [one for one in self.distances if one.stack in (stack or self.stacks[0], "")]
        if not here:
            raise UserError(f"no scores of the {stack}; the file has those of {self.stacks[0]}.")
        found = [one for one in here if distance in (None, one.distance)]
        if not found:
            names = ", ".join(one.distance or "one without a name" for one in here)
            raise UserError(f'no scores by "{distance}"; the file has {names}.')
        return found[0]

    def order_of_layers(self, stack: str) -> Order:
        """Return the order in which layers of a stack leave; UserError if it was not measured."""
        modules = self.origin.modules if self.origin else ()
        layers = {one.name for one in modules if (one.kind, one.stack) == ("layer", stack)}
        for one in self.orders:
            if layers.issuperset(one.modules):
                return one
        raise UserError(
            f"the scores hold no order of removal of the {stack}; measure it with "
            "rank_importance.py, option iterative."
        )

    def importance(self, module: str) -> Numbers:
        """Return the importance of a module's units, (units,); UserError if it is not measured."""
        if module in self.units:
            return self.units[module].importance
        has = f"those of {len(self.units)} modules" if self.units else "those of none"
        raise UserError(
            f'the scores hold no importance of the units of "{module}" (they have {has}); measure '
            "it with rank_importance.py, for example by the method l1."
        )


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
    try:
        arrays = _read(path)
        if "header" in arrays:
            header = arrays.pop("header")
            return _parse(header.astype(np.uint8, casting="no").tobytes(), arrays)
        if "format" in arrays:
            met = f"version {str(arrays['version'])[:20]} of the format"
            raise FormatError(f"{met}, this program reads {FORMAT.version}")
        found = _of_another_program(arrays)
    except (FormatError, ConfigError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: no file of scores ({error}); {FORMAT.remedy}.") from error
    log.warning(
        "%s: is of another program and does not say of which model; whether it is of this one "
        "cannot be checked.",
        path,
    )
    return found


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of an .npz; the checksums of the archive are compared."""
    content = io.BytesIO(files.read_bytes(path))
    check_sizes(content, most=MOST_COMPRESSED)
    try:
        with zipfile.ZipFile(content) as archive:
            names = {name: name.removesuffix(".npy") for name in archive.namelist()}
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
    _check(all(map(is_finite, constants.values())), "constants that are no finite numbers")
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
