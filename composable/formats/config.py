"""conf.json and conf_prune.json: read, check, transpose, write."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from composable import families, files
from composable.errors import ConfigError, shortened
from composable.families import Module

#: Ways to choose the layers that go, see `ranking.layer_choice.Choice`; the first is the default.
POLICIES = ("block", "singles", "deepest", "iterative")
#: What a size is a fraction of, see `models.cost.total`; the first is the default, as below.
METRICS = ("macs", "parameters", "layer-parameters")
#: Ways to divide a size among the modules, see `ranking.sizes.Allocator`.
ALLOCATIONS = ("uniform", "stat", "global")
MOST_LAYERS = 100_000  # that all blocks of one file have together
LONGEST_NAME = 1000  # characters of the path of a module
_NUMBER = re.compile("0|[1-9][0-9]{0,3}")  # of a layer, from 0


@dataclass(frozen=True)
class Entry:
    """One wanted or needed variant of a module.

    Attributes:
        rate: fraction removed, 0 (untouched) to 1 (the module is gone).
        method: that was asked for; None for a plain number.
        parts: entries of linears in the module that are pruned together with it, by their path
            from the module's holder (`o`, `output.dense`).
        through: of a layer, the last one of the block that one thing replaces.
    """

    rate: float
    method: str | None = None
    parts: Mapping[str, "Entry"] = field(default_factory=dict)
    through: str | None = None

    def __hash__(self) -> int:
        return hash((self.rate, self.method, self.through, *sorted(self.parts.items())))

    @property
    def removals(self) -> "dict[str, Entry]":
        """All that is above rate 0: the entry without its parts under "", parts by their keys."""
        own = {"": replace(self, parts={})} if self.rate > 0 else {}
        return own | dict(self.parts)

    @classmethod
    def parse(
        cls, value: Any, where: str, methods: Sequence[str] | None = None, name: str = ""
    ) -> "Entry":
        """Read a number or an object with `rate` and perhaps `method`, `parts` or `through`.

        Args:
            value: what `json` read.
            where: file and module, the beginning of every message.
            methods: names that `method` may have; None leaves them unchecked.
            name: of the module, where `through` has to be of the same stack and not before it.

        Raises:
            ConfigError: any other shape, a rate outside 0..1, an unknown key or method.
        """
        if not isinstance(value, dict):
            return cls(_parse_rate(value, where))
        known = ("rate", "method", "parts (in conf_prune.json)", "through (of a block of layers)")
        for key in value:
            if key not in [name.split()[0] for name in known]:
                old = "; prune_scheme_generator.py writes parts instead of o" if key == "o" else ""
                raise ConfigError(
                    f"{where}: unknown key {_shown(key)}; known: {', '.join(known)}{old}."
                )
        if "rate" not in value:
            raise ConfigError(f'{where}: {_shown(value)} has no "rate"; add it.')
        method = _parse_method(value["method"], where, methods) if "method" in value else None
        entry = cls(_parse_rate(value["rate"], where), method)
        if "through" in value:
            return _block(entry, value, where, name)
        parts = _parse_parts(value["parts"], where, methods) if "parts" in value else {}
        return _with_parts(entry, parts, where) if parts else entry

    def to_json(self) -> Any:
        """Return the shortest JSON value that `parse` reads as this entry."""
        rate = int(self.rate) if self.rate in (0, 1) else self.rate
        parts = {key: part.to_json() for key, part in sorted(self.parts.items())}
        more = {"method": self.method, "parts": parts or None, "through": self.through}
        given = {key: value for key, value in more.items() if value is not None}
        return {"rate": rate, **given} if given else rate

    def __str__(self) -> str:
        method = f" ({self.method})" if self.method else ""
        parts = " and ".join(f"{key} at {part}" for key, part in sorted(self.parts.items()))
        block = f" through {self.through}" if self.through else ""
        shown = _shown(Entry(self.rate).to_json())
        return f"rate {shown}{method}{parts and f' with {parts}'}{block}"


Configuration = dict[str, Entry]
Scheme = dict[str, list[Entry]]


def read_configurations(
    path: Path,
    modules: Mapping[str, Module] | None = None,
    methods: Sequence[str] | None = None,
) -> list[Configuration]:
    """Read and check conf.json.

    Args:
        path: the file, `[{module: entry, ...}, ...]`; a module and its part are two keys.
        modules: what the model has, by name; None checks only what needs no model.
        methods: known method names; None leaves them unchecked.

    Raises:
        ConfigError: the content is wrong; the message names configuration, module and value.
        FormatError: not strict JSON.
        OSError: the file cannot be read.
    """
    value = files.read_json(path)
    remedy = "run config_generator.py to make"
    if not isinstance(value, list):
        expected = f"a list of configurations was expected; {remedy} one"
        raise _unexpected(value, f"{path}: holds", expected)
    if not value:
        raise ConfigError(f"{path}: [] holds no configuration; {remedy} some.")
    found = [_parse_configuration(one, f"{path}[{i}]", methods) for i, one in enumerate(value)]
    _check_blocks(found, str(path))
    if modules is not None:
        for i, configuration in enumerate(found):
            check_configuration(configuration, modules, f"{path}[{i}]")
    return found


def parse_configuration(
    value: Any, where: str, modules: Mapping[str, Module], methods: Sequence[str]
) -> Configuration:
    """Read and check one configuration, `{module: entry, ...}`, that is no file's.

    `where` is the beginning of every message; for the rest see `read_configurations`.
    """
    configuration = _parse_configuration(value, where, methods)
    _check_blocks([configuration], where)
    check_configuration(configuration, modules, where)
    return configuration


def write_configurations(path: Path, configurations: Sequence[Configuration]) -> None:
    """Write conf.json, whole or not at all."""
    files.write_json(path, [{m: e.to_json() for m, e in one.items()} for one in configurations])


def read_scheme(
    path: Path,
    modules: Mapping[str, Module] | None = None,
    methods: Sequence[str] | None = None,
) -> Scheme:
    """Read and check conf_prune.json, `{module: [entry, ...], ...}`; `{}` where every rate was 0.

    Arguments and errors are those of `read_configurations`; rate 0 and repeated entries are wrong,
    too.
    """
    value = files.read_json(path)
    if not isinstance(value, dict):
        expected = "an object {module: [entry, ...]} was expected"
        expected += "; run prune_scheme_generator.py to make it"
        raise _unexpected(value, f"{path}: holds", expected)
    return parse_scheme(value, str(path), modules, methods)


def parse_scheme(
    value: Mapping[str, Any],
    where: str = "scheme",
    modules: Mapping[str, Module] | None = None,
    methods: Sequence[str] | None = None,
) -> Scheme:
    """Read and check a scheme, `{module: [entry, ...], ...}`; see `parse_configuration`."""
    scheme = {name: _parse_variants(name, found, where, methods) for name, found in value.items()}
    if modules is not None:
        for name, entries in scheme.items():
            for entry in entries:
                _check_kind(name, entry, modules, where)
    return scheme


def write_scheme(path: Path, scheme: Scheme) -> None:
    """Write conf_prune.json, whole or not at all."""
    files.write_json(path, {m: [e.to_json() for e in entries] for m, entries in scheme.items()})


def merge_parts(configuration: Configuration, where: str = "configuration") -> Configuration:
    """Join what is pruned together to one entry, which stands where the first of its keys stood.

    These are an attention and its output projection, both above 0, and the linears of an ffn where
    one of them goes as a whole. `where` is the beginning of every message.

    Raises:
        ConfigError: another module and a part of it are both above 0, or nothing is left of a part.
    """
    joined = _joined(configuration)
    for name, part in _overlaps(configuration):
        if part not in joined.get(name, {}):
            raise ConfigError(
                f'{where}: "{name}" ({configuration[name]}) and its part "{part}" '
                f"({configuration[part]}) are both above 0; set one of them to 0."
            )
    modules = {part: name for name, parts in joined.items() for part in parts}
    merged: Configuration = {}
    for each, entry in configuration.items():
        name = modules.get(each, each)
        if name not in joined:
            merged[name] = entry
        elif name not in merged:
            whole = configuration.get(name, Entry(0.0))
            own = whole if whole.rate > 0 else Entry(0.0)  # its method would prune nothing
            parts = {key: configuration[part] for part, key in joined[name].items()}
            merged[name] = _with_parts(own, parts, f'{where}: "{name}"')
    return merged


def _joined(configuration: Configuration) -> dict[str, dict[str, str]]:
    """Say what is pruned together: module -> name of a part -> its key."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, entry in configuration.items():
        owner = families.owner(name)
        if owner is not None and entry.rate > 0:
            found.setdefault((owner.module, owner.kind), {})[name] = owner.key
    joined = {}
    for (module, kind), parts in found.items():
        loses_units = module in configuration and configuration[module].rate > 0
        loses_parts = any(configuration[name].rate == 1 for name in parts)
        if loses_units if kind == "attention" else loses_parts and not loses_units:
            joined[module] = parts
    return joined


