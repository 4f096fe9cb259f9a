"""compose: the composed model against a dense one in which the same weights are zero."""

from pathlib import Path
from typing import Any

import pytest
import torch

from composable.errors import ShapeError
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models import checkpoint
from composable.models.structure import Edit
from composable.variants.compose import compose, structure_of
from composable.variants.pruning import make_variants
from tests import tiny

SIZE, HEADS = 8, 4
LAYER = "encoder.block.0"
FFN = "decoder.block.0.layer.2.DenseReluDense"
ATTENTION = "decoder.block.1.layer.0.SelfAttention"
PAIR = "encoder.block.1.layer.0.SelfAttention"
CROSS_PAIR = "decoder.block.2.layer.1.EncDecAttention"
O = "decoder.block.1.layer.1.EncDecAttention.o"  # noqa: E741
GONE = "decoder.block.2.layer.0.SelfAttention"
CONFIGURATION = {
    LAYER: Entry(1.0),
    FFN: Entry(1.0),
    GONE: Entry(1.0),
    ATTENTION: Entry(0.5),
    PAIR: Entry(0.25, None, {"o": Entry(0.3)}),
    CROSS_PAIR: Entry(0.5, None, {"o": Entry(0.5)}),
    O: Entry(0.3),
    "encoder.block.2.layer.1.DenseReluDense.{up}": Entry(0.5),
    "encoder.block.2.layer.1.DenseReluDense.wo": Entry(0.7),
}
KINDS = [{}, {"gated": True}, {"gated": True, "mt5": True}]


def dense(**kind: Any) -> checkpoint.Checkpoint:
    made = tiny.checkpoint(num_layers=3, num_decoder_layers=3, **kind)
    with torch.no_grad():  # small weights: the gated models amplify rounding
        for name, parameter in made.model.named_parameters():
            if "layer_norm" not in name:
                parameter.mul_(0.6)
    made.fingerprint = checkpoint.fingerprint_of(made.config, made.model.state_dict())
    return made


def configuration(**kind: Any) -> dict[str, Entry]:
    up = "wi_1" if kind.get("gated") else "wi"
    return {name.format(up=up): entry for name, entry in CONFIGURATION.items()}


def variants_of(made: checkpoint.Checkpoint, wanted: dict[str, Entry]) -> list[Variant]:
    return make_variants(made, {name: [entry] for name, entry in wanted.items()}, tiny.BY_WEIGHTS)


def by_hand(model: Any, wanted: dict[str, Entry]) -> Any:
    """The dense shapes, with everything that goes set to zero."""
    with torch.no_grad():
        for name, entry in wanted.items():
            part = model.get_submodule(name)
            if name.endswith(("Attention",)):
                stay = _heads_that_stay(part, entry.rate)
                columns = [head * SIZE + i for head in stay for i in range(SIZE)]
                kept = part.o.weight[:, columns].clone()
                if entry.parts:
                    _mask(kept, entry.parts["o"].rate)
                part.o.weight.zero_()
                part.o.weight[:, columns] = kept
            elif entry.rate == 1:
                for child, weight in part.named_parameters():
                    if child.endswith((".o.weight", "wo.weight")):
                        weight.zero_()
            else:
                _mask(part.weight, entry.rate)
    return model


def _heads_that_stay(part: Any, rate: float) -> list[int]:
    sums = [
        sum(float(getattr(part, p).weight[h * SIZE : (h + 1) * SIZE].abs().sum()) for p in "qkv")
        for h in range(HEADS)
    ]
    gone = sorted(range(HEADS), key=lambda h: sums[h])[: int(HEADS * rate + 0.5)]
    return [h for h in range(HEADS) if h not in gone]


