"""make_variants: which variants are made, of what they consist, and what is refused."""

from typing import Any

import pytest
import torch

from composable import methods
from composable.errors import ConfigError, UserError
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.linalg.grams import Gram
from composable.methods.base import Pruned
from composable.methods.l1 import keep_mask
from composable.variants.pruning import Sources, make_variants
from tests import tiny

A = "encoder.block.0.layer.0.SelfAttention"
CROSS = "decoder.block.1.layer.1.EncDecAttention"
FFN = "encoder.block.1.layer.1.DenseReluDense"
LAYER = "decoder.block.0"
WI = f"{FFN}.wi"


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny.checkpoint()


def made(dense: Any, scheme: dict[str, list[Entry]], **chosen: str) -> list[tuple[Any, ...]]:
    variants = make_variants(dense, scheme, {**tiny.BY_WEIGHTS, **chosen})
    return [(v.module, v.entry, sorted(v.plain)) for v in variants]


def pair(rate: float, o: float, method: str | None = None, o_method: str | None = None) -> Entry:
    return Entry(rate, method, {"o": Entry(o, o_method)})


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({}, []),
        ({WI: [Entry(0.5)]}, [(WI, Entry(0.5, "l1"), [""])]),
        ({WI: [Entry(0.5, "l1")]}, [(WI, Entry(0.5, "l1"), [])]),
        # a plain number and an explicit entry of the same method: one variant that answers both
        ({WI: [Entry(0.5), Entry(0.5, "l1")]}, [(WI, Entry(0.5, "l1"), [""])]),
        ({WI: [Entry(0.5, "l1"), Entry(0.5)]}, [(WI, Entry(0.5, "l1"), [""])]),
        (
            {WI: [Entry(0.3), Entry(0.5, "l1")], A: [Entry(0.25)]},
            [
                (WI, Entry(0.3, "l1"), [""]),
                (WI, Entry(0.5, "l1"), []),
                (A, Entry(0.25, "head_l1"), [""]),
            ],
        ),
        (
            {A: [pair(0.25, 0.3), pair(0.25, 0.5), Entry(0.25)]},
            [
                (A, pair(0.25, 0.3, "head_l1", "l1"), ["", "o"]),
                (A, pair(0.25, 0.5, "head_l1", "l1"), ["", "o"]),
                (A, Entry(0.25, "head_l1"), [""]),
            ],
        ),
        (
            {A: [pair(0.25, 0.3, None, "l1"), pair(0.5, 0.3, "head_l1", None)]},
            [
                (A, pair(0.25, 0.3, "head_l1", "l1"), [""]),
                (A, pair(0.5, 0.3, "head_l1", "l1"), ["o"]),
            ],
        ),
        (
            {A: [Entry(1.0)], FFN: [Entry(1.0)], LAYER: [Entry(1.0)]},
            [
                (A, Entry(1.0, "remove"), [""]),
                (FFN, Entry(1.0, "remove"), [""]),
                (LAYER, Entry(1.0, "remove"), [""]),
            ],
        ),
    ],
)
def test_every_variant_once_with_what_it_answers(
    dense: Any, scheme: dict[str, list[Entry]], expected: list[tuple[Any, ...]]
) -> None:
    assert made(dense, scheme) == expected


def test_a_method_is_chosen_for_one_kind(dense: Any) -> None:
    """The method random prunes heads and neurons; it is asked for in heads alone."""
    scheme = {A: [pair(0.25, 0.3)], FFN: [Entry(0.3)]}
    sources = Sources(seed=lambda name: 7)
    variants = make_variants(dense, scheme, {**tiny.BY_WEIGHTS, "attention": "random"}, sources)
    assert [variant.entry for variant in variants] == [
        pair(0.25, 0.3, "random", "l1"),
        Entry(0.3, "neuron_l1"),
    ]


