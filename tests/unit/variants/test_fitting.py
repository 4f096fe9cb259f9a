"""Bundles with right seals whose variants do not fit the dense model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from composable.errors import MismatchError, ShapeError
from composable.formats import bundle
from composable.formats.bundle import Bundle, Variant, open_bundle
from composable.formats.config import Entry
from composable.models.checkpoint import Checkpoint
from composable.variants.compose import compose
from composable.variants.fitting import load_variants
from composable.variants.pruning import make_variants
from tests import tiny

HEADS, OTHER = "encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention"
FFN, LINEAR = "encoder.block.1.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense.wo"
LAYER = "decoder.block.0"
SCHEME = {
    HEADS: [Entry(0.5)],
    OTHER: [Entry(0.25, None, {"o": Entry(0.3)})],
    FFN: [Entry(0.5)],
    LINEAR: [Entry(0.5)],
}


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    return tiny.checkpoint()


@pytest.fixture(scope="module")
def sound(dense: Checkpoint) -> dict[str, Variant]:
    """A variant of every kind of module."""
    variants = make_variants(dense, SCHEME, tiny.BY_WEIGHTS)
    made = [*variants, Variant(LAYER, "layer", Entry(1.0, "remove"), removed=True)]
    return {variant.module: variant for variant in made}


def loaded(folder: Path, dense: Checkpoint, *variants: Variant) -> list[Variant]:
    """Write a bundle with right seals, and read it for the dense model."""
    bundle.write(folder / "b.npy", Bundle(dense.fingerprint, list(variants)))
    reader = open_bundle(folder / "b.npy", dense.fingerprint)
    return load_variants(dense, [(reader, record) for record in reader.records])


def test_sound_ones_are_read(dense: Checkpoint, sound: dict[str, Variant], tmp_path: Path) -> None:
    found = loaded(tmp_path, dense, *sound.values())
    assert [variant.digest for variant in found] == [one.digest for one in sound.values()]


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any], **facts: Any) -> Any:
    def changed(variant: Variant) -> Variant:
        tensors = dict(variant.tensors)
        change(tensors)
        masks = {
            name: torch.ones_like(tensors[name], dtype=torch.bool)
            for name in variant.masks if name in tensors
        }  # fmt: skip
        return dataclasses.replace(variant, tensors=tensors, masks=masks, **facts)

    return changed


def facts(**changes: Any) -> Any:
    return lambda variant: dataclasses.replace(variant, **changes)


D = 32  # of the tiny model
CASES: dict[str, tuple[str, Any, str]] = {
    "a head that there is not": (
        HEADS, facts(kept_units=[0, 4]), "has heads 0 to 3; kept heads [0, 4] were asked for"
    ),
    "a neuron that there is not": (
        FFN, facts(kept_units=list(range(1, 10**5))), "kept neurons [1, 2, 3, "
    ),
    "more heads than tensors": (HEADS, facts(kept_units=[0, 1, 2]), "holds k.weight of shape"),
    "no heads at all": (HEADS, facts(kept_units=[], tensors={}), "keeps units [] at rate 0.5"),
    "units that nobody lists": (HEADS, facts(kept_units=None), "keeps units None at rate 0.5"),
    "units of a linear": (LINEAR, facts(kept_units=[0]), "keeps units [0] at rate 0.5"),
    "another kind": (LINEAR, facts(kind="layer", entry=Entry(1.0, "remove"), removed=True,
                                   tensors={}, masks={}), "is of kind layer, the model has one of"),
    "a linear that is gone": (
        LINEAR, facts(entry=Entry(1.0, "remove"), removed=True, tensors={}, masks={}),
        "is a linear that is removed whole",
    ),
    "an unknown module": (
        LINEAR, facts(module="decoder.block.7.layer.2.DenseReluDense.wo"), "the model has none of"
    ),
    "a missing tensor": (
        HEADS, with_tensors(lambda t: t.pop("o.weight")), "holds o.weight of shape nothing"
    ),
    "a strange tensor": (
        LINEAR, with_tensors(lambda t: t.update(bias=torch.zeros(D))), "the model has nothing there"
    ),
    "another shape": (
        LINEAR, with_tensors(lambda t: t.update(weight=t["weight"].T.contiguous())),
        "holds weight of shape (48, 32), the model has (32, 48) there",
    ),
    "one dimension": (
        LINEAR, with_tensors(lambda t: t.update(weight=t["weight"].flatten())), "shape (1536,)"
    ),
    "a part that there is not": (
        OTHER,
        with_tensors(lambda t: t.update({"p.weight": torch.ones(2, 2)}),
                     plain=frozenset(), entry=Entry(0.25, "head_l1", {"p": Entry(0.3, "l1")})),
        'has the part "p", the module has o',
    ),
    "a block that ends beyond the model": (
        LAYER, facts(entry=Entry(1.0, "linear_map", through="decoder.block.9999")),
        'stands for "decoder.block.2", which the model does not have',
    ),
    "a linear map of another width": (
        LAYER,
        with_tensors(lambda t: t.update(weight=torch.zeros(D - 1, D), bias=torch.zeros(D)),
                     entry=Entry(1.0, "linear_map")),
        f"holds weight of shape ({D - 1}, {D}), the model has ({D}, {D}) there",
    ),
    "half a linear map": (
        LAYER,
        with_tensors(lambda t: t.update(weight=torch.zeros(D, D)), entry=Entry(1.0, "linear_map")),
        "holds bias of shape nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_variant_that_does_not_fit_is_refused(
    case: str, dense: Checkpoint, sound: dict[str, Variant], tmp_path: Path
) -> None:
    module, change, expected = CASES[case]
    wrong = change(sound[module])
    with pytest.raises(MismatchError) as caught:
        loaded(tmp_path, dense, wrong)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'b.npy'}: ")
    assert expected in said
    assert len(said) < len(str(tmp_path)) + 300
    with pytest.raises(ShapeError):
        compose(dense, [wrong])


def test_no_tensor_of_a_variant_that_does_not_fit_is_read(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask without ones is 32 times as large in memory as in the file."""
    masks = {"weight": torch.zeros(4096, 4096, dtype=torch.bool)}
    tensors = {"weight": torch.zeros(4096, 4096)}
    huge = Variant(LINEAR, "linear", Entry(0.5, "l1"), tensors=tensors, masks=masks)
    bundle.write(tmp_path / "b.npy", Bundle(dense.fingerprint, [huge]))
    monkeypatch.setattr(bundle.Reader, "load", lambda *_: pytest.fail("it was read"))
    reader = open_bundle(tmp_path / "b.npy", dense.fingerprint)
    with pytest.raises(MismatchError, match=r"shape \(4096, 4096\), the model has \(32, 48\)"):
        load_variants(dense, [(reader, record) for record in reader.records])