def _mask(weight: torch.Tensor, rate: float) -> None:
    count = int(weight.numel() * rate + 0.5)
    weight.view(-1)[weight.abs().flatten().argsort()[:count]] = 0


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(3, 60, (3, n), generator=generator) for n in (8, 6))
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    return model(input_ids=source * mask, attention_mask=mask, decoder_input_ids=target).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_configuration_equals_zeroed_weights(kind: dict[str, Any], tmp_path: Path) -> None:
    wanted = configuration(**kind)
    composed = compose(dense(**kind), variants_of(dense(**kind), wanted))
    expected = logits(by_hand(dense(**kind).model, wanted))
    torch.testing.assert_close(logits(composed.model), expected, rtol=0, atol=1e-5)
    assert (expected - logits(dense(**kind).model)).abs().max() > 0.01
    assert not composed.is_dense
    assert not composed.model.training
    assert composed.fingerprint == dense(**kind).fingerprint
    assert composed.config == dense(**kind).config
    # save, then load
    path = tmp_path / "model.pth"
    checkpoint.save(path, composed)
    loaded = checkpoint.load(path)
    assert torch.equal(logits(loaded.model), logits(composed.model))
    assert loaded.structure == composed.structure
    assert sorted(loaded.masks) == sorted(composed.masks)
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in composed.masks.items())
    assert (loaded.fingerprint, loaded.info) == (composed.fingerprint, composed.info)
    checkpoint.save(tmp_path / "again.pth", loaded)
    assert (tmp_path / "again.pth").read_bytes() == path.read_bytes()


def test_structure_and_masks_carry_the_names_they_should() -> None:
    composed = compose(dense(), variants_of(dense(), configuration()))
    assert {(edit.module, edit.action, len(edit.units)) for edit in composed.structure} == {
        (LAYER, "remove", 0), (GONE, "remove", 0), (FFN, "remove", 0),
        (ATTENTION, "keep", 2), (PAIR, "keep", 3), (CROSS_PAIR, "keep", 2),
    }  # fmt: skip
    # the names of masks are those of the composed model: the encoder has moved up by one
    zeros = {
        "encoder.block.0.layer.0.SelfAttention.o.weight": int(32 * 24 * 0.3 + 0.5),
        "decoder.block.2.layer.1.EncDecAttention.o.weight": int(32 * 16 * 0.5 + 0.5),
        f"{O}.weight": int(32 * 32 * 0.3 + 0.5),
        "encoder.block.1.layer.1.DenseReluDense.wi.weight": int(32 * 48 * 0.5 + 0.5),
        "encoder.block.1.layer.1.DenseReluDense.wo.weight": int(32 * 48 * 0.7 + 0.5),
    }
    assert {name: int((~mask).sum()) for name, mask in composed.masks.items()} == zeros
    for name, count in zeros.items():
        weight = composed.model.get_parameter(name)
        assert int((weight == 0).sum()) == count
        assert bool((weight[~composed.masks[name]] == 0).all())


@pytest.mark.parametrize("junk", [3.0, float("inf"), float("nan"), -0.0])
def test_masked_weights_are_zero_whatever_the_variants_hold_there(junk: float) -> None:
    variants = variants_of(dense(), {O: Entry(0.3), PAIR: Entry(0.25, None, {"o": Entry(0.3)})})
    for variant in variants:
        for name, mask in variant.masks.items():
            variant.tensors[name][~mask] = junk
    composed = compose(dense(), variants)
    for name, mask in composed.masks.items():
        weight = composed.model.get_parameter(name)
        assert int((~mask).sum()) > 0
        assert bool((weight[~mask] == 0).all())
        assert not torch.signbit(weight[~mask]).any()


def test_the_order_of_modules_does_not_matter(tmp_path: Path) -> None:
    wanted = {
        **configuration(),
        "encoder.block.2.layer.0.SelfAttention": Entry(0.5),
        "decoder.block.1.layer.2.DenseReluDense": Entry(1.0),
    }
    variants = variants_of(dense(), wanted)
    for path, listed in (("a.pth", variants), ("b.pth", variants[::-1])):
        checkpoint.save(tmp_path / path, compose(dense(), listed))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_everywhere_is_the_dense_model(kind: dict[str, Any], tmp_path: Path) -> None:
    composed = compose(dense(**kind), [])
    assert composed.is_dense
    assert torch.equal(logits(composed.model), logits(dense(**kind).model))
    checkpoint.save(tmp_path / "composed.pth", composed)
    checkpoint.save(tmp_path / "dense.pth", dense(**kind))
    assert (tmp_path / "composed.pth").read_bytes() == (tmp_path / "dense.pth").read_bytes()


