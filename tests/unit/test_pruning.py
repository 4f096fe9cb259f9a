"""make_variants: which variants are made, of what they consist, and what is refused."""

from typing import Any

import pytest
import torch

from composable.errors import ConfigError, UserError
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.methods.l1 import keep_mask
from composable.variants.pruning import make_variants
from tests import tiny

A = "encoder.block.0.layer.0.SelfAttention"
CROSS = "decoder.block.1.layer.1.EncDecAttention"
FFN = "encoder.block.1.layer.1.DenseReluDense"
LAYER = "decoder.block.0"
WI = f"{FFN}.wi"


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny.checkpoint()


def made(dense: Any, scheme: dict[str, list[Entry]], *preferred: str) -> list[tuple[Any, ...]]:
    return [
        (v.module, v.entry, v.plain, v.plain_o) for v in make_variants(dense, scheme, preferred)
    ]


def pair(rate: float, o: float, method: str | None = None, o_method: str | None = None) -> Entry:
    return Entry(rate, method, Entry(o, o_method))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({}, []),
        ({WI: [Entry(0.5)]}, [(WI, Entry(0.5, "l1"), True, False)]),
        ({WI: [Entry(0.5, "l1")]}, [(WI, Entry(0.5, "l1"), False, False)]),
        # a plain number and an explicit entry of the same method: one variant that answers both
        ({WI: [Entry(0.5), Entry(0.5, "l1")]}, [(WI, Entry(0.5, "l1"), True, False)]),
        ({WI: [Entry(0.5, "l1"), Entry(0.5)]}, [(WI, Entry(0.5, "l1"), True, False)]),
        (
            {WI: [Entry(0.3), Entry(0.5, "l1")], A: [Entry(0.25)]},
            [
                (WI, Entry(0.3, "l1"), True, False),
                (WI, Entry(0.5, "l1"), False, False),
                (A, Entry(0.25, "head_l1"), True, False),
            ],
        ),
        (
            {A: [pair(0.25, 0.3), pair(0.25, 0.5), Entry(0.25)]},
            [
                (A, pair(0.25, 0.3, "head_l1", "l1"), True, True),
                (A, pair(0.25, 0.5, "head_l1", "l1"), True, True),
                (A, Entry(0.25, "head_l1"), True, False),
            ],
        ),
        (
            {A: [pair(0.25, 0.3, None, "l1"), pair(0.5, 0.3, "head_l1", None)]},
            [
                (A, pair(0.25, 0.3, "head_l1", "l1"), True, False),
                (A, pair(0.5, 0.3, "head_l1", "l1"), False, True),
            ],
        ),
        (
            {A: [Entry(1.0)], FFN: [Entry(1.0)], LAYER: [Entry(1.0)]},
            [
                (A, Entry(1.0, "remove"), True, False),
                (FFN, Entry(1.0, "remove"), True, False),
                (LAYER, Entry(1.0, "remove"), True, False),
            ],
        ),
    ],
)
def test_every_variant_once_with_what_it_answers(
    dense: Any, scheme: dict[str, list[Entry]], expected: list[tuple[Any, ...]]
) -> None:
    assert made(dense, scheme) == expected


@pytest.mark.parametrize("preferred", [(), ("l1",), ("head_l1", "l1"), ("l1", "head_l1")])
def test_preferred_methods_go_to_the_kinds_they_can(dense: Any, preferred: tuple[str, ...]) -> None:
    scheme = {A: [pair(0.25, 0.3)], WI: [Entry(0.3)]}
    assert made(dense, scheme, *preferred) == [
        (A, pair(0.25, 0.3, "head_l1", "l1"), True, True),
        (WI, Entry(0.3, "l1"), True, False),
    ]


def test_a_preferred_method_replaces_the_default_for_plain_rates_only(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from composable import methods

    other = replace(methods.L1, name="other")
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, other))
    scheme = {WI: [Entry(0.3), Entry(0.3, "l1")], A: [pair(0.25, 0.3), pair(0.25, 0.3, None, "l1")]}
    assert made(dense, scheme, "other") == [
        (WI, Entry(0.3, "other"), True, False),
        (WI, Entry(0.3, "l1"), False, False),
        (A, pair(0.25, 0.3, "head_l1", "other"), True, True),
        (A, pair(0.25, 0.3, "head_l1", "l1"), True, False),
    ]


def one(dense: Any, name: str, entry: Entry) -> Variant:
    (variant,) = make_variants(dense, {name: [entry]})
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


@pytest.mark.parametrize("name", [A, FFN, LAYER])
def test_removed_modules_have_no_tensors(dense: Any, name: str) -> None:
    variant = one(dense, name, Entry(1.0))
    assert (variant.removed, variant.kept_units, variant.tensors, variant.masks) == (
        True, None, {}, {},
    )  # fmt: skip


def test_the_dense_model_stays_as_it_is() -> None:
    dense, untouched = tiny.checkpoint(), tiny.checkpoint()
    variants = make_variants(dense, {A: [pair(0.5, 0.5)], WI: [Entry(0.5)], LAYER: [Entry(1.0)]})
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
            "(methods that do: head_l1, head_gram, ranked)",
        ),
        ({WI: [Entry(0.3, "head_l1")]}, "head_l1 does not prune modules of kind linear"),
        ({A: [pair(0.25, 0.3, None, "head_l1")]}, f'"{A}.o" at rate 0.3: head_l1 does not prune'),
        (
            {WI: [Entry(0.3, "magic")]},
            'unknown method "magic"; known are l1, wanda, obs, ',
        ),
        (
            {WI: [Entry(1.0, "magic")]},
            'unknown method "magic"; known are l1, wanda, obs, ',
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


def test_an_unknown_preferred_method_is_refused(dense: Any) -> None:
    with pytest.raises(UserError, match='unknown method "magic"'):
        make_variants(dense, {WI: [Entry(0.3)]}, ("magic",))
