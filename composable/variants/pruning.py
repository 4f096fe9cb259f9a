"""Scheme and methods -> variants: every (module, rate, method) that somebody wants, once."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from composable import methods
from composable.calibration.collect import Block, States
from composable.errors import ConfigError, UserError
from composable.families import Module
from composable.formats.bundle import PER_GROUP, WHOLE_GROUPS, Variant
from composable.formats.config import Entry, check_linear
from composable.linalg.grams import Gram
from composable.methods import Evidence, Method
from composable.methods.base import Need
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_tensors, slice_linear, unit_rows
from composable.progress import Stage

log = logging.getLogger("composable")
#: What a need is called in messages, and what helps where it is missing.
NEEDS: dict[Need, tuple[str, str]] = {
    "inputs": (
        "the statistics of its inputs",
        "measure them on calibration texts, or use a method that reads weights alone",
    ),
    "states": ("a calibration set", "name texts to fit it to"),
    "scores": ("a file of scores", "measure it with rank_importance.py"),
    "seed": ("a seed", "name one"),
}
#: Stands in an entry for a method where a module goes as a whole.
REMOVE = "remove"


@dataclass(frozen=True)
class Sources:
    """Where methods get what they need, see `methods.Evidence`; None where it was not measured.

    Attributes:
        inputs: path of a linear -> moments of its inputs in the dense model.
        states: block of layers -> moments of the states before and after it.
        scores: name of a module -> importance of its units, (units,).
        seed: name of a module -> its seed, see `methods.random.seed_of`.
    """

    inputs: Callable[[str], Gram] | None = None
    states: States | None = None
    scores: Callable[[str], Tensor] | None = None
    seed: Callable[[str], int] | None = None


def make_variants(
    dense: Checkpoint,
    scheme: dict[str, list[Entry]],
    chosen: Mapping[str, str] | None = None,
    sources: Sources | None = None,
    whole_groups: bool = False,
) -> list[Variant]:
    """Prune every module at every rate of the scheme.

    Args:
        dense: the dense model; left as it is.
        scheme: module name -> entries, as conf_prune.json has them.
        chosen: kind of module -> name of the method for plain rates; other kinds get their
            default.
        sources: what was measured for the methods that need it.
        whole_groups: with grouped queries, whole groups of heads leave, instead of equally many
            heads from every group.

    Raises:
        ConfigError: no method can prune a kind at a rate; a method cannot prune a kind.
        UserError: a method needs what was not measured.
    """
    for name in (chosen or {}).values():
        if methods.by_name(name).replaces:
            raise ConfigError(
                f"method {name}: is for entries that name it; config_generator.py writes them, "
                "with a linear map in the place of layers."
            )
    sources = sources or Sources()
    found: dict[tuple[str, Entry], Variant] = {}
    wanted = _wanted(dense, scheme, chosen)
    with Stage(wanted, "prune", unit="variants") as stage:
        for module, entry, resolved in stage:
            key = (module.name, resolved)
            if key not in found:
                make = _replace if _replaces(resolved) else _prune
                how = dataclasses.replace(module, whole_groups=whole_groups)
                found[key] = make(dense, how, resolved, sources)
            plain = {name for name, each in entry.removals.items() if each.method is None}
            found[key].plain |= plain
    return list(found.values())


def needs(
    dense: Checkpoint, scheme: dict[str, list[Entry]], chosen: Mapping[str, str] | None = None
) -> set[Need]:
    """Collect what the methods that a scheme asks for need to be measured."""
    entries = [resolved for *_, resolved in _wanted(dense, scheme, chosen)]
    names = {str(each.method) for entry in entries for each in entry.removals.values()}
    return {need for name in names - {REMOVE} for need in methods.by_name(name).needs}


def blocks_of(scheme: dict[str, list[Entry]]) -> list[Block]:
    """List the blocks of layers that a scheme replaces."""
    return [
        (name, entry.through or name)
        for name, entries in scheme.items()
        for entry in entries
        if _replaces(entry)
    ]


def maps_of(variants: Iterable[Variant]) -> dict[str, Any]:
    """Report what stands in the place of layers: the error that is left, of that of deletion."""
    found = {
        f"{variant.module} to {variant.entry.through or variant.module}": (
            variant.stats["error_after"] if variant.tensors else None
        )
        for variant in variants
        if _replaces(variant.entry)
    }
    return {"linear_maps": found} if found else {}


def head_rates_of(variants: Iterable[Variant], modules: Mapping[str, Module]) -> dict[str, Any]:
    """Report and log what rates of heads with grouped queries are rounded to."""
    found = {
        f"{variant.entry.rate:g}": round(1 - len(variant.kept_units) / units, 4)
        for variant in variants
        if variant.gqa and variant.kept_units and (units := modules[variant.module].units)
    }
    if found:
        said = ", ".join(f"{rate} is {real:g}" for rate, real in found.items())
        log.info("grouped queries: rates of heads are rounded; %s", said)
    return {"head_rates": found} if found else {}


def _replaces(entry: Entry) -> bool:
    return any(m.name == entry.method and m.replaces for m in methods.METHODS)


def _wanted(
    dense: Checkpoint, scheme: dict[str, list[Entry]], chosen: Mapping[str, str] | None
) -> list[tuple[Module, Entry, Entry]]:
    """List every entry of the scheme as it is, and with its methods filled in."""
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    return [
        (modules[name], entry, _resolve(modules[name], entry, chosen))
        for name, entries in scheme.items()
        for entry in entries
    ]


def _resolve(module: Module, entry: Entry, chosen: Mapping[str, str] | None) -> Entry:
    """Fill in the methods that plain rates leave open."""
    parts = {}
    for key, part in entry.parts.items():
        path = f"{module.holder}.{key}"
        parts[key] = Entry(part.rate, _method(path, "linear", part, chosen))
    method = _method(module.name, module.kind, entry, chosen)
    return Entry(entry.rate, method, parts, entry.through)


def _method(name: str, kind: str, entry: Entry, chosen: Mapping[str, str] | None) -> str:
    """Name the method of an entry; removal of a module is not a matter of method."""
    if kind == "linear":
        check_linear(entry, f'"{name}"')
    if entry.method is not None:
        method: Method | None = methods.by_name(entry.method)
    elif entry.rate == 1:
        return REMOVE
    else:
        method = methods.for_kind(kind, chosen)
    is_able = method is not None and kind in method.kinds
    if (entry.rate < 1 or entry.through or (method and method.replaces)) and not is_able:
        able = ", ".join(m.name for m in methods.METHODS if kind in m.kinds) or "none yet"
        named = method.name if method else None
        why = f"{named} does not prune" if named else "no method prunes"
        raise ConfigError(
            f'"{name}" at rate {entry.rate:g}: {why} modules of kind {kind} '
            f"(methods that do: {able}); use rate 0 or 1, or another method."
        )
    return method.name if method else REMOVE


def _prune(dense: Checkpoint, module: Module, entry: Entry, sources: Sources) -> Variant:
    if entry.rate == 1:
        return Variant(module.name, module.kind, entry, removed=True)
    holder = dense.model.get_submodule(module.holder)
    method = methods.by_name(str(entry.method))
    evidence = _evidence(method, module, sources)
    decision = method.prune(holder, module, entry.rate, evidence)
    kept = decision.kept_units
    variant = Variant(module.name, module.kind, entry, kept_units=kept, stats=decision.stats)
    if module.groups < module.units and module.kind == "attention":
        variant.gqa = WHOLE_GROUPS if module.whole_groups else PER_GROUP
    tensors = own_tensors(holder, module, kept) | (decision.tensors or {})
    # what a bundle holds; the dense model may be in bfloat16
    variant.tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
    if decision.mask is not None:
        _mask(variant, "weight", decision.mask)
    for key, part in entry.parts.items():
        _prune_part(variant, holder, module, key, part, sources)
    return variant


def _replace(dense: Checkpoint, module: Module, entry: Entry, sources: Sources) -> Variant:
    """Make what stands in the place of a block of layers, if anything does."""
    method = methods.by_name(str(entry.method))
    block = (module.name, entry.through or module.name)
    evidence = _evidence(method, module, sources, block)
    decision = method.prune(dense.model.get_submodule(module.name), module, 1.0, evidence)
    variant = Variant(module.name, module.kind, entry, removed=True, stats=decision.stats)
    variant.tensors = dict(decision.tensors or {})
    if not variant.tensors:
        log.info(
            '"%s" through "%s": no linear map is better than deletion on held-out texts.', *block
        )
    return variant


def _evidence(
    method: Method, module: Module, sources: Sources, block: Block | None = None
) -> Evidence:
    """Look up what a method needs to know of a module, and no more.

    Raises:
        UserError: it was not measured.
    """
    inputs = module.output_path if "inputs" in method.needs else None
    places = {"inputs": inputs, "states": block, "scores": module.name, "seed": module.name}
    found: dict[str, Any] = {}
    for need in method.needs:
        source: Any = getattr(sources, need)
        if source is None:
            what, remedy = NEEDS[need]
            raise UserError(
                f'"{module.name}": method {method.name} needs {what}, and there is none; {remedy}.'
            )
        found[need] = source(places[need])
    return Evidence(**found)


def _prune_part(
    variant: Variant, holder: nn.Module, module: Module, key: str, entry: Entry, sources: Sources
) -> None:
    """Prune one linear of a variant among what the module's units have left of it."""
    path = f"{module.holder}.{key}"
    part = Module(path, "linear", module.stack, holder=path)
    method = methods.by_name(str(entry.method))
    evidence = _evidence(method, part, sources)
    left: dict[str, Tensor] = {}
    if variant.kept_units is not None:
        ids = unit_rows(module, variant.kept_units)[key]
        left = {"columns" if key == module.output else "rows": ids}
        if key == module.output and evidence.inputs is not None:
            evidence = dataclasses.replace(evidence, inputs=evidence.inputs.columns(ids))
    dense: Any = holder.get_submodule(key)
    linear = slice_linear(dense, **left)
    for name, parameter in linear.named_parameters():  # the module's method may have changed them
        parameter.data = variant.tensors[f"{key}.{name}"].to(parameter)
    decision = method.prune(linear, part, entry.rate, evidence)
    for name, tensor in (decision.tensors or {}).items():
        variant.tensors[f"{key}.{name}"] = tensor.float().cpu()
    if decision.mask is not None:
        _mask(variant, f"{key}.weight", decision.mask)


def _mask(variant: Variant, name: str, mask: Tensor) -> None:
    variant.masks[name] = mask
    variant.tensors[name] = torch.where(mask, variant.tensors[name], 0.0)
