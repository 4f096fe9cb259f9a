"""A linear map in the place of a block of layers, against the dense model with hooks that map."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composable.calibration.layer_states import Reader, moments
from composable.errors import ConfigError, MismatchError, UserError
from composable.formats import bundle
from composable.formats.bundle import Bundle, Variant
from composable.formats.config import Entry
from composable.linalg.grams import Gram, Regression
from composable.methods import Evidence
from composable.methods.linear_map import fit
from composable.models import checkpoint, cost
from composable.models.checkpoint import Checkpoint
from composable.models.structure import Edit
from composable.variants import compose
from composable.variants.pruning import Sources, make_variants, maps_of
from tests import tiny
from tests.oracle.test_families import DECODERS, TOLERANCE, check_cached_decoding, logits

LAYERS = 4


def made_of(layout: str) -> Checkpoint:
    if layout.startswith("t5"):
        return tiny.dense(layout, num_layers=LAYERS, num_decoder_layers=LAYERS)
    return tiny.dense(layout, num_hidden_layers=LAYERS, **(
        {"n_layers": LAYERS} if layout == "distilbert" else {}))  # fmt: skip


def layer_names(made: Checkpoint) -> list[str]:
    """Of the last stack."""
    stack = made.family.stacks[-1]
    return [
        m.name for m in made.family.modules(made.model) if m.kind == "layer" and m.stack == stack
    ]


def variant_of(made: Checkpoint, first: int, last: int, seed: int = 0) -> Variant:
    """A map of any weights."""
    names = layer_names(made)
    generator = torch.Generator().manual_seed(seed)
    width = made.model.config.hidden_size
    entry = Entry(1.0, "linear_map", through=names[last])
    variant = Variant(names[first], "layer", entry, removed=True)
    variant.tensors = {
        "weight": torch.randn(width, width, generator=generator) * 0.05,
        "bias": torch.randn(width, generator=generator) * 0.1,
    }
    return variant


def by_hooks(made: Checkpoint, variant: Variant) -> Any:
    """The dense model whose first layer of the block maps linearly; the others pass on."""
    model, names = copy.deepcopy(made.model), layer_names(made)
    first, last = names.index(variant.module), names.index(str(variant.entry.through))

    def mapped(layer: Any, args: Any, output: Any) -> Any:
        x = args[0]
        states = x + x @ variant.tensors["weight"].T + variant.tensors["bias"]
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    def passed(layer: Any, args: Any, output: Any) -> Any:
        return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

    model.get_submodule(names[first]).register_forward_hook(mapped)
    for name in names[first + 1 : last + 1]:
        model.get_submodule(name).register_forward_hook(passed)
    return model


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [
        *((layout, *block) for layout in tiny.ALL for block in ((0, 1), (2, 3))),
        *((layout, *block) for layout in ("t5", "bert", "gpt2") for block in ((1, 1), (1, 2))),
    ],
)
def test_a_map_stands_for_its_block(layout: str, first: int, last: int, tmp_path: Path) -> None:
    made = made_of(layout)
    variant, batch = variant_of(made, first, last), tiny.inputs(made)
    expected = logits(by_hooks(made, variant), batch)
    bundle.write(tmp_path / "m.npy", Bundle(made.fingerprint, [variant]))
    reader = bundle.open_bundle(tmp_path / "m.npy", made.fingerprint)
    (found,) = bundle.choose([reader], {variant.module: variant.entry})
    small = compose.compose(copy.deepcopy(made), [reader.load(found[1])])
    torch.testing.assert_close(logits(small.model, batch), expected, **TOLERANCE)
    checkpoint.save(tmp_path / "small.pth", small)
    again = checkpoint.load(tmp_path / "small.pth")
    assert torch.equal(logits(again.model, batch), logits(small.model, batch))
    names = layer_names(made)
    gone = [Edit(name, "remove") for name in names[first + 1 : last + 1]]
    assert again.structure == (Edit(names[first], "map"), *gone)
    width = made.model.config.hidden_size
    macs = cost.macs(again.model, made.family, 7, 5)
    tokens = {"encoder": 7, "decoder": 5}[made.family.stacks[-1]]
    assert macs.by_module[names[first]] == width**2 * tokens
    without = sum(
        count
        for name, count in cost.macs(made.model, made.family, 7, 5).by_module.items()
        if not name.startswith(tuple(f"{name}." for name in names[first : last + 1]))
    )
    assert macs.total == without + width**2 * tokens
    gone = sum(
        p.numel() for name in names[first : last + 1]
        for key, p in made.model.get_submodule(name).named_parameters()
        if first or "relative_attention_bias" not in key
    )  # fmt: skip
    left = cost.parameters(made.model) - gone + width**2 + width
    assert cost.parameters(again.model) == left


def test_blocks_of_one_first_layer_are_told_apart(tmp_path: Path) -> None:
    made = made_of("opt")
    some = [variant_of(made, 0, last, seed=last) for last in (1, 2)]
    bundle.write(tmp_path / "m.npy", Bundle(made.fingerprint, some))
    reader = bundle.open_bundle(tmp_path / "m.npy", made.fingerprint)
    for variant in some:
        ((_, record),) = bundle.choose([reader], {variant.module: variant.entry})
        assert record.entry == variant.entry
    other = dataclasses.replace(some[0].entry, through=layer_names(made)[0])
    with pytest.raises(MismatchError, match=r"no variant of .* through model\.decoder\.layers\.0"):
        bundle.choose([reader], {some[0].module: other})


@pytest.mark.parametrize("layout", DECODERS)
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (2, 3)])
def test_cached_decoding(layout: str, first: int, last: int) -> None:
    made = made_of(layout)
    small = compose.compose(copy.deepcopy(made), [variant_of(made, first, last)])
    check_cached_decoding(small)


@pytest.mark.parametrize("first", [0, 1])
def test_cached_translation(first: int) -> None:
    made = made_of("t5")
    small = compose.compose(copy.deepcopy(made), [variant_of(made, first, 2)])
    batch = tiny.inputs(made)
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    cached = small.model.generate(**inputs, use_cache=True, **settings)
    assert torch.equal(cached, small.model.generate(**inputs, use_cache=False, **settings))


def test_maps_meet_pruned_modules_and_removed_layers() -> None:
    made = made_of("llama_gqa")
    names = layer_names(made)
    variant = variant_of(made, 1, 2)
    others = make_variants(
        made,
        {f"{names[0]}.self_attn": [Entry(0.5)], f"{names[3]}.mlp": [Entry(0.5)]},
        tiny.BY_WEIGHTS,
    )
    small = compose.compose(copy.deepcopy(made), [variant, *others])
    alone = compose.compose(copy.deepcopy(made), others)
    alone = dataclasses.replace(alone)
    batch = tiny.inputs(made)
    torch.testing.assert_close(
        logits(small.model, batch), logits(by_hooks(alone, variant), batch), **TOLERANCE
    )


def regression(a: np.ndarray, y: np.ndarray) -> Regression:
    found = Regression.of(Gram.zeros(a.shape[1]), y.shape[1])
    found.add(torch.from_numpy(a), torch.from_numpy(y))
    return found


def test_the_map_is_kept_where_held_out_texts_bear_it_out() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 400, 6))
    true = generator.normal(size=(6, 6))
    made = made_of("llama")
    module = made.family.modules(made.model)[0]
    noise = generator.normal(size=(2, 400, 6)) * 0.1
    texts = regression(a, a @ true.T + 1 + noise[0]), regression(b, b @ true.T + 1 + noise[1])
    decided = fit(made.model, module, 1.0, Evidence(states=texts))
    assert decided.tensors is not None
    np.testing.assert_allclose(decided.tensors["weight"].numpy(), true, atol=0.1)
    np.testing.assert_allclose(decided.tensors["bias"].numpy(), 1, atol=0.1)
    y, weight, bias = (
        b @ true.T + 1 + noise[1],
        *(decided.tensors[name].double().numpy() for name in ("weight", "bias")),
    )
    error = ((b @ weight.T + bias - y) ** 2).sum() / (y**2).sum()
    assert decided.stats["error_after"] == pytest.approx(error, rel=1e-3)
    # what holds for the calibration texts alone
    opposite = texts[0], regression(b, -(b @ true.T) - 1)
    decided = fit(made.model, module, 1.0, Evidence(states=opposite))
    assert decided.tensors is None
    assert decided.stats == {"error_before": 1.0, "error_after": 1.0}


def test_variants_of_blocks_are_made_by_a_scheme() -> None:
    made = made_of("opt")
    names = layer_names(made)
    reader = Reader(made.model, made.family)
    batches = [tiny.inputs(made, samples=8, seed=seed) for seed in range(2)]
    found = [moments(reader, [batch], {"decoder": [(1, 3)]}) for batch in batches]
    scheme = {names[1]: [Entry(1.0, "linear_map", through=names[2])]}
    states = {(names[1], names[2]): tuple(one["decoder", (1, 3)] for one in found)}
    (variant,) = make_variants(made, scheme, sources=Sources(states=lambda block: states[block]))
    assert variant.removed
    assert not variant.learns
    assert bool(variant.tensors) == (variant.stats["error_after"] < 1)
    (report,) = maps_of([variant])["linear_maps"].items()
    assert report == (
        f"{names[1]} to {names[2]}", variant.stats["error_after"] if variant.tensors else None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="method linear_map: is for entries that name it"):
        make_variants(
            made,
            scheme,
            {"layer": "linear_map"},
            sources=Sources(states=lambda block: states[block]),
        )
    with pytest.raises(UserError, match="linear_map needs a calibration set"):
        make_variants(made, scheme)
    with pytest.raises(ConfigError, match="linear_map does not prune modules of kind attention"):
        make_variants(made, {f"{names[1]}.self_attn": [Entry(1.0, "linear_map")]})