def scheme_of(
    configurations: Sequence[Configuration], path: Path | str = "conf.json"
) -> tuple[Scheme, int, int]:
    """Transpose configurations, read from the conf.json at `path`, into variants that must exist.

    Returns:
        The scheme (in the order of first appearance, each entry once, rate 0 left out), the number
        of variants asked for (a module with its parts counts once), and the number needed.

    Raises:
        ConfigError: a module and a part of it are both above 0.
    """
    merged = [merge_parts(one, f"{path}[{i}]") for i, one in enumerate(configurations)]
    asked = [pair for one in merged for pair in one.items() if pair[1].removals]
    needed = dict.fromkeys(asked)  # each once, in order
    scheme: Scheme = {}
    for name, entry in needed:
        scheme.setdefault(name, []).append(entry)
    return scheme, len(asked), len(needed)


def pick(configurations: Sequence[Configuration], index: int, path: Path | str) -> Configuration:
    """Return configuration `index`, counted from 0; ConfigError with the range if there is none."""
    if not 0 <= index < len(configurations):
        valid = f"0 to {len(configurations) - 1}" if len(configurations) > 1 else "0 only"
        raise ConfigError(f"{path}: no configuration {index}; -n counts from 0, here {valid}.")
    return configurations[index]


def uniform_configurations(
    modules: Sequence[Module],
    rates: Mapping[str, Sequence[float]],
    layers: Sequence[Configuration] | None = None,
) -> list[Configuration]:
    """Give all modules of a kind the same rate.

    Args:
        modules: what the model has, in the order to write.
        rates: kind -> one rate per configuration, equally many for each kind; modules of other
            kinds are not listed.
        layers: entries of the layers that go, for each configuration; what lies in them gets 0.
    """
    rows = [dict(zip(rates, row, strict=True)) for row in zip(*rates.values(), strict=True)]
    return [_uniform(modules, *both) for both in zip(rows, layers or [{}] * len(rows), strict=True)]


