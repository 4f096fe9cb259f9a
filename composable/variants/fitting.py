"""Whether a variant fits the dense model: its units, and the shapes of all its tensors."""

from collections.abc import Iterable, Mapping

from composable.errors import MismatchError, ShapeError
from composable.families import Module
from composable.formats.bundle import Description, Reader, Record, Variant
from composable.formats.config import covered
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_shapes
from composable.progress import MOMENT, Stage

Shapes = Mapping[str, tuple[int, ...]]


def load_variants(dense: Checkpoint, chosen: Iterable[tuple[Reader, Record]]) -> list[Variant]:
    """Read variants for a dense model; none of which the header shows that it does not fit.

    Raises:
        MismatchError: one does not fit.
        FormatError: its bytes are damaged.
    """
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    found = []
    for reader, record in Stage(list(chosen), "read variants", unit="variants", delay=MOMENT):
        try:
            check(record, {each.name: each.shape for each in record.stored}, dense, modules)
        except ShapeError as error:
            raise MismatchError(f"{reader.path}: {error}") from error
        found.append(reader.load(record))
    return found


def check_variants(dense: Checkpoint, variants: Iterable[Variant]) -> None:
    """Raise ShapeError where one of `variants` does not fit the dense model."""
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    for variant in variants:
        shapes = {name: tuple(tensor.shape) for name, tensor in variant.tensors.items()}
        check(variant, shapes, dense, modules)


def check(
    variant: Description, shapes: Shapes, dense: Checkpoint, modules: Mapping[str, Module]
) -> None:
    """Compare a variant with its dense module.

    Args:
        variant: what is known of it.
        shapes: of its tensors, by name.
        dense: the dense model.
        modules: of the model, by name.

    Raises:
        ShapeError: it is of another kind of module, keeps units that there are not or none at all,
            or its tensors are not those of the module with these units.
    """
    module = modules.get(variant.module)
    if module is None or module.kind != variant.kind:
        has = "none of this name" if module is None else f"one of kind {module.kind}"
        raise _misfit(variant, f"is of kind {variant.kind}, the model has {has}")
    missing = [name for name in covered(variant.module, variant.entry) if name not in modules]
    if missing:
        raise _misfit(variant, f'stands for "{missing[0]}", which the model does not have')
    for key in variant.entry.parts:
        if key not in module.linears:
            has = ", ".join(module.linears) or "none"
            raise _misfit(variant, f'has the part "{key}", the module has {has}')
    expected = _expected(variant, shapes, dense, module)
    for name in sorted({*shapes, *expected}):
        met, wanted = shapes.get(name, "nothing"), expected.get(name, "nothing")
        if met != wanted:
            raise _misfit(variant, f"holds {name} of shape {met}, the model has {wanted} there")


def _expected(
    variant: Description, shapes: Shapes, dense: Checkpoint, module: Module
) -> dict[str, tuple[int, ...]]:
    """Say which tensors the variant has to have; check what says so."""
    kept = variant.kept_units
    if module.kind == "layer":
        if not variant.removed or kept:
            raise _misfit(variant, "is a layer that is not removed")
        width = int(dense.model.config.hidden_size)
        return {"weight": (width, width), "bias": (width,)} if shapes else {}
    if variant.removed:
        if module.kind == "linear":
            raise _misfit(variant, "is a linear that is removed whole")
        return {}
    loses_units = module.kind != "linear" and variant.entry.rate > 0
    if loses_units != bool(kept) or (kept is not None and not loses_units):
        raise _misfit(variant, f"keeps units {kept!s:.60} at {variant.entry}")
    return own_shapes(dense.model.get_submodule(module.holder), module, kept)


def _misfit(variant: Description, problem: str) -> ShapeError:
    return ShapeError(f'variant of "{variant.module}" {problem}; prune this model again.')
