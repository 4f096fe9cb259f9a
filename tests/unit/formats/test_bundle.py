"""The bundle of variants: what is written, what is refused, what is read, what is chosen."""

import hashlib
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from composable.errors import FormatError, MismatchError
from composable.formats.bundle import Bundle, Reader, Variant, choose, open_bundle, write
from composable.formats.config import Entry
from tests.npy import as_npy, read_sizes, rewrite_header
from tests.paths import ROOT

PLAIN = frozenset({""})
ATTENTION = "encoder.block.0.layer.0.SelfAttention"
FFN = "decoder.block.0.layer.2.DenseReluDense"
LINEAR = f"{FFN}.wo"
GOLDEN_SHA256 = "4f1603ee0b4b5eb6bd21fcd67cf12a7de10ac721515a9d8ec51afa7097cded05"
GOLDEN_SIZE = 1958


def linear(rate: float = 0.5, module: str = LINEAR, **changes) -> Variant:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    weight = torch.tensor([[1.0, 0.0, -2.5], [0.0, 0.0, 0.25]])
    settings = {"kind": "linear", "entry": Entry(rate, "l1"), "plain": PLAIN}
    settings |= {"tensors": {"weight": weight}, "masks": {"weight": mask}, **changes}
    return Variant(module=module, **settings)


def attention(**changes) -> Variant:
    tensors = {"q.weight": torch.ones(2, 2), "o.weight": torch.tensor([[0.0, 3.0], [4.0, 0.0]])}
    settings = {
        "kind": "attention",
        "entry": Entry(0.25, "head_l1", {"o": Entry(0.3, "l1")}),
        "plain": frozenset({"", "o"}),
        "kept_units": [0, 2, 3],
        "tensors": tensors,
        "masks": {"o.weight": tensors["o.weight"] != 0},
        "stats": {"error_before": 0.5, "error_after": 0.125},
    }
    return Variant(module=ATTENTION, **{**settings, **changes})


def without_up(**changes) -> Variant:
    """An ffn that keeps all its neurons and loses a linear as a whole."""
    entry = Entry(0.0, None, {"wi": Entry(1.0, "identity"), "wo": Entry(0.3, "l1")})
    settings = {"kind": "ffn", "entry": entry, "plain": frozenset({"wi"})}
    settings |= {"tensors": {"wo.weight": torch.ones(2)}, **changes}
    return Variant(module=FFN, **settings)