def _uniform(
    modules: Sequence[Module], rates: Mapping[str, float], layers: Configuration
) -> Configuration:
    """Give modules their kind's rate; where neurons go the linears of an ffn stay as they are."""
    wholes = [m.name for m in modules if m.kind == "ffn" and rates.get("ffn", 0) > 0]
    wholes += all_covered(layers)
    found = {}
    for module in modules:
        if module.kind in rates:
            is_part = any(families.contains(name, module.name) for name in wholes)
            found[module.name] = Entry(0.0 if is_part else rates[module.kind])
        if module.name in layers:
            found[module.name] = layers[module.name]
    return found


def all_covered(entries: Configuration) -> list[str]:
    """Names that all entries decide on."""
    return [each for name, entry in entries.items() for each in covered(name, entry)]


def covered(name: str, entry: Entry) -> list[str]:
    """Names that an entry decides on: of a block all its layers, else its module."""
    if entry.through is None:
        return [name]
    return [f"{name.rpartition('.')[0]}.{number}" for number in _numbers(name, entry)]


def _numbers(name: str, entry: Entry) -> range:
    """Numbers of the layers of a block in their stack."""
    first, last = (path.rpartition(".")[2] for path in (name, entry.through or name))
    return range(int(first), int(last) + 1)


def check_configuration(
    configuration: Configuration, modules: Mapping[str, Module], where: str
) -> None:
    """Check one configuration, as written in conf.json, against the modules of its model.

    Raises:
        ConfigError: an unknown name, a rate that no method makes for the module's kind, a module
            and a part of it both above 0, a stack without layers.
    """
    for name, entry in configuration.items():
        _check_kind(name, entry, modules, where)
    merge_parts(configuration, where)
    gone = all_covered({name: entry for name, entry in configuration.items() if entry.rate == 1})
    stays = _layer_counts({name: module for name, module in modules.items() if name not in gone})
    for stack, count in _layer_counts(modules).items():
        if not stays[stack]:
            problem = f"all {count} {stack} layers are at rate 1; keep at least one of them"
            raise ConfigError(f"{where}: {problem}.")


