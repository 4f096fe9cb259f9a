"""Physically pruned T5 against the dense model whose output projections are zeroed: 1e-5."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from composable import families
from composable.errors import ShapeError
from composable.families.base import cache_name
from composable.models.structure import Edit, ordered
from composable.models.surgery import apply_structure
from tests import tiny

LAYERS, HEADS, SIZE = 3, 4, 8
SELF, CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
MODELS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"gated": True},
    "mt5": {"gated": True, "mt5": True},
}
ENCODER = [f"encoder.block.{i}.{SELF}" for i in range(LAYERS)]
DECODER = [f"decoder.block.{i}.{SELF}" for i in range(LAYERS)]
CROSSING = [f"decoder.block.{i}.{CROSS}" for i in range(LAYERS)]
PLANS: dict[str, dict[str, list[int]]] = {
    "first block only": {ENCODER[0]: [0, 2], DECODER[0]: [1], CROSSING[0]: [3]},
    "later blocks only": {ENCODER[1]: [0, 3], DECODER[2]: [1, 2, 3], CROSSING[1]: [1, 2]},
    "encoder": {name: [1, 3] for name in ENCODER},
    "decoder": {name: [2, 3] for name in DECODER},
    "cross": {name: [1] for name in CROSSING},
    "different counts": {
        ENCODER[0]: [3], ENCODER[1]: [0, 1, 3], ENCODER[2]: [1, 2],
        DECODER[0]: [0, 2, 3], DECODER[1]: [1], DECODER[2]: [0, 3],
        CROSSING[0]: [2], CROSSING[1]: [0, 1], CROSSING[2]: [1, 2, 3],
    },
    "first attentions without heads": {ENCODER[0]: [], DECODER[0]: [], CROSSING[0]: []},
    "a later attention without heads": {
        ENCODER[1]: [], DECODER[2]: [], CROSSING[1]: [], DECODER[0]: [1],
    },
    "no head at all": {name: [] for name in [*ENCODER, *DECODER, *CROSSING]},
}  # fmt: skip
# the plans that have gone wrong in caches: layer 0 tells generate how long the text is
CACHE_PLANS = [
    "different counts",
    "first attentions without heads",
    "a later attention without heads",
    "no head at all",
]


def model(kind: str = "v1.0", attention: str = "sdpa", seed: int = 0) -> Any:
    """Weights at 0.6 of the usual: at 1 the gated models amplify rounding to 3e-5 by themselves."""
    built = tiny.t5(
        seed, attention=attention, num_layers=LAYERS, num_decoder_layers=LAYERS, **MODELS[kind]
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "layer_norm" not in name and "relative" not in name:
                parameter.mul_(0.6)
    return built


def edits(kept: dict[str, list[int]], gone: list[str]) -> list[Edit]:
    """Modules that keep some units ([]: none), and modules that are gone."""
    some = [Edit(name, "keep" if ids else "remove", tuple(ids)) for name, ids in kept.items()]
    return [*some, *(Edit(name, "remove") for name in gone)]


def pruned(built: Any, kept: dict[str, list[int]] | None = None, gone: Any = ()) -> Any:
    apply_structure(built, families.of(built), ordered(edits(kept or {}, gone)))
    return built.eval()


def without_heads(built: Any, kept: dict[str, list[int]]) -> Any:
    """Zero the columns that the output projections have for the removed heads."""
    with torch.no_grad():
        for name, ids in kept.items():
            weight = built.get_submodule(f"{name}.o").weight
            for head in set(range(HEADS)) - set(ids):
                weight[:, head * SIZE : (head + 1) * SIZE] = 0
    return built


def zeroed(built: Any, names: list[str]) -> Any:
    """Zero whole weights."""
    with torch.no_grad():
        for name in names:
            built.get_submodule(name).weight.zero_()
    return built


def without_layers(built: Any, names: list[str]) -> Any:
    """Zero everything that the layers add to the residual stream."""
    outputs = [
        child
        for name in names
        for child, _ in built.get_submodule(name).named_modules(prefix=name)
        if child.endswith((".o", ".wo"))
    ]
    assert len(outputs) == sum(2 + name.startswith("decoder") for name in names)
    return zeroed(built, outputs)


def batch() -> dict[str, torch.Tensor]:
    """Three sentences of 9, 6 and 2 tokens, padded; targets of 6, 4 and 6."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(3, 60, (3, 9), generator=generator)
    target = torch.randint(3, 60, (3, 6), generator=generator)
    mask, target_mask = torch.ones_like(source), torch.ones_like(target)
    mask[1, 6:], mask[2, 2:], target_mask[1, 4:] = 0, 0, 0
    return {
        "input_ids": source * mask,
        "attention_mask": mask,
        "decoder_input_ids": target * target_mask,
        "decoder_attention_mask": target_mask,
    }


