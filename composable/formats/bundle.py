"""Variant, and the .npy of variants: read, check, write, choose (docs/formats.md)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composable.errors import FormatError, MismatchError
from composable.files import atomic_write
from composable.formats import bitmask, bundle_header, container
from composable.formats.bundle_header import FORMAT, Description, Header, Record, Stored
from composable.formats.config import Entry


@dataclass(eq=False)
class Variant(Description):
    """One module after pruning.

    Attributes:
        tensors: by name relative to the module, float32, zero where masked.
        masks: bool, True = kept, for the masked ones among `tensors`.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether it has weights that can be fitted to its dense module's output."""
        return bool(self.tensors) and not self.removed

    @property
    def digest(self) -> str:
        """SHA-256 of what a composed model takes from this variant; equal to its record's."""
        return _describe(self).digest


@dataclass
class Bundle:
    """Variants of one dense model; `options` is a JSON object (method options, history)."""

    fingerprint: str
    variants: list[Variant]
    options: dict[str, Any] = field(default_factory=dict)


def write(path: Path, bundle: Bundle) -> None:
    """Write a bundle tensor by tensor, whole or not at all; same bundle, same bytes.

    Raises:
        FormatError: a value is not finite, or the variants break a rule of the format.
        OSError: the file cannot be written; an older one stays.
    """
    try:
        records = [_describe(variant, i) for i, variant in enumerate(bundle.variants)]
        text = bundle_header.build_header(Header(bundle.fingerprint, bundle.options, records))
        size = container.data_size(bundle_header.lay_out(records))
        bundle_header.parse_header(text, size)  # what could not be read must not be written
    except FormatError as error:
        raise FormatError(f"{path}: not written: {error}.") from error
    with atomic_write(Path(path)) as file:
        file.write(container.file_start(text, size))
        for index, tensor, suffix in bundle_header.parts_of(records):
            file.write(_encode(bundle.variants[index], tensor.name, suffix).data)


def _describe(variant: Variant, index: int = 0) -> Record:
    """Check a variant's tensors and stats, and say how they will be stored."""
    if not variant.masks.keys() <= variant.tensors.keys():
        raise FormatError(f'"{variant.module}": a mask has no tensor of the same name')
    if not all(math.isfinite(value) for value in variant.stats.values()):
        raise FormatError(f'"{variant.module}": stats {variant.stats} are not finite')
    for name, tensor in variant.tensors.items():
        _check_tensor(f'"{variant.module}", tensor "{name}"', tensor, variant.masks.get(name))
    stored = tuple(_describe_tensor(variant, name) for name in sorted(variant.tensors))
    return Record(**variant.facts(), index=index, stored=stored)


def _describe_tensor(variant: Variant, name: str) -> Stored:
    mask = variant.masks.get(name)
    kept = None if mask is None else int(mask.sum())
    described = Stored(name, tuple(variant.tensors[name].shape), kept, "")
    arrays = (_encode(variant, name, suffix) for suffix in described.parts)
    return described._replace(sha256=container.sha256(*arrays))


def _check_tensor(what: str, tensor: torch.Tensor, mask: torch.Tensor | None) -> None:
    if tensor.dtype != torch.float32:
        raise FormatError(f"{what} is {tensor.dtype}, expected torch.float32")
    if not torch.isfinite(tensor).all():
        raise FormatError(f"{what} has NaN or infinite values; try a lower learning rate")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise FormatError(f"{what}: its mask is not a bool tensor of shape {tuple(tensor.shape)}")
    if (tensor.detach() * ~mask).any():  # finite, so a product shows what is under the mask
        raise FormatError(f"{what} is not zero everywhere its mask is False")


def _encode(variant: Variant, name: str, suffix: str) -> np.ndarray:
    """Return one stored tensor as its bytes, 1-D uint8 (a view where no copy is needed)."""
    values = variant.tensors[name].detach().cpu().contiguous().numpy()
    if suffix:
        mask = variant.masks[name].cpu().numpy()
        if suffix == ".mask":
            return bitmask.pack(mask)
        values = values.reshape(-1)[np.flatnonzero(mask)]
    return values.astype("<f4", copy=False).reshape(-1).view(np.uint8)