def _parse_configuration(value: Any, where: str, methods: Sequence[str] | None) -> Configuration:
    if not isinstance(value, dict):
        raise _unexpected(value, f"{where}: holds", "an object {module: rate} was expected")
    configuration = {}
    for name, given in value.items():
        _check_name(name, where)
        if isinstance(given, dict) and "parts" in given:
            parts = given["parts"] if isinstance(given["parts"], dict) else ()
            names = [name, *(families.part_path(name, part) for part in parts)]
            keys = " and ".join(f'"{each}"' for each in names)
            raise ConfigError(
                f'{where}: "{name}": {_shown(given)} has "parts", which only conf_prune.json has; '
                f"write one key for each, {keys}."
            )
        configuration[name] = Entry.parse(given, f'{where}: "{name}"', methods, name)
    return configuration


def _check_blocks(configurations: Sequence[Configuration], where: str) -> None:
    """Bound what is made of a few bytes: the layers of blocks."""
    pairs = (pair for one in configurations for pair in one.items())
    count = sum(len(_numbers(*pair)) for pair in pairs if pair[1].through is not None)
    if count > MOST_LAYERS:
        problem = f"its blocks are {count} layers, at most {MOST_LAYERS} were expected"
        raise ConfigError(f"{where}: {problem}; check the numbers of the layers.")


def _parse_variants(
    name: str, value: Any, place: str, methods: Sequence[str] | None
) -> list[Entry]:
    _check_name(name, place)
    if not isinstance(value, list) or not value:
        expected = "a list of rates was expected; list the rates, or leave the module out"
        raise _unexpected(value, f'{place}: "{name}" holds', expected)
    entries: dict[Entry, None] = {}
    for i, given in enumerate(value):
        where = f'{place}: "{name}"[{i}]'
        entry = Entry.parse(given, where, methods, name)
        if not entry.removals:
            problem = "has rate 0, which needs no variant; leave it out"
            raise ConfigError(f"{where}: {_shown(given)} {problem}.")
        if entry in entries:
            raise ConfigError(f"{where}: {entry} occurs twice; keep one of them.")
        entries[entry] = None
    return list(entries)


def _parse_rate(value: Any, where: str) -> float:
    # Written so that NaN fails, and before float(), which cannot take every int.
    if type(value) not in (int, float) or not 0 <= value <= 1:
        problem = "is not a number from 0 to 1; write the fraction to remove"
        raise ConfigError(f"{where}: rate {_shown(value)} {problem}.")
    return abs(float(value))


def _parse_method(value: Any, where: str, methods: Sequence[str] | None) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{where}: method {_shown(value)} is not a name; write it as a string.")
    if methods is not None and value not in methods:
        raise ConfigError(f"{where}: unknown method {_shown(value)}; known: {', '.join(methods)}.")
    return value


def _parse_parts(value: Any, where: str, methods: Sequence[str] | None) -> dict[str, Entry]:
    if not isinstance(value, dict) or not value:
        raise _unexpected(value, f'{where}: "parts" is', "an object {part: entry} was expected")
    parts = {}
    for key, given in value.items():
        _check_name(key, f'{where}, "parts"')
        for inner in ("parts", "through"):
            if isinstance(given, dict) and inner in given:
                raise ConfigError(
                    f'{where}: "{inner}" inside "parts" ({_shown(value)}); a part has a rate and, '
                    "if wanted, a method."
                )
        parts[key] = Entry.parse(given, f'{where}, part "{key}"', methods)
    return parts


def _with_parts(whole: Entry, parts: Mapping[str, Entry], where: str) -> Entry:
    """Join an entry and those of its module's parts, by the rules that need no model."""
    for key, part in parts.items():
        place = f'{where}, part "{key}"'
        if part.rate == 0:
            raise ConfigError(f"{place}: {part} needs no variant; leave the part out.")
        if whole.rate == 1:
            raise ConfigError(
                f"{place}: the module is removed whole (rate 1), so nothing is left of its part "
                f"({part}); set one of them to 0."
            )
        if whole.rate > 0:
            check_linear(part, place)
    if whole.rate == 0 and whole.method is not None:
        raise ConfigError(f"{where}: {whole} has a method and prunes nothing; leave it out.")
    if whole.rate == 0 and all(part.rate < 1 for part in parts.values()):
        raise ConfigError(
            f"{where}: {replace(whole, parts=parts)}; the module keeps all its units, so write the "
            "entry of a part under the part's own name."
        )
    return replace(whole, parts=parts)


