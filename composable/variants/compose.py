"""Dense model + variants + configuration -> composed model."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from composable import families, methods
from composable.formats import bundle
from composable.formats.bundle import Variant
from composable.formats.config import covered, merge_parts, pick, read_configurations
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.models.structure import Edit, Structure, name_after_removal, ordered, removed_layers
from composable.models.surgery import apply_masks, apply_structure
from composable.variants.fitting import check_variants, load_variants


def structure_of(variants: Iterable[Variant]) -> Structure:
    """Collect what the variants change of a model's shapes.

    Raises:
        ShapeError: two of them change one module.
    """
    return ordered(edit for variant in variants for edit in _edits(variant))


def _edits(variant: Variant) -> list[Edit]:
    if variant.kind == "layer" and variant.removed:
        first, *others = covered(variant.module, variant.entry)
        gone = [Edit(name, "remove") for name in others]
        return [Edit(first, "map" if variant.tensors else "remove"), *gone]
    if variant.removed or variant.kept_units == []:
        return [Edit(variant.module, "remove")]
    if variant.kept_units is None:
        return []
    return [Edit(variant.module, "keep", tuple(variant.kept_units))]


def compose(dense: Checkpoint, variants: list[Variant]) -> Checkpoint:
    """Put one model together.

    Args:
        dense: the dense model; its model object becomes the composed one.
        variants: at most one for every module, as `bundle.choose` picks them for a configuration.

    Returns:
        The composed model; masked weights are exactly zero, whatever the variants hold there.

    Raises:
        ShapeError: a tensor of a variant does not fit the model, or two exclude each other.
    """
    family, model = dense.family, dense.model
    holders = {module.name: module.holder for module in family.modules(model)}
    check_variants(dense, variants)
    structure = structure_of(variants)
    removed = removed_layers(structure, family)
    apply_structure(model, family, structure)
    masks = {}
    parameters = dict(model.named_parameters())
    for variant in variants:
        holder = holders.get(variant.module, variant.module)
        name = name_after_removal(holder, family, removed)
        for part, tensor in variant.tensors.items():
            target = f"{name}.{part}"
            parameters[target].data = tensor.to(parameters[target].dtype, copy=True)
            if part in variant.masks:
                masks[target] = variant.masks[part]
    apply_masks(model, masks)
    info = dict(dense.info)
    return replace(dense, model=model.eval(), structure=structure, masks=masks, info=info)


def compose_files(
    model: Path, bundles: Sequence[Path], config: Path, index: int
) -> tuple[Checkpoint, list[Variant]]:
    """Compose configuration `index`, counted from 0, of a conf.json, reading only what it needs.

    Returns:
        The composed model and its variants.

    Raises:
        UserError: files that do not belong together, a missing variant, no such configuration.
    """
    dense = checkpoint.load(model)
    dense.require_dense(model, "composing")
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    names = [method.name for method in methods.METHODS]
    wanted = pick(read_configurations(config, modules, names), index, config)
    merged = merge_parts(wanted, f"{config}[{index}]")
    readers = open_bundles(dense, bundles)
    variants = load_variants(dense, bundle.choose(readers, merged, index))
    composed = compose(dense, variants)
    facts = {"configuration": index, "bundles": [path.name for path in bundles]}
    composed.info["history"] = [*dense.info["history"], {"composed": facts}]
    return composed, variants


def open_bundles(
    dense: Checkpoint, bundles: Iterable[str | Path | bundle.Bundle]
) -> list[bundle.Reader]:
    """Open bundles that are files, or in memory.

    Raises:
        MismatchError: one was made for another model, or other texts of it.
    """
    readers = []
    for one in bundles:
        if isinstance(one, bundle.Bundle):
            reader: bundle.Reader = bundle.Held(one)
        else:
            reader = bundle.open_bundle(Path(one))
        bundle.FORMAT.check_model(reader.path, reader.fingerprint, dense.fingerprint)
        dense.require_reading(reader.path, reader.options.get("reading"))
        readers.append(reader)
    return readers


def that_fit(dense: Checkpoint, variants: Iterable[Variant]) -> list[Variant]:
    """Choose variants of different configurations that can be in one model.

    Left out are further variants of a module, blocks that have a layer in common with an earlier
    one, what would empty a stack, and what lies within another one.
    """
    layers = [m for m in dense.family.modules(dense.model) if m.kind == "layer"]
    left = Counter(module.stack for module in layers)
    stacks = {module.name: module.stack for module in layers}
    taken: set[str] = set()
    chosen: list[Variant] = []
    for variant in variants:
        names = covered(variant.module, variant.entry)
        gone = [name for name in names if name in stacks] if variant.removed else []
        empties = gone and left[stacks[gone[0]]] <= len(gone)
        if not empties and taken.isdisjoint(names):
            chosen.append(variant)
            taken.update(names)
            left.subtract(stacks[name] for name in gone)
    return [
        variant
        for variant in chosen
        if not any(families.contains(name, variant.module) for name in taken)
    ]