def test_a_chosen_method_replaces_the_default_for_plain_rates_only(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    other = replace(methods.L1, name="other")
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, other))
    scheme = {WI: [Entry(0.3), Entry(0.3, "l1")], A: [pair(0.25, 0.3), pair(0.25, 0.3, None, "l1")]}
    assert made(dense, scheme, linear="other") == [
        (WI, Entry(0.3, "other"), [""]),
        (WI, Entry(0.3, "l1"), []),
        (A, pair(0.25, 0.3, "head_l1", "other"), ["", "o"]),
        (A, pair(0.25, 0.3, "head_l1", "l1"), [""]),
    ]


def one(dense: Any, name: str, entry: Entry) -> Variant:
    (variant,) = make_variants(dense, {name: [entry]}, tiny.BY_WEIGHTS)
    return variant


def test_a_linear_keeps_its_values_where_the_mask_is_true(dense: Any) -> None:
    weight = dense.model.get_submodule(WI).weight
    variant = one(dense, WI, Entry(0.3))
    assert (variant.kind, variant.kept_units, variant.removed) == ("linear", None, False)
    assert list(variant.tensors) == list(variant.masks) == ["weight"]
    assert torch.equal(variant.masks["weight"], keep_mask(weight, 0.3))
    assert int((variant.tensors["weight"] == 0).sum()) == int(weight.numel() * 0.3 + 0.5)
    kept = variant.masks["weight"]
    assert torch.equal(variant.tensors["weight"][kept], weight[kept])
    assert not variant.tensors["weight"].requires_grad


def test_an_attention_holds_the_rows_of_the_kept_units(dense: Any) -> None:
    variant = one(dense, A, Entry(0.5))
    attention = dense.model.get_submodule(A)
    assert variant.kept_units is not None
    assert len(variant.kept_units) == 2
    rows = [head * 8 + i for head in variant.kept_units for i in range(8)]
    assert variant.masks == {}
    # the position bias table is everybody's and stays in the model
    assert sorted(variant.tensors) == ["k.weight", "o.weight", "q.weight", "v.weight"]
    for part in "qkv":
        expected = attention.get_submodule(part).weight[rows]
        assert torch.equal(variant.tensors[f"{part}.weight"], expected)
    assert torch.equal(variant.tensors["o.weight"], attention.o.weight[:, rows])


@pytest.mark.parametrize(("heads", "rate"), [(0.25, 0.3), (0.5, 0.5), (0.99, 0.9), (0.01, 0.3)])
def test_a_pair_masks_o_among_the_remaining_columns(dense: Any, heads: float, rate: float) -> None:
    variant, alone = (one(dense, CROSS, e) for e in (pair(heads, rate), Entry(heads)))
    assert variant.kept_units == alone.kept_units
    small = alone.tensors["o.weight"]
    mask = variant.masks["o.weight"]
    assert list(variant.masks) == ["o.weight"]
    assert mask.shape == small.shape == (32, 8 * len(alone.kept_units or []))
    assert int((~mask).sum()) == int(small.numel() * rate + 0.5)
    assert torch.equal(mask, keep_mask(small, rate))
    assert torch.equal(variant.tensors["o.weight"], torch.where(mask, small, 0.0))
    for part in "qkv":
        assert torch.equal(variant.tensors[f"{part}.weight"], alone.tensors[f"{part}.weight"])


def test_parts_are_pruned_among_what_the_units_leave_of_them(dense: Any) -> None:
    """Rows of an inner part, columns of the last one; each by the inputs that it has left."""
    inputs = {f"{FFN}.{key}": torch.randn(90, n).double() for key, n in (("wi", 32), ("wo", 48))}
    grams = {name: Gram(x.T @ x, x.sum(0), len(x)) for name, x in inputs.items()}
    entry = Entry(0.5, None, {"wi": Entry(0.25, "wanda"), "wo": Entry(0.5, "wanda")})
    sources = Sources(grams.__getitem__)
    (variant,) = make_variants(dense, {FFN: [entry]}, tiny.BY_WEIGHTS, sources)
    kept = variant.kept_units
    assert kept is not None
    assert len(kept) == 24
    assert variant.plain == {""}
    for key, rate in (("wi", 0.25), ("wo", 0.5)):
        weight, x = dense.model.get_submodule(f"{FFN}.{key}").weight, inputs[f"{FFN}.{key}"]
        weight, x = (weight[kept], x) if key == "wi" else (weight[:, kept], x[:, kept])
        scores = weight.double().abs() * x.norm(dim=0)
        limit = scores.sort(dim=1).values[:, [int(scores.shape[1] * rate + 0.5)]]  # of each row
        assert torch.equal(variant.masks[f"{key}.weight"], scores >= limit)
        expected = torch.where(scores >= limit, weight, 0.0)
        assert torch.equal(variant.tensors[f"{key}.weight"], expected)