def test_names_after_the_removal_of_layers() -> None:
    wanted = {
        "encoder.block.0": Entry(1.0),
        "decoder.block.1": Entry(1.0),
        "encoder.block.2.layer.1.DenseReluDense.wi": Entry(0.5),
        "decoder.block.2.layer.0.SelfAttention": Entry(0.25, None, {"o": Entry(0.5)}),
        "decoder.block.0.layer.2.DenseReluDense.wo": Entry(0.5),
    }
    made = dense()
    values = {n: p.clone() for n, p in made.model.named_parameters()}
    composed = compose(made, variants_of(dense(), wanted))
    assert sorted(composed.masks) == [
        "decoder.block.0.layer.2.DenseReluDense.wo.weight",
        "decoder.block.1.layer.0.SelfAttention.o.weight",
        "encoder.block.1.layer.1.DenseReluDense.wi.weight",
    ]
    kept = [edit.module for edit in composed.structure if edit.action == "keep"]
    assert kept == ["decoder.block.2.layer.0.SelfAttention"]
    moved = composed.model.get_parameter("encoder.block.1.layer.1.DenseReluDense.wo.weight")
    assert torch.equal(moved, values["encoder.block.2.layer.1.DenseReluDense.wo.weight"])
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    for stack in ("encoder", "decoder"):
        assert len(composed.model.get_submodule(stack).block) == 2
        found = composed.model.get_parameter(f"{stack}.block.0.{bias}")
        assert torch.equal(found, values[f"{stack}.block.0.{bias}"])


@pytest.mark.parametrize("removed", [["encoder.block.0"], ["decoder.block.0", "decoder.block.2"]])
def test_a_model_that_lost_layers_of_one_stack_generates(
    removed: list[str], tmp_path: Path
) -> None:
    """Caches have as many layers as the decoder, whatever the encoder has."""
    composed = compose(dense(), variants_of(dense(), dict.fromkeys(removed, Entry(1.0))))
    checkpoint.save(tmp_path / "model.pth", composed)
    source = torch.tensor([[5, 9, 12, 1]])
    for model in (composed.model, checkpoint.load(tmp_path / "model.pth").model):
        for beams in (1, 4):
            tokens = [
                model.generate(
                    source, max_new_tokens=8, min_new_tokens=8, num_beams=beams, use_cache=cached
                ).tolist()
                for cached in (True, False)
            ]
            assert tokens[0] == tokens[1]


def test_the_composed_model_owns_its_tensors() -> None:
    variants = variants_of(dense(), configuration())
    composed = compose(dense(), variants)
    before = logits(composed.model)
    for variant in variants:
        for tensor in variant.tensors.values():
            tensor.fill_(5.0)
    assert torch.equal(logits(composed.model), before)


def test_structure_of_collects_and_sorts() -> None:
    gone = [
        Variant(name, kind, Entry(1.0, "remove"), removed=True)
        for name, kind in (
            ("decoder.block.1", "layer"), ("b.ffn", "ffn"), ("x", "attention"), ("a.ffn", "ffn"),
            ("decoder.block.0", "layer"),
        )
    ]  # fmt: skip
    kept = Variant("y", "attention", Entry(0.5, "head_l1"), kept_units=[1, 2])
    names = ("a.ffn", "b.ffn", "decoder.block.0", "decoder.block.1", "x")
    expected = (*(Edit(name, "remove") for name in names), Edit("y", "keep", (1, 2)))
    assert structure_of([*gone, kept]) == expected
    with pytest.raises(ShapeError, match='"y" has two edits, keep and keep; expected one'):
        structure_of([kept, kept])


def test_variants_that_do_not_fit_are_refused() -> None:
    (variant,) = variants_of(dense(), {O: Entry(0.3)})
    variant.tensors["weight"] = torch.zeros(32, 31)
    with pytest.raises(
        ShapeError, match=r"holds weight of shape \(32, 31\), the model has \(32, 32\)"
    ):
        compose(dense(), [variant])
    variant.tensors = {"bias": torch.zeros(32)}
    with pytest.raises(
        ShapeError, match=r"holds bias of shape \(32,\), the model has nothing there"
    ):
        compose(dense(), [variant])
    every = variants_of(dense(), {f"decoder.block.{i}": Entry(1.0) for i in range(3)})
    with pytest.raises(ShapeError, match='all 3 layers of "decoder'):
        compose(dense(), every)