def _check_name(name: str, where: str) -> None:
    if not name or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ConfigError(f"{where}: {_shown(name)} is not the path of a module.")


def _unexpected(value: Any, place: str, expected: str) -> ConfigError:
    return ConfigError(f"{place} {_shown(value)}, {expected}.")


def _find_module(name: str, modules: Mapping[str, Module], where: str) -> Module:
    if name in modules:
        return modules[name]
    layers = " and ".join(f"{count} {stack}" for stack, count in _layer_counts(modules).items())
    nearest = difflib.get_close_matches(name, modules, n=1, cutoff=0)
    has = "; nearest: ".join([f"{layers} layers", *nearest])
    raise ConfigError(
        f'{where}: no module "{name}" in this model ({has}); '
        "run config_generator.py -m model.pth for the names."
    )


def _check_kind(name: str, entry: Entry, modules: Mapping[str, Module], where: str) -> None:
    """Refuse what no method makes (yet) of this kind of module."""
    module, place = _find_module(name, modules, where), f'{where}: "{name}"'
    if module.kind == "layer":
        if entry.rate not in (0, 1):
            raise ConfigError(f"{place}: no method prunes a layer at {entry} yet; known: 0 and 1.")
        for each in covered(name, entry):
            _find_module(each, modules, where)
    elif entry.through is not None:
        problem = 'but only a layer begins a block; remove the "through"'
        raise ConfigError(f"{place}: {entry}, {problem}.")
    if module.kind == "linear":
        check_linear(entry, place)
    for key, part in entry.parts.items():
        if key not in module.linears:
            raise ConfigError(
                f'{place}: {entry}, but this {module.kind} has no part "{key}" to prune (has '
                f"{', '.join(module.linears) or 'none'}); name one that it has."
            )
        check_linear(part, f'{place}, part "{key}"')
    if entry.parts and module.kind == "ffn":
        problem = "but neurons and weights of an ffn cannot both be pruned; set one of them to 0"
        raise ConfigError(f"{place}: {entry}, {problem}.")


def check_linear(entry: Entry, place: str) -> None:
    """Raise ConfigError for a linear at rate 1, as nothing can stand in its place yet."""
    if entry.rate == 1:
        problem = "a linear cannot be removed whole (rate 1) yet; choose a rate below 1"
        raise ConfigError(f"{place}: {problem}.")


def _block(entry: Entry, value: dict[str, Any], where: str, name: str) -> Entry:
    """Read the rest of an entry with "through": the block ends in the list it begins in."""
    through = value["through"]
    if not isinstance(through, str) or not _NUMBER.fullmatch(through.rpartition(".")[2]):
        raise ConfigError(f'{where}: "through" is {_shown(through)}; write the path of a layer.')
    if entry.rate != 1 or entry.method is None or "parts" in value:
        raise ConfigError(
            f'{where}: {_shown(value)} replaces a block of layers; write "rate": 1 and the '
            '"method" that does so.'
        )
    (path, _, first), (other, _, last) = (it.rpartition(".") for it in (name or through, through))
    if path != other or not _NUMBER.fullmatch(first) or int(last) < int(first):
        raise ConfigError(
            f'{where}: a block from "{name}" through "{through}"; expected a layer and itself or '
            "a later one of the same stack."
        )
    return replace(entry, through=through)


def _overlaps(configuration: Configuration) -> Iterator[tuple[str, str]]:
    """Yield every (module, part of it) of which both are above rate 0."""
    owners: dict[str, list[str]] = {}  # of a layer in a block: the entry of the block's first one
    wanted = {name: entry for name, entry in configuration.items() if entry.rate > 0}
    for name, entry in wanted.items():
        for each in covered(name, entry):
            owners.setdefault(each, []).append(name)
    for part in wanted:
        words = part.split(".")
        names = [".".join(words[:end]) for end in range(1, len(words) + 1)]
        # an ffn may be named after its layer while its linears lie in the layer itself
        if (owner := families.owner(part)) is not None and owner.module not in names:
            names.append(owner.module)
        for name in names:
            yield from ((first, part) for first in owners.get(name, ()) if first != part)


def _layer_counts(modules: Mapping[str, Module]) -> Counter[str]:
    return Counter(module.stack for module in modules.values() if module.kind == "layer")


def _shown(value: Any) -> str:
    """Show a JSON value in a message, cut short where it is long."""
    return shortened(json.dumps(value, default=repr), 60)
