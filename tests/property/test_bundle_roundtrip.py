"""Random bundles: what is written is read."""

import tempfile
from pathlib import Path

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import safetensors.torch
import torch
from hypothesis import given, settings

from composable.formats.bundle import Bundle, Variant, open_bundle, write
from composable.formats.config import Entry

names = st.from_regex(r"[a-zäπ]{1,6}(\.[a-z0-9]{1,4}){0,2}", fullmatch=True)
rates = st.floats(0, 1, exclude_min=True, exclude_max=True)
methods = st.sampled_from(["l1", "head_l1", "stat"])
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("k"), inner),
    max_leaves=5,
)


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    kind = draw(st.sampled_from(["attention", "ffn", "linear", "layer"]))
    removed = draw(st.booleans())
    parts = {}
    if kind in ("attention", "ffn") and not removed:
        rates_of_parts = rates if kind == "attention" else st.just(1.0)
        entries = st.builds(Entry, rates_of_parts, methods)
        parts = draw(st.dictionaries(names, entries, max_size=2))
    if kind == "ffn" and parts:  # it keeps its neurons and loses linears
        entry = Entry(0.0, None, parts)
    else:
        entry = Entry(1.0 if removed else draw(rates), draw(methods), parts)
    plain = draw(st.frozensets(st.sampled_from(sorted(entry.removals))))
    variant = Variant(draw(names), kind, entry, plain, removed=removed)
    variant.stats = draw(st.dictionaries(names, finite, max_size=2))
    if not removed:
        variant.kept_units = draw(st.none() | st.sets(st.integers(0, 99)).map(sorted))
        left = {f"{key}.weight" for key, part in parts.items() if part.rate < 1}
        for name in sorted(left | draw(st.sets(names, max_size=3))):
            add_tensor(draw, variant, name)
    return variant


def add_tensor(draw: st.DrawFn, variant: Variant, name: str) -> None:
    shape = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
    values = draw(arrays.arrays(np.float32, shape, elements=finite))
    if draw(st.booleans()):
        mask = draw(arrays.arrays(bool, values.shape))
        values = np.where(mask, values, np.float32(0))
        variant.masks[name] = torch.tensor(mask)
    variant.tensors[name] = torch.tensor(values)


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    unique = st.lists(variants(), max_size=4, unique_by=lambda v: (v.module, v.entry))
    options = st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=2)
    return Bundle(
        draw(st.text("0123456789abcdef", min_size=64, max_size=64)), draw(unique), draw(options)
    )


def assert_same(left: Variant, right: Variant) -> None:
    assert left.facts() == right.facts()
    for mine, other in ((left.tensors, right.tensors), (left.masks, right.masks)):
        assert mine.keys() == other.keys()
        for name in mine:
            # As bytes: -0.0 is a value of its own where it is not masked.
            assert mine[name].shape == other[name].shape
            assert mine[name].numpy().tobytes() == other[name].numpy().tobytes()


@settings(deadline=None)
@given(bundle=bundles())
def test_written_then_read_is_equal(bundle: Bundle) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b.npy"
        write(path, bundle)
        reader = open_bundle(path, bundle.fingerprint)
        assert reader.options == bundle.options
        read = reader.load_all()
        for written, loaded in zip(bundle.variants, read, strict=True):
            assert_same(written, loaded)
            assert written.digest == loaded.digest
        safetensors.torch.load(np.load(path).tobytes())
        write(path.with_name("again.npy"), Bundle(reader.fingerprint, read, reader.options))
        assert path.read_bytes() == path.with_name("again.npy").read_bytes()