def test_a_part_is_pruned_as_the_method_of_its_module_leaves_it(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of `o` and its values are those of the changed weights, not of the dense ones."""
    changed = torch.randn(32, 16, generator=torch.Generator().manual_seed(5))

    def prune(*_: Any) -> Pruned:
        return Pruned(kept_units=[1, 3], tensors={"o.weight": changed}, stats={"loss": 0.5})

    method = methods.Method("rewritten", ("attention",), "a test", prune)
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, method))
    variant = one(dense, A, pair(0.5, 0.3, "rewritten"))
    mask = keep_mask(changed, 0.3)
    assert torch.equal(variant.masks["o.weight"], mask)
    assert torch.equal(variant.tensors["o.weight"], torch.where(mask, changed, 0.0))
    assert variant.stats == {"loss": 0.5}


@pytest.mark.parametrize("name", [A, FFN, LAYER])
def test_removed_modules_have_no_tensors(dense: Any, name: str) -> None:
    variant = one(dense, name, Entry(1.0))
    assert (variant.removed, variant.kept_units, variant.tensors, variant.masks) == (
        True, None, {}, {},
    )  # fmt: skip


def test_the_dense_model_stays_as_it_is() -> None:
    dense, untouched = tiny.checkpoint(), tiny.checkpoint()
    scheme = {A: [pair(0.5, 0.5)], WI: [Entry(0.5)], LAYER: [Entry(1.0)]}
    variants = make_variants(dense, scheme, tiny.BY_WEIGHTS)
    for variant in variants:
        for tensor in variant.tensors.values():
            tensor.fill_(7.0)
    found, expected = dense.model.state_dict(), untouched.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert dense.is_dense


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {LAYER: [Entry(0.25)]},
            f'"{LAYER}" at rate 0.25: no method prunes modules of kind layer '
            "(methods that do: linear_map); use rate 0 or 1, or another method.",
        ),
        ({FFN: [Entry(0.5, "l1")]}, f'"{FFN}" at rate 0.5: l1 does not prune modules of kind ffn'),
        (
            {A: [Entry(0.5, "l1")]},
            f'"{A}" at rate 0.5: l1 does not prune modules of kind attention '
            "(methods that do: head_l1, head_gram, stat, unit_wanda, fluctuation, ranked, random)",
        ),
        ({WI: [Entry(0.3, "head_l1")]}, "head_l1 does not prune modules of kind linear"),
        ({A: [pair(0.25, 0.3, None, "head_l1")]}, f'"{A}.o" at rate 0.3: head_l1 does not prune'),
        (
            {WI: [Entry(0.3, "magic")]},
            'unknown method "magic"; known are l1, wanda, wanda_matrix, obs, ',
        ),
        (
            {FFN: [Entry(1.0, "magic")]},
            'unknown method "magic"; known are l1, wanda, wanda_matrix, obs, ',
        ),
        ({WI: [Entry(1.0)]}, f'"{WI}": a linear cannot be removed whole (rate 1) yet'),
        (
            {FFN: [Entry(0.0, None, {"wi": Entry(1.0)})]},
            f'"{WI}": a linear cannot be removed whole (rate 1) yet',
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    dense: Any, scheme: dict[str, list[Entry]], message: str
) -> None:
    with pytest.raises((ConfigError, UserError)) as caught:
        make_variants(dense, scheme)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_method_is_refused(dense: Any) -> None:
    with pytest.raises(UserError, match='unknown method "magic"'):
        make_variants(dense, {WI: [Entry(0.3)]}, {"linear": "magic"})
