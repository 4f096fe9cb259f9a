"""What the header of scores.npz says of its tables: build, parse, check."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable.errors import FormatError
from composable.families.base import KINDS
from composable.files import canonical_json
from composable.formats.config import Entry
from composable.formats.container import check_types, header_json
from composable.formats.scores import (
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

FORMAT, VERSION = "composable.scores", "2"
_HEADER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("format", "version", "method"), (str,)),
    **dict.fromkeys(("options", "model", "versions"), (dict,)),
    **dict.fromkeys(("modules", "distances", "units", "orders", "trees"), (list,)),
    **dict.fromkeys(("texts", "candidates"), (dict, type(None))),
}
_Types = dict[str, tuple[type, ...]]
_MODEL: _Types = {"source": (str,), "fingerprint": (str,)}
_MODULE: _Types = {
    **dict.fromkeys(("name", "kind", "stack"), (str,)),
    **{"units": (int,), "macs_per_unit": (float, int)},
}
_TEXTS: _Types = {
    **dict.fromkeys(("name", "sha256"), (str,)),
    **{"samples": (int,), "tokens": (dict,), "mean_tokens": (dict,)},
}
_DISTANCES: _Types = {"stack": (str,), "distance": (str,), "samples": (int,)}
_UNITS: _Types = {"module": (str,), "components": (list,)}
_ORDER: _Types = {
    **dict.fromkeys(("modules", "scores", "protected"), (list,)),
    **{"distance": (str,)},
}
_TREE: _Types = {
    **{"root": (str,), "parameters": (int,), "importance": (float, int)},
    **dict.fromkeys(("units", "dependents", "operations"), (list,)),
}
_CANDIDATES: _Types = dict.fromkeys(("modules", "entries", "columns"), (list,))
Arrays = Mapping[str, NDArray[Any]]
_NAME = "[a-z][a-z0-9_]*"


def build(scores: Scores) -> bytes:
    """Return the header of scores: canonical JSON."""
    origin, candidates = scores.origin, scores.candidates
    assert origin is not None, "scores of another program are not written"
    texts = origin.texts and {
        **dataclasses.asdict(origin.texts), "mean_tokens": origin.texts.mean_tokens
    }  # fmt: skip
    header = {
        "format": FORMAT,
        "version": VERSION,
        "method": origin.method,
        "options": origin.options,
        "model": {"source": origin.model, "fingerprint": origin.fingerprint},
        "texts": texts,
        "modules": [dataclasses.asdict(module) for module in origin.modules],
        "versions": origin.versions,
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
        "candidates": candidates and {
            "modules": candidates.modules,
            "entries": [entry.to_json() for entry in candidates.entries],
            "columns": sorted(candidates.columns),
        },
    }  # fmt: skip
    return canonical_json(header).encode()


def arrays_of(scores: Scores) -> dict[str, Numbers]:
    """Name the arrays as the file does."""
    found = {f"distances/{one.stack}/{one.distance}": one.values for one in scores.distances}
    for name, one in scores.units.items():
        found[f"units/{name}/importance"] = one.importance
        found |= {f"units/{name}/{key}": values for key, values in one.components.items()}
    columns = scores.candidates.columns if scores.candidates else {}
    return found | {f"candidates/{name}": values for name, values in columns.items()}


def parse(text: bytes, arrays: Arrays) -> Scores:
    """Read a header and the arrays that it names.

    Raises:
        FormatError: another format or version, or a rule of docs/formats.md is broken.
        ConfigError: an entry of a candidate is none.
    """
    header = header_json(text, dict)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        met = f"{header.get('format')!r:.40} {header.get('version')!r:.20}"
        raise FormatError(f"format {met}, this program reads {FORMAT} {VERSION}")
    check_types("header", header, _HEADER)
    origin = _origin(header)
    modules = {module.name: module for module in origin.modules}
    _check(len(modules) == len(origin.modules), "a module is listed twice")
    found = Scores(
        origin,
        {record["module"]: _units(record, modules, arrays)
         for record in _records("units", header["units"], _UNITS)},
        [_distances(record, modules, arrays)
         for record in _records("distances", header["distances"], _DISTANCES)],
        [_order(record, modules) for record in _records("orders", header["orders"], _ORDER)],
        [_tree(record, modules) for record in _records("trees", header["trees"], _TREE)],
        header["candidates"] and _candidates(header["candidates"], modules, arrays),
    )  # fmt: skip
    is_empty = not (found.units or found.distances or found.orders or found.trees)
    _check(not is_empty or found.candidates, "there are no scores in it")
    _check(len(found.units) == len(header["units"]), "units of a module are listed twice")
    names = arrays_of(found)
    _check(
        names.keys() == arrays.keys() and len(names) == _count(header),
        "its arrays are not those that its header names",
    )
    return found


def _count(header: Mapping[str, Any]) -> int:
    """Count the arrays that a header names."""
    units = sum(1 + len(record["components"]) for record in header["units"])
    columns = len(header["candidates"]["columns"]) if header["candidates"] else 0
    return len(header["distances"]) + units + columns


def _origin(header: dict[str, Any]) -> Origin:
    model, texts = header["model"], header["texts"]
    check_types("model", model, _MODEL)
    _check_digest("fingerprint", model["fingerprint"])
    _check(all(type(v) is str for v in header["versions"].values()), "versions are no strings")
    modules = [ModuleCost(**one) for one in _records("modules", header["modules"], _MODULE)]
    for one in modules:
        is_sound = one.kind in KINDS and one.stack in ("encoder", "decoder") and one.units >= 0
        _check(is_sound and _is_finite(one.macs_per_unit), f"module {one.name}: {one}")
    return Origin(
        *(header["method"], header["options"], model["source"], model["fingerprint"], modules),
        *(texts if texts is None else _texts(texts), header["versions"]),
    )


def _texts(record: dict[str, Any]) -> TextsRead:
    check_types("texts", record, _TEXTS)
    _check_digest("texts, sha256", record["sha256"])
    counts = [record["samples"], *record["tokens"].values()]
    _check(all(type(n) is int and n > 0 for n in counts), "texts: no counts above 0")
    mean = record.pop("mean_tokens")
    found = TextsRead(**record)
    _check(found.mean_tokens == mean, "texts: mean_tokens is not tokens by samples")
    return found


def _units(
    record: dict[str, Any], modules: Mapping[str, ModuleCost], arrays: Arrays
) -> UnitImportance:
    name, components = record["module"], record["components"]
    module = _known(name, modules)
    _check(
        all(type(key) is str and re.fullmatch(_NAME, key) for key in components)
        and "importance" not in components,
        f"units of {name}: components {components!r:.60} are no names",
    )
    importance = _finite(arrays, f"units/{name}/importance")
    # of a layer they are tokens, as many as pass it
    count = len(importance) if module.kind == "layer" and importance.ndim else module.units
    found = {key: _finite(arrays, f"units/{name}/{key}") for key in components}
    _check(
        importance.shape == (count,) and count > 0
        and all(one.ndim in (1, 2) and len(one) == count for one in found.values()),
        f"units of {name}: arrays are not of shape ({count},) or ({count}, K)",
    )  # fmt: skip
    return UnitImportance(importance, found)


def _distances(
    record: dict[str, Any], modules: Mapping[str, ModuleCost], arrays: Arrays
) -> BlockDistances:
    stack = record["stack"]
    layers = sum((one.kind, one.stack) == ("layer", stack) for one in modules.values())
    _check(record["samples"] > 0, "distances of no samples")
    values = matrix(_array(arrays, f"distances/{stack}/{record['distance']}"), layers)
    return BlockDistances(stack, record["distance"], values, record["samples"])


def matrix(values: NDArray[Any], layers: int) -> Numbers:
    """Check distances by block size and first layer, see `BlockDistances`."""
    _check(
        values.shape == (layers, layers) and layers > 0,
        f"distances of shape {values.shape}, of {layers} layers {(layers, layers)} was expected",
    )
    _check(values.dtype.kind == "f" and not np.isinf(values).any(), "distances that are infinite")
    rows, columns = np.indices(values.shape)
    _check(np.isnan(values[rows + columns >= layers]).all(), "distances where there is no block")
    return values.astype(np.float64)


def _order(record: dict[str, Any], modules: Mapping[str, ModuleCost]) -> Order:
    found = Order(**record)
    for name in (*found.modules, *found.protected):
        _known(name, modules)
    names = [*found.modules, *found.protected]
    _check(bool(found.modules) and len(set(names)) == len(names), f"the order {names!r:.80}")
    _check(
        len(found.scores) == len(found.modules) and all(map(_is_finite, found.scores)),
        "an order whose scores are not one finite number for each module",
    )
    return found


def _tree(record: dict[str, Any], modules: Mapping[str, ModuleCost]) -> Tree:
    found = Tree(**record)
    for path in (found.root, *found.dependents):
        is_part = type(path) is str and any(path.startswith(f"{name}.") for name in modules)
        _check(is_part or path in modules, f"a tree of {path!r:.60}, which is in no module")
    _check(all(type(path) is str for path in found.operations), "operations that are no paths")
    _check(
        all(type(unit) is int and unit >= 0 for unit in found.units) and found.parameters > 0
        and _is_finite(found.importance),
        f"tree of {found.root}: units, parameters or importance are no numbers that it can have",
    )  # fmt: skip
    return found


def _candidates(
    record: dict[str, Any], modules: Mapping[str, ModuleCost], arrays: Arrays
) -> Candidates:
    check_types("candidates", record, _CANDIDATES)
    names, columns = record["modules"], record["columns"]
    for name in names:
        _known(name, modules)
    _check(len(names) == len(record["entries"]), "candidates: not one entry for each module")
    _check(
        all(type(key) is str and re.fullmatch(_NAME, key) for key in columns),
        f"candidates: columns {columns!r:.60} are no names",
    )
    entries = [Entry.parse(value, "candidates") for value in record["entries"]]
    found = {key: _array(arrays, f"candidates/{key}").astype(np.float64) for key in columns}
    _check(
        all(one.shape == (len(names),) and not np.isinf(one).any() for one in found.values()),
        f"candidates: columns that are not {len(names)} numbers each",
    )
    return Candidates(names, entries, found)


def _records(what: str, values: list[Any], types: _Types) -> Iterator[dict[str, Any]]:
    for value in values:
        check_types(what, value, types)
        yield value


def _known(name: Any, modules: Mapping[str, ModuleCost]) -> ModuleCost:
    if not isinstance(name, str) or name not in modules:
        raise FormatError(f"{name!r:.60} is no module of its header")
    return modules[name]


def _array(arrays: Arrays, name: str) -> NDArray[Any]:
    if name not in arrays:
        raise FormatError(f"the array {name} is missing")
    _check(arrays[name].dtype == "<f8", f"the array {name} is no float64")
    return arrays[name]


def _finite(arrays: Arrays, name: str) -> Numbers:
    values = _array(arrays, name)
    _check(np.isfinite(values).all(), f"the array {name} holds NaN or infinity")
    return values


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_digest(what: str, value: str) -> None:
    _check(re.fullmatch("[0-9a-f]{64}", value) is not None, f"{what} {value!r:.20} is no SHA-256")


def _check(is_sound: Any, message: str) -> None:
    """Refuse what breaks a rule of docs/formats.md."""
    if not is_sound:
        raise FormatError(message)
