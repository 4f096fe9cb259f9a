"""Scheme and methods -> variants: every (module, rate, method) that somebody wants, once."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from composable import cli, methods
from composable.bundle import Variant
from composable.bundle_header import PER_GROUP, WHOLE_GROUPS
from composable.checkpoint import Checkpoint
from composable.config import Entry
from composable.errors import ConfigError, UserError
from composable.families import Module
from composable.methods import Method
from composable.solver import Gram, Regression
from composable.surgery import own_tensors, slice_linear, unit_rows

#: Path of a linear -> statistics of its inputs in the dense model.
Inputs = Callable[[str], Gram]
#: First and last layer of a block, and its moments on the calibration and on held-out texts.
Block = tuple[str, str]
States = Callable[[Block], tuple[Regression, Regression]]
log = logging.getLogger("composable")


def make_variants(
    dense: Checkpoint,
    scheme: dict[str, list[Entry]],
    preferred: tuple[str, ...] = (),
    inputs: Inputs | None = None,
    by_groups: bool = False,
    states: States | None = None,
) -> list[Variant]:
    """Prune every module at every rate of the scheme.

    Args:
        dense: the dense model; left as it is.
        scheme: module name -> entries, as conf_prune.json has them.
        preferred: methods for plain rates; other kinds get their default.
        inputs: statistics for the methods that look at the inputs of a module.
        by_groups: with grouped queries, whole groups of heads leave, instead of equally many heads
            from every group.
        states: moments for the methods that replace a block of layers.

    Raises:
        ConfigError: no method can prune a kind at a rate; a method cannot prune a kind.
        UserError: a method needs statistics, and there are none.
    """
    _check_preferred(preferred)
    found: dict[tuple[str, Entry], Variant] = {}
    wanted = _wanted(dense, scheme, preferred)
    bar = tqdm(wanted, "prune", unit="variant", disable=not cli.shows_progress())
    for module, entry, resolved in bar:
        variant = found.get((module.name, resolved))
        if variant is None:
            chosen = dataclasses.replace(module, by_groups=by_groups)
            variant = (
                _replace(dense, module, resolved, states)
                if _replaces(resolved)
                else _prune(dense, chosen, resolved, inputs)
            )
            found[module.name, resolved] = variant
        variant.plain |= entry.method is None
        variant.plain_o |= entry.o is not None and entry.o.method is None
    return list(found.values())


def uses_inputs(
    dense: Checkpoint, scheme: dict[str, list[Entry]], preferred: tuple[str, ...] = ()
) -> bool:
    """Tell whether a method that the scheme asks for looks at the inputs of a module."""
    entries = [resolved for *_, resolved in _wanted(dense, scheme, preferred)]
    parts = [part for entry in entries for part in (entry, entry.o) if part and part.rate < 1]
    return any(methods.by_name(str(part.method)).uses_inputs for part in parts)


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


def _replaces(entry: Entry) -> bool:
    return any(m.name == entry.method and m.uses_states for m in methods.METHODS)


def _check_preferred(preferred: Iterable[str]) -> None:
    for name in preferred:
        if methods.by_name(name).uses_states:
            raise ConfigError(
                f"--method {name}: is for entries that name it; config_generator.py --linear-map "
                "writes them."
            )


def _wanted(
    dense: Checkpoint, scheme: dict[str, list[Entry]], preferred: tuple[str, ...]
) -> list[tuple[Module, Entry, Entry]]:
    """List every entry of the scheme as it is, and with its methods filled in."""
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    return [
        (modules[name], entry, _resolve(modules[name], entry, preferred))
        for name, entries in scheme.items()
        for entry in entries
    ]


def _resolve(module: Module, entry: Entry, preferred: Iterable[str]) -> Entry:
    """Fill in the methods that plain rates leave open."""
    method = _method(module.name, module.kind, entry, tuple(preferred))
    o = entry.o
    if o is not None:
        o_method = _method(module.output_path, "linear", o, tuple(preferred))
        o = Entry(o.rate, o_method)
    return Entry(entry.rate, method, o, entry.through)


def _method(name: str, kind: str, entry: Entry, preferred: tuple[str, ...]) -> str:
    """Name the method of an entry; removal of a module is not a matter of method."""
    if entry.method is not None:
        chosen: Method | None = methods.by_name(entry.method)
    elif entry.rate == 1:
        return "remove"
    else:
        chosen = methods.for_kind(kind, preferred)
    is_able = chosen is not None and kind in chosen.kinds
    if (entry.rate < 1 or entry.through or (chosen and chosen.uses_states)) and not is_able:
        able = ", ".join(m.name for m in methods.METHODS if kind in m.kinds) or "none yet"
        why = f"{entry.method} does not prune" if entry.method else "no method prunes"
        raise ConfigError(
            f'"{name}" at rate {entry.rate:g}: {why} modules of kind {kind} '
            f"(methods that do: {able}); use rate 0 or 1, or another method."
        )
    return chosen.name if chosen else "remove"


def _prune(dense: Checkpoint, module: Module, entry: Entry, inputs: Inputs | None) -> Variant:
    if entry.rate == 1:
        return Variant(module.name, module.kind, entry, plain=False, removed=True)
    holder = dense.model.get_submodule(module.holder)
    method = methods.by_name(str(entry.method))
    decision = method.prune(holder, module, entry.rate, _inputs_for(method, module, inputs))
    kept = decision.kept_units
    variant = Variant(module.name, module.kind, entry, plain=False, kept_units=kept)
    if module.groups < module.units and module.kind == "attention":
        variant.gqa = WHOLE_GROUPS if module.by_groups else PER_GROUP
    tensors = own_tensors(holder, module, kept) | (decision.tensors or {})
    # what a bundle holds; the dense model may be in bfloat16
    variant.tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
    if decision.mask is not None:
        _mask(variant, "weight", decision.mask)
    if entry.o is not None:
        _mask_output(variant, holder, module, entry.o, inputs)
    return variant


def _replace(dense: Checkpoint, module: Module, entry: Entry, states: States | None) -> Variant:
    """Make what stands in the place of a block of layers, if anything does."""
    if states is None:
        raise UserError(f"{entry.method} needs a calibration set; give --calibration-data.")
    method = methods.by_name(str(entry.method))
    block = (module.name, entry.through or module.name)
    decision = method.prune(dense.model.get_submodule(module.name), module, 1.0, states(block))
    variant = Variant(module.name, module.kind, entry, plain=False, removed=True)
    variant.tensors, variant.stats = dict(decision.tensors or {}), decision.stats
    if not variant.tensors:
        log.info(
            '"%s" through "%s": no linear map is better than deletion on held-out texts.', *block
        )
    return variant


def _inputs_for(method: Method, module: Module, inputs: Inputs | None) -> Gram | None:
    """Look up what a method wants to see: what enters the linear that all units flow into."""
    return inputs(module.output_path) if inputs is not None and method.uses_inputs else None


def _mask_output(
    variant: Variant, holder: nn.Module, module: Module, entry: Entry, inputs: Inputs | None
) -> None:
    """Mask the output projection among the columns of the heads that stayed."""
    path = module.output_path
    o = Module(path, "linear", module.stack, holder=path)
    method = methods.by_name(str(entry.method))
    linear: Any = holder.get_submodule(module.output)
    seen = _inputs_for(method, o, inputs)
    if variant.kept_units is not None:
        columns = unit_rows(module, variant.kept_units)["o"]
        linear = slice_linear(linear, columns=columns)
        seen = seen and seen.columns(columns)
    decision = method.prune(linear, o, entry.rate, seen)
    for name, tensor in (decision.tensors or {}).items():
        variant.tensors[f"{module.output}.{name}"] = tensor.float().cpu()
    if decision.mask is not None:
        _mask(variant, f"{module.output}.weight", decision.mask)


def _mask(variant: Variant, name: str, mask: Tensor) -> None:
    variant.masks[name] = mask
    variant.tensors[name] = torch.where(mask, variant.tensors[name], 0.0)