class Reader:
    """An open bundle: all of its header is checked; tensors are read when asked for.

    Attributes:
        path, fingerprint, options: of the bundle.
        records: all variants, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        text, self._data = container.open_payload(path, FORMAT.noun)
        self.path, header = path, bundle_header.parse_header(text, len(self._data))
        self.fingerprint, self.options, self.records = header
        self._layout = bundle_header.lay_out(self.records)

    def load(self, record: Record) -> Variant:
        """Read and verify one of `records`; no other variant's bytes are touched.

        Raises:
            FormatError: its bytes are damaged.
        """
        variant = Variant(**record.facts())
        for tensor in record.stored:
            try:
                self._load_tensor(variant, record.index, tensor)
            except FormatError as error:
                what = f'tensor "{tensor.name}" of "{record.module}" is damaged ({error})'
                raise FormatError(f"{self.path}: {what}; {FORMAT.remedy}.") from error
        return variant

    def load_all(self) -> list[Variant]:
        """Read and verify every variant."""
        return [self.load(record) for record in self.records]

    def _load_tensor(self, variant: Variant, index: int, tensor: Stored) -> None:
        places = [self._layout[f"{index}/{tensor.name}{suffix}"] for suffix in tensor.parts]
        values, *packed = container.read_numbers(self._data, places, tensor.sha256, "<f4")
        if packed:
            mask = bitmask.unpack(packed[0], tensor.shape)
            if (found := np.count_nonzero(mask)) != tensor.kept:
                raise FormatError(f"{found} mask bits are set, there are {tensor.kept} values")
            variant.masks[tensor.name] = torch.from_numpy(mask)
            full = np.zeros(mask.size, np.float32)
            full[np.flatnonzero(mask)] = values  # six times as fast as by a random mask
            values = full
        else:
            values = values.astype(np.float32)  # a copy: the file must not change with it
        variant.tensors[tensor.name] = torch.from_numpy(values.reshape(tensor.shape))


def open_bundle(path: Path, fingerprint: str | None = None) -> Reader:
    """Open a bundle and check its whole header; arguments and errors as of `Format.open`."""
    return FORMAT.open(Reader, path, fingerprint)


def choose(
    readers: Sequence[Reader], configuration: dict[str, Entry], number: int | None = None
) -> list[tuple[Reader, Record]]:
    """Find the variants that answer a configuration.

    Args:
        readers: open bundles of one dense model.
        configuration: parts merged; what is untouched needs no variant.
        number: of the configuration in conf.json, for the message.

    Returns:
        One (reader, record) for every module that is pruned, itself or in a part, in the
        configuration's order.

    Raises:
        MismatchError: no variant answers an entry, or two different ones do.
    """
    return [
        _choose_one(readers, module, entry, number)
        for module, entry in configuration.items()
        if entry.removals
    ]


def _choose_one(
    readers: Sequence[Reader], module: str, wanted: Entry, number: int | None
) -> tuple[Reader, Record]:
    pairs = [(reader, r) for reader in readers for r in reader.records if r.module == module]
    found = [pair for pair in pairs if _answers(pair[1], wanted)]
    if not found:
        names = ", ".join(str(reader.path) for reader in readers)
        have = ", ".join(dict.fromkeys(_label(r, wanted) for _, r in pairs)) or "none"
        which = "the configuration" if number is None else f"configuration {number}"
        raise MismatchError(
            f'{names}: no variant of "{module}" at {wanted} (has {have}); '
            f"prune it, or change {which}."
        )
    first, *others = found
    for other in others:
        if other[1].digest != first[1].digest:
            both = " and ".join(f"{reader.path} ({r.entry})" for reader, r in (first, other))
            raise MismatchError(
                f'two different variants of "{module}" answer {wanted}: {both}; leave one bundle '
                "out, or, where the methods differ, name one in the configuration."
            )
    return first


def _answers(record: Record, wanted: Entry) -> bool:
    """Tell whether a variant may stand for an entry: the same is removed, by the right methods."""
    have, want = record.entry.removals, wanted.removals
    return have.keys() == want.keys() and all(
        have[key].rate == each.rate
        and have[key].through == each.through
        and (key in record.plain if each.method is None else have[key].method == each.method)
        for key, each in want.items()
    )


def _label(record: Record, wanted: Entry) -> str:
    """Say what a variant answers; methods only where they matter."""
    entry = record.entry
    is_plain = record.plain == entry.removals.keys()
    if is_plain and not any(each.method for each in wanted.removals.values()):
        entry = Entry(entry.rate, parts={key: Entry(p.rate) for key, p in entry.parts.items()})
    return str(entry).removeprefix("rate ")