def golden() -> Bundle:
    gone = Variant("encoder.block.1", "layer", Entry(1.0, "removal"), PLAIN, removed=True)
    return Bundle("f" * 64, [attention(), linear(), gone], {"history": ["prune"]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "modules.npy", golden())
    return tmp_path / "modules.npy"


def assert_same(left: Variant, right: Variant) -> None:
    assert left.facts() == right.facts()
    for mine, other in ((left.tensors, right.tensors), (left.masks, right.masks)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        assert all(mine[name].dtype == other[name].dtype for name in mine)


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        open_bundle(path).load_all()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


# ------------------------------------------------------------------------------- round trip


def test_what_was_written_is_read(path: Path) -> None:
    reader = open_bundle(path, "f" * 64)
    assert reader.options == {"history": ["prune"]}
    assert reader.fingerprint == "f" * 64
    for written, read in zip(golden().variants, reader.load_all(), strict=True):
        assert_same(written, read)


def test_golden_bytes(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) == GOLDEN_SIZE
    assert hashlib.sha256(content).hexdigest() == GOLDEN_SHA256, "raise VERSION, then the pin"


def test_order_of_the_tensors_in_memory_does_not_change_the_bytes(path: Path) -> None:
    other = golden()
    other.variants[0].tensors = dict(reversed(other.variants[0].tensors.items()))
    write(path.with_name("other.npy"), other)
    assert path.read_bytes() == path.with_name("other.npy").read_bytes()


def test_the_safetensors_library_reads_the_payload(path: Path) -> None:
    tensors = safetensors.torch.load(np.load(path).tobytes())
    assert torch.equal(tensors["0/q.weight"], torch.ones(2, 2))
    assert tensors["1/weight.values"].tolist() == [1.0, -2.5, 0.25]
    assert tensors["1/weight.mask"].tolist() == [0b10100100]
    assert set(tensors) == {
        *("0/q.weight", "0/o.weight.values", "0/o.weight.mask"),
        *("1/weight.values", "1/weight.mask"),
    }


def test_header_and_float_tensors_are_aligned(path: Path) -> None:
    payload = np.load(path).tobytes()
    length = int.from_bytes(payload[:8], "little")
    assert length % 8 == 0
    header = json.loads(payload[8 : 8 + length])
    floats = [t["data_offsets"][0] for t in header.values() if t.get("dtype") == "F32"]
    assert floats
    assert all(begin % 4 == 0 for begin in floats)


def read_as_the_page_says(path: Path) -> dict[str, tuple[dict, dict]]:
    """Read a bundle with nothing but docs/formats.md: no numpy, no torch, no safetensors."""
    content = path.read_bytes()
    size = len(content) - 128
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".ljust(117) + "\n"
    assert content[:128] == b"\x93NUMPY\x01\x00v\x00" + text.encode()
    (length,) = struct.unpack_from("<Q", content, 128)
    header = content[136 : 136 + length]
    entries, data = json.loads(header), content[136 + length :]
    metadata = entries.pop("__metadata__")
    blank = header[:29] + b"0" * 64 + header[93:]
    assert hashlib.sha256(blank).hexdigest() == metadata["checksum"]
    variants = {}
    for index, record in enumerate(json.loads(metadata["variants"])):
        tensors = {}
        for tensor in record["tensors"]:
            suffixes = [""] if tensor["kept"] is None else [".values", ".mask"]
            offsets = [entries[f"{index}/{tensor['name']}{s}"]["data_offsets"] for s in suffixes]
            raw = [data[begin:end] for begin, end in offsets]
            assert hashlib.sha256(b"".join(raw)).hexdigest() == tensor["sha256"]
            values = iter(struct.unpack(f"<{len(raw[0]) // 4}f", raw[0]))
            count = math.prod(tensor["shape"])
            bits = [raw[-1][i // 8] >> (7 - i % 8) & 1 for i in range(count * (len(raw) - 1))]
            tensors[tensor["name"]] = [next(values) if b else 0.0 for b in bits] or list(values)
        variants[record["module"]] = (record, tensors)
    return variants


def test_a_reader_written_from_the_page_alone(path: Path) -> None:
    read = read_as_the_page_says(path)
    for variant in golden().variants:
        record, tensors = read[variant.module]
        assert record["rate"] == variant.entry.rate
        assert record["kept_units"] == variant.kept_units
        assert tensors == {k: t.flatten().tolist() for k, t in variant.tensors.items()}


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,), (7,), (8,), (9,), (2, 3, 5)])
def test_shapes_and_mask_sizes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) % 3
    for masks in ({}, {"weight": weight != 0}):
        written = linear(tensors={"weight": weight}, masks=masks)
        write(tmp_path / "b.npy", Bundle("f", [written]))
        assert_same(written, open_bundle(tmp_path / "b.npy").load_all()[0])


def test_views_and_parameters_are_written_as_what_they_show(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    write(tmp_path / "b.npy", Bundle("f", [linear(tensors={"weight": weight}, masks={})]))
    assert open_bundle(tmp_path / "b.npy").load_all()[0].tensors["weight"].tolist() == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]


def test_an_empty_bundle_is_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "b.npy", Bundle("f", []))
    assert open_bundle(tmp_path / "b.npy").load_all() == []
    assert safetensors.torch.load(np.load(tmp_path / "b.npy").tobytes()) == {}