@torch.no_grad()
def logits(built: Any) -> torch.Tensor:
    return built(**batch(), use_cache=False).logits


@torch.no_grad()
def logits_step_by_step(built: Any) -> torch.Tensor:
    """The same logits, one target token at a time."""
    inputs = batch()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    encoded = built.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    found = []
    for step in range(inputs["decoder_input_ids"].shape[1]):
        output = built(
            encoder_outputs=encoded,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=inputs["decoder_input_ids"][:, step : step + 1],
            decoder_attention_mask=inputs["decoder_attention_mask"][:, : step + 1],
            use_cache=True,
            **{cache_name(built): cache},
        )
        assert cache.get_seq_length() == step + 1
        found.append(output.logits)
    return torch.cat(found, 1)


def generated(built: Any, beams: int, cache: str | None) -> torch.Tensor:
    """Tokens of 12 forced steps; cache None is no cache at all, "dynamic" what generate takes."""
    inputs = {key: value for key, value in batch().items() if not key.startswith("decoder")}
    return built.generate(
        **inputs,
        num_beams=beams,
        do_sample=False,
        min_new_tokens=12,
        max_new_tokens=12,
        use_cache=cache is not None,
        cache_implementation="static" if cache == "static" else None,
        disable_compile=True,
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor, untouched: torch.Tensor) -> None:
    """Equal where the text is (padded target positions are nobody's), and not the dense model."""
    real = batch()["decoder_attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
    assert (expected - untouched)[real].abs().max() > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_removed_heads_equal_zeroed_columns(kind: str, attention: str, plan: str) -> None:
    kept = PLANS[plan]
    found = pruned(model(kind, attention), kept)
    for name, ids in kept.items():
        part = found.get_submodule(name)
        assert [getattr(part, p).weight.shape[0] for p in "qkv"] == [len(ids) * SIZE] * 3
        assert part.o.weight.shape[1] == len(ids) * SIZE
    expected = logits(without_heads(model(kind, attention), kept))
    untouched = logits(model(kind, attention))
    assert_close(logits(found), expected, untouched)
    assert_close(logits_step_by_step(found), expected, untouched)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("plan", CACHE_PLANS)
def test_generation_equals_the_zeroed_model_with_every_cache(
    plan: str, beams: int, attention: str
) -> None:
    expected = generated(without_heads(model("v1.1", attention), PLANS[plan]), beams, None)
    found = pruned(model("v1.1", attention), PLANS[plan])
    for cache in (None, "dynamic", "static"):
        assert generated(found, beams, cache).tolist() == expected.tolist(), cache
    assert expected.tolist() != generated(model("v1.1", attention), beams, None).tolist()


def test_gradients_equal_those_of_the_zeroed_model() -> None:
    kept = PLANS["different counts"]
    small, whole = pruned(model(), kept), without_heads(model(), kept)
    for built in (small, whole):
        built(**batch()).logits[batch()["decoder_attention_mask"].bool()].square().mean().backward()
    rows = [head * SIZE + i for head in kept[DECODER[0]] for i in range(SIZE)]
    for name, part in (("q", rows), ("k", rows), ("v", rows)):
        found = small.get_submodule(f"{DECODER[0]}.{name}").weight.grad
        expected = whole.get_submodule(f"{DECODER[0]}.{name}").weight.grad[part]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found.abs().max() > 1e-4
    bias = f"{DECODER[0]}.relative_attention_bias.weight"
    torch.testing.assert_close(
        small.get_parameter(bias).grad, whole.get_parameter(bias).grad, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "names",
    [
        ["encoder.block.0.layer.1.DenseReluDense"],
        ["encoder.block.2.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"],
        [f"decoder.block.{i}.layer.2.DenseReluDense" for i in range(LAYERS)],
    ],
)
def test_removed_ffns_equal_zeroed_outputs(kind: str, names: list[str]) -> None:
    found = pruned(model(kind), gone=names)
    expected = logits(zeroed(model(kind), [f"{name}.wo" for name in names]))
    assert_close(logits(found), expected, logits(model(kind)))
    assert sum(p.numel() for n in names for p in found.get_submodule(n).parameters()) == 0


REMOVED_LAYERS = [
    ["encoder.block.0"],
    ["decoder.block.0"],
    ["encoder.block.1", "decoder.block.2"],
    ["decoder.block.1", "decoder.block.0", "encoder.block.1", "encoder.block.0"],
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", REMOVED_LAYERS, ids=" ".join)
def test_removed_layers_equal_layers_that_add_nothing(kind: str, names: list[str]) -> None:
    found = pruned(model(kind), gone=names)
    expected = logits(without_layers(model(kind), names))
    assert_close(logits(found), expected, logits(model(kind)))
    assert_close(logits_step_by_step(found), expected, logits(model(kind)))
    tokens = generated(without_layers(model(kind), names), 1, None).tolist()
    for cache in (None, "dynamic", "static"):
        assert generated(found, 1, cache).tolist() == tokens, cache
    for stack, count in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        left = LAYERS - sum(name.startswith(stack) for name in names)
        assert getattr(found.config, count) == len(found.get_submodule(stack).block) == left


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "heads_of_the_next", [[1, 2], []], ids=["next has 2 heads", "next has none"]
)
def test_bias_goes_from_a_removed_block_to_one_that_lost_heads(
    heads_of_the_next: list[int], attention: str
) -> None:
    layers = ["encoder.block.0", "decoder.block.0"]
    kept = {ENCODER[1]: heads_of_the_next, DECODER[1]: heads_of_the_next, DECODER[2]: [3]}
    ffns = ["decoder.block.1.layer.2.DenseReluDense"]
    found = pruned(model(attention=attention), kept, [*layers, *ffns])
    whole = without_heads(without_layers(model(attention=attention), layers), kept)
    zeroed(whole, [f"{name}.wo" for name in ffns])
    expected, untouched = logits(whole), logits(model(attention=attention))
    assert_close(logits(found), expected, untouched)
    assert_close(logits_step_by_step(found), expected, untouched)
    for beams in (1, 4):
        tokens = generated(whole, beams, None).tolist()
        assert generated(found, beams, "dynamic").tolist() == tokens
        assert generated(found, beams, "static").tolist() == tokens


def test_decoder_bias_matters_in_these_models() -> None:
    """Guards the tests above: a lost position bias would show in the logits."""
    lost = model()
    for name in (ENCODER[0], DECODER[0]):
        zeroed(lost, [f"{name}.relative_attention_bias"])
    assert (logits(lost) - logits(model())).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kept", "gone", "message"),
    [
        ({}, [f"encoder.block.{i}" for i in range(LAYERS)], 'all 3 layers of "encoder.block"'),
        ({}, [f"decoder.block.{i}" for i in range(LAYERS)], 'all 3 layers of "decoder.block"'),
        ({ENCODER[0]: [1, 4]}, [], "has heads 0 to 3; kept heads [1, 4]"),
        ({ENCODER[0]: [-1, 2]}, [], "keep [-1, 2]; expected ascending ids"),
        ({ENCODER[0]: [2, 1]}, [], "keep [2, 1]; expected ascending ids"),
        ({ENCODER[0]: [1, 1]}, [], "keep [1, 1]; expected ascending ids"),
        ({ENCODER[0]: [1]}, [ENCODER[0]], f'"{ENCODER[0]}" has two edits, keep and remove'),
        ({ENCODER[1]: [1]}, ["encoder.block.1"], f'"{ENCODER[1]}" has an edit, but its layer is'),
        ({"encoder.block.1": [1]}, [], "is of kind layer; keep needs attention or ffn"),
        ({}, [f"{ENCODER[0]}.o"], "is of kind linear; remove needs attention or ffn or layer"),
        ({f"encoder.block.9.{SELF}": [0]}, [], f'no module "encoder.block.9.{SELF}" in this model'),
        ({}, ["encoder.block.9"], 'no module "encoder.block.9" in this model'),
    ],
)  # fmt: skip
def test_impossible_structures_are_refused(
    kept: dict[str, list[int]], gone: list[str], message: str
) -> None:
    built = model()
    with pytest.raises(ShapeError) as caught:
        apply_structure(built, families.of(built), tuple(edits(kept, gone)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