def test_masked_tensors_are_compact(tmp_path: Path) -> None:
    weight = torch.randn(256, 256)
    weight[torch.arange(256) % 4 != 0] = 0
    sparse = linear(tensors={"weight": weight}, masks={"weight": weight != 0})
    write(tmp_path / "sparse.npy", Bundle("f", [sparse]))
    expected = 256 * 256 * 4 // 4 + 256 * 256 // 8
    assert expected <= (tmp_path / "sparse.npy").stat().st_size < expected + 2000


# ---------------------------------------------------------------------------------- refused


def test_a_flipped_tensor_is_named_and_others_load(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\xff")  # the last byte is the mask of variant 1
    reader = open_bundle(path)
    reader.load(reader.records[0])
    expected = f'tensor "weight" of "{LINEAR}" is damaged (its SHA-256 differs'
    with pytest.raises(FormatError, match=re.escape(expected)):
        reader.load(reader.records[1])
    with pytest.raises(FormatError, match="damaged"):
        reader.load_all()
    with pytest.raises(FormatError, match="damaged"):
        reader.load_all()


def test_every_byte_of_the_data_is_checked(path: Path) -> None:
    """The container's own checks are in test_container.py."""
    content = path.read_bytes()
    start = 136 + int.from_bytes(content[128:136], "little")
    assert len(content) - start == 16 + 8 + 1 + 12 + 1  # q, values and mask of o and of the linear
    for position in range(start, len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert "is damaged (its SHA-256 differs" in refused(path)


def test_an_older_version(path: Path) -> None:
    rewrite_header(path, '"version":"4"', '"version":"3"')
    found = refused(path)
    assert "made by another version (format version '3', this program reads '4')" in found
    assert found.endswith("make it again with prune.py.")


def test_another_models_bundle(path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        open_bundle(path, "e" * 64)
    assert str(caught.value) == (
        f"{path}: made for another model (fingerprint ffffffffffff, this one has eeeeeeeeeeee); "
        "give the model it was made from, or run prune.py on this one."
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('\\"shape\\":[2,3]', '\\"shape\\":[2,9]', "names, types, shapes or offsets"),
        ('\\"shape\\":[2,3]', '\\"shape\\":[2,-3]', "shapes are sizes"),
        ('\\"shape\\":[2,3]', '\\"shape\\":[2,3.0]', "shapes are sizes"),
        ('\\"kept\\":3', '\\"kept\\":-3', "kept values are counted"),
        ('\\"kept\\":3', '\\"kept\\":true', "kept True has the wrong type"),
        ('\\"kept_units\\":[0,2,3]', '\\"kept_units\\":[0,3,2]', "kept_units are numbers, asc"),
        ('\\"kept_units\\":[0,2,3]', '\\"kept_units\\":[0,2,2]', "kept_units are numbers, asc"),
        ('\\"kept_units\\":[0,2,3]', '\\"kept_units\\":[[],{},3]', "kept_units are numbers, asc"),
        ('\\"rate\\":0.25', '\\"rate\\":1.25', "rate 1.25 is not a number from 0 to 1"),
        ('\\"rate\\":0.25', '\\"rate\\":1e999', "1e999 is not a number"),
        ('\\"rate\\":0.25', '\\"rate\\":0.0', "rate 0 (head_l1) has a method and prunes nothing"),
        ('\\"rate\\":0.3', '\\"rate\\":0.0', "needs no variant"),
        ('\\"rate\\":0.3', '\\"rate\\":1.0', "a linear cannot be removed whole"),
        ('{\\"method\\":\\"l1\\",\\"rate\\":0.3}', "0.3", "0.3 has not the keys"),
        ('{\\"o\\":{', '{\\"p\\":{', "a part that is left has a weight"),
        ('[\\"\\",\\"o\\"]', '[\\"o\\",\\"\\"]', "are no ascending keys"),
        ('[\\"\\",\\"o\\"]', "[1]", "are no ascending keys"),
        ('[\\"\\",\\"o\\"]', '[\\"\\",\\"p\\"]', "plain are keys of what was pruned"),
        ('\\"rate\\":0.25', '\\"rate\\":true', "rate True has the wrong type"),
        ('\\"rate\\":1.0', '\\"rate\\":0.9,\\"rate\\":1.0', 'key "rate" occurs twice'),
        ('\\"removed\\":true', '\\"removed\\":false', "rate 1 means removed"),
        ('\\"removed\\":false', '\\"removed\\":true', "a removed variant has nothing else"),
        (
            '\\"error_after\\":0.125',
            '\\"error_after\\":1e999',
            "1e999 is not a number",
        ),
        ('\\"error_after\\":0.125', '\\"error_after\\":\\"low\\"', "stats are finite"),
        ('\\"method\\":\\"l1\\",\\"module', '\\"method\\":\\"\\",\\"module', "is not a name"),
        ('\\"method\\":\\"head_l1\\",', "", "has not the keys"),
        ('\\"kind\\":\\"linear\\"', '\\"kind\\":\\"conv\\"', "kind is one of attention, ffn"),
        (
            '\\"kind\\":\\"attention\\"',
            '\\"kind\\":\\"ffn\\"',
            "an attention above rate 0 or an ffn",
        ),
        ('\\"name\\":\\"o.weight\\"', '\\"name\\":\\"z.weight\\"', "tensors are sorted by name"),
        ('"options":"{', '"options":"[{', "header: "),
        ('"options"', '"opinions"', "has not the keys"),
    ],
)
def test_a_wrong_header_with_a_right_checksum(
    path: Path, old: str, new: str, expected: str
) -> None:
    rewrite_header(path, old, new)
    assert expected in refused(path)


def test_mask_and_values_must_agree(path: Path) -> None:
    payload = np.load(path).tobytes()
    count = "mask bits are set, there are 3 values"
    cases = {0b10100000: f"2 {count}", 0b10110100: f"4 {count}", 0b10100001: "bits after its 6"}
    for mask, message in cases.items():
        raw = struct.pack("<3f", 1.0, -2.5, 0.25), bytes([mask])
        old = read_as_the_page_says(path)[LINEAR][0]["tensors"][0]["sha256"]
        as_npy(path.with_name("c.npy"), payload[:-1] + raw[1])
        rewrite_header(path.with_name("c.npy"), old, hashlib.sha256(b"".join(raw)).hexdigest())
        assert message in refused(path.with_name("c.npy"))


def test_integers_may_stand_for_whole_rates(path: Path) -> None:
    rewrite_header(path, '\\"rate\\":1.0', '\\"rate\\":1')
    assert open_bundle(path).records[2].entry == Entry(1.0, "removal")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (lambda: linear(tensors={"weight": torch.tensor([1.0, torch.nan])}, masks={}), "has NaN"),
        (lambda: linear(tensors={"weight": torch.tensor([-torch.inf])}, masks={}), "infinite"),
        (lambda: linear(tensors={"weight": torch.ones(2).double()}, masks={}), "torch.float64"),
        (lambda: linear(masks={"bias": torch.ones(1).bool()}), "no tensor of the same name"),
        (lambda: linear(masks={"weight": torch.ones(2, 2).bool()}), "not a bool tensor"),
        (lambda: linear(masks={"weight": torch.zeros(2, 3).bool()}), "is not zero everywhere"),
        (lambda: linear(stats={"error": math.nan}), "are not finite"),
        (lambda: linear(entry=Entry(0.5)), "needs a rate above 0 and a method"),
        (lambda: linear(rate=0.0), "needs a rate above 0"),
        (lambda: linear(rate=1.0), "rate 1 means removed"),
        (lambda: linear(plain=frozenset({"o"})), "plain are keys of what was pruned"),
        (lambda: without_up(kind="attention"), "an attention above rate 0 or an ffn"),
        (lambda: attention(kept_units=[2, 1]), "kept_units are numbers, ascending"),
        (lambda: attention(gqa="all"), "gqa is per-group or whole-groups"),
    ],
)
def test_what_is_not_written(tmp_path: Path, variant, expected: str) -> None:
    with pytest.raises(FormatError, match=expected) as caught:
        write(tmp_path / "b.npy", Bundle("f", [attention(), variant()]))
    assert str(caught.value).startswith(f"{tmp_path / 'b.npy'}: not written: ")
    assert list(tmp_path.iterdir()) == []


def test_non_finite_values_name_the_module(tmp_path: Path) -> None:
    spoiled = linear(tensors={"weight": torch.full((2, 3), torch.nan)}, masks={})
    with pytest.raises(FormatError, match=f'"{LINEAR}", tensor "weight" has NaN'):
        write(tmp_path / "b.npy", Bundle("f", [spoiled]))


def test_one_variant_twice_and_colliding_names(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="two variants of one module have the same rate"):
        write(tmp_path / "b.npy", Bundle("f", [linear(), linear()]))
    weight = linear().tensors["weight"]
    both = linear(tensors={"weight": weight, "weight.values": weight})
    with pytest.raises(FormatError, match=r'two tensors have the name "0/weight\.values"'):
        write(tmp_path / "b.npy", Bundle("f", [both]))


# ----------------------------------------------------------------------- resources and disk


def test_loading_one_variant_reads_only_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 128)  # 32 KiB each
    names = [f"m.{i}" for i in range(16)]
    variants = [
        linear(module=n, tensors={"weight": weight + i}, masks={}) for i, n in enumerate(names)
    ]
    write(tmp_path / "big.npy", Bundle("f", variants))
    sizes = read_sizes(monkeypatch)
    reader = open_bundle(tmp_path / "big.npy")
    assert sum(sizes) < 16 * 1024, "the header alone"
    sizes.clear()
    variant = reader.load(reader.records[7])
    assert torch.equal(variant.tensors["weight"], weight + 7)
    assert sizes == [64 * 128 * 4]


def test_writing_needs_no_second_copy(tmp_path: Path) -> None:
    code = f"""
import resource, torch
from pathlib import Path
from tests.unit.formats.test_bundle import linear
from composable.formats.bundle import Bundle, write
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(Path({str(tmp_path / "small.npy")!r}), Bundle("f", [linear()]))
tensors = [torch.full((2 ** 21,), float(i)) for i in range(16)]  # 8 MiB each, 128 in all
variants = [linear(module=f"{{t[0]}}", tensors=dict(weight=t), masks={{}}) for t in tensors]
before = peak()
write(Path({str(tmp_path / "big.npy")!r}), Bundle("f", variants))
print((peak() - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    grown = int(done.stdout)
    assert (tmp_path / "big.npy").stat().st_size > 128 << 20
    assert grown < 40, f"{grown} MiB more while writing 128"


# ----------------------------------------------------------------------------------- choose


def reader_of(folder: Path, name: str, *variants: Variant) -> Reader:
    write(folder / name, Bundle("f", list(variants)))
    return open_bundle(folder / name)


def test_choose_answers_in_the_order_of_the_configuration(path: Path) -> None:
    wanted = {
        "encoder.block.1": Entry(1),
        LINEAR: Entry(0.5),
        "untouched": Entry(0, "l1"),
        ATTENTION: Entry(0.25, None, {"o": Entry(0.3)}),
    }
    reader = open_bundle(path)
    chosen = choose([reader], wanted)
    assert [record.module for _, record in chosen] == ["encoder.block.1", LINEAR, ATTENTION]
    assert chosen[0][1].removed
    assert all(found is reader for found, _ in chosen)


def pair(method: str | None = None, o_method: str | None = None, rate: float = 0.3) -> Entry:
    return Entry(0.25, method, {"o": Entry(rate, o_method)})


@pytest.mark.parametrize(
    ("variant", "wanted", "is_answer"),
    [
        (linear(), Entry(0.5), True),
        (linear(), Entry(0.5, "l1"), True),
        (linear(), Entry(0.5, "stat"), False),
        (linear(), Entry(0.4), False),
        (linear(plain=frozenset()), Entry(0.5), False),
        (linear(plain=frozenset()), Entry(0.5, "l1"), True),
        (attention(), pair(), True),
        (attention(), pair("head_l1"), True),
        (attention(), pair(rate=0.4), False),
        (attention(), Entry(0.25), False),
        (attention(plain=PLAIN), pair(), False),
        (attention(plain=PLAIN), pair(None, "l1"), True),
        (attention(plain=frozenset({"o"})), pair(), False),
        (attention(plain=frozenset()), pair("head_l1", "l1"), True),
        (attention(entry=Entry(0.25, "head_l1"), plain=PLAIN), pair(), False),
        (without_up(), Entry(0.0, None, {"wi": Entry(1.0), "wo": Entry(0.3, "l1")}), True),
        (without_up(), Entry(0.0, None, {"wi": Entry(1.0), "wo": Entry(0.3)}), False),
        (without_up(), Entry(0.0, None, {"wi": Entry(1.0)}), False),
    ],
)
def test_which_variant_answers(
    tmp_path: Path, variant: Variant, wanted: Entry, is_answer: bool
) -> None:
    """Rates and methods of the module and of every part; plain entries where made for them."""
    reader = reader_of(tmp_path, "b.npy", variant)
    if is_answer:
        assert choose([reader], {variant.module: wanted})[0][1].entry == variant.entry
    else:
        with pytest.raises(MismatchError, match="no variant of"):
            choose([reader], {variant.module: wanted})


def test_the_message_lists_what_there_is(tmp_path: Path) -> None:
    explicit = linear(rate=0.75, entry=Entry(0.75, "stat"), plain=frozenset())
    reader = reader_of(tmp_path, "b.npy", linear(0.25), linear(0.5), explicit)
    with pytest.raises(MismatchError) as caught:
        choose([reader], {LINEAR: Entry(0.3)}, number=1)
    assert str(caught.value) == (
        f'{tmp_path}/b.npy: no variant of "{LINEAR}" at rate 0.3 (has 0.25, 0.5, 0.75 (stat)); '
        "prune it, or change configuration 1."
    )
    with pytest.raises(MismatchError, match=re.escape("(has none); prune it, or change the conf")):
        choose([reader], {"elsewhere": Entry(0.3)})
    with pytest.raises(MismatchError, match=re.escape("0.5 (stat) (has 0.25 (l1), 0.5 (l1)")):
        choose([reader], {LINEAR: Entry(0.5, "stat")})


def test_several_bundles(tmp_path: Path) -> None:
    first = reader_of(tmp_path, "a.npy", linear())
    same = reader_of(tmp_path, "b.npy", linear(entry=Entry(0.5, "other"), stats={"x": 1.0}))
    weight = linear().tensors["weight"] * 2
    other = reader_of(tmp_path, "c.npy", linear(tensors={"weight": weight}))
    assert choose([first, same], {LINEAR: Entry(0.5)})[0][0] is first
    with pytest.raises(MismatchError) as caught:
        choose([same, other], {LINEAR: Entry(0.5)})
    assert str(caught.value) == (
        f'two different variants of "{LINEAR}" answer rate 0.5: {tmp_path}/b.npy (rate 0.5 '
        f"(other)) and {tmp_path}/c.npy (rate 0.5 (l1)); leave one bundle out, or, where the "
        "methods differ, name one in the configuration."
    )
    # methods meet where the configuration names them
    assert choose([same, other], {LINEAR: Entry(0.5, "other")})[0][0] is same


def test_content_digest(path: Path) -> None:
    for record, variant in zip(open_bundle(path).records, golden().variants, strict=True):
        assert record.digest == variant.digest
    base = linear()
    unmasked = linear(masks={})
    negated = linear(tensors={"weight": -base.tensors["weight"]})
    moved = linear(module="elsewhere")
    digests = {variant.digest for variant in (base, unmasked, negated, moved)}
    assert len(digests) == 4
    assert attention().digest != attention(kept_units=[0, 1, 2]).digest
    assert linear(stats={"x": 1.0}, plain=frozenset(), entry=Entry(0.5, "y")).digest == base.digest
