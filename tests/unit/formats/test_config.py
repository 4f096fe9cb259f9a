"""conf.json and conf_prune.json: every refusal with the value it names, and the transpose."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composable.errors import ConfigError, FormatError
from composable.families.base import Module
from composable.formats import config
from composable.formats.config import Entry

METHODS = ("head_l1", "l1", "linear_map")
PARTS = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "o"))
LAYER, LAYER1 = "encoder.block.0", "encoder.block.1"
ATTENTION = f"{LAYER}.layer.0.SelfAttention"
FFN = f"{LAYER}.layer.1.DenseReluDense"
OUT, WI, WO = f"{ATTENTION}.o", f"{FFN}.wi", f"{FFN}.wo"
CROSS = "decoder.block.0.layer.1.EncDecAttention"

_MODULES = [
    Module(LAYER, "layer", "encoder"),
    Module(ATTENTION, "attention", "encoder", PARTS, ATTENTION, 4, 8, 4),
    Module(OUT, "linear", "encoder"),
    Module(FFN, "ffn", "encoder", (("up", "wi"), ("down", "wo"))),
    Module(WI, "linear", "encoder"),
    Module(WO, "linear", "encoder"),
    Module(LAYER1, "layer", "encoder"),
    Module("decoder.block.0", "layer", "decoder"),
    Module(CROSS, "attention", "decoder", PARTS, CROSS, 4, 8, 4, True),
    Module(f"{CROSS}.o", "linear", "decoder"),
]
MODULES = {module.name: module for module in _MODULES}


def written(folder: Path, content: Any, name: str = "conf.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- entries -------------------------------------------------------------------------------------

ENTRIES = [
    (0.5, Entry(0.5)),
    (0, Entry(0)),
    (1, Entry(1)),
    (0.30000000000000004, Entry(0.1 + 0.2)),
    ({"rate": 0.5, "method": "head_l1"}, Entry(0.5, "head_l1")),
    ({"rate": 0, "method": "l1"}, Entry(0, "l1")),
    ({"rate": 0.25, "parts": {"o": 0.3}}, Entry(0.25, None, {"o": Entry(0.3)})),
    (
        {"rate": 0, "parts": {"gate_proj": 1, "up_proj": 1}},
        Entry(0.0, None, {"up_proj": Entry(1.0), "gate_proj": Entry(1.0)}),
    ),
    (
        {"rate": 0.25, "method": "head_l1", "parts": {"o": {"rate": 0.3, "method": "l1"}}},
        Entry(0.25, "head_l1", {"o": Entry(0.3, "l1")}),
    ),
    (
        {"rate": 1, "method": "l1", "through": "encoder.block.3"},
        Entry(1.0, "l1", through="encoder.block.3"),
    ),
]


@pytest.mark.parametrize(("value", "entry"), ENTRIES)
def test_entry_there_and_back(value: Any, entry: Entry) -> None:
    assert Entry.parse(value, "here", METHODS) == entry
    assert entry.to_json() == value
    assert json.dumps(entry.to_json()) == json.dumps(value)


def test_equal_entries() -> None:
    assert Entry.parse(1, "") == Entry.parse(1.0, "") == Entry.parse({"rate": 1}, "")
    assert json.dumps(Entry.parse(1.0, "").to_json()) == "1"
    assert json.dumps(Entry.parse(-0.0, "").to_json()) == "0"
    assert Entry.parse(0.3, "") != Entry.parse(0.1 + 0.2, "")
    assert Entry.parse({"rate": 0.3, "method": "l1"}, "") != Entry.parse(0.3, "")


def test_entries_have_a_name() -> None:
    assert str(Entry(1.0)) == "rate 1"
    assert str(ENTRIES[-2][1]) == "rate 0.25 (head_l1) with o at rate 0.3 (l1)"
    assert str(ENTRIES[-3][1]) == "rate 0 with gate_proj at rate 1 and up_proj at rate 1"
    assert str(ENTRIES[-1][1]) == "rate 1 (l1) through encoder.block.3"


BAD_ENTRIES = [
    (1.5, "rate 1.5 is not a number from 0 to 1"),
    (-0.1, "rate -0.1 is not a number from 0 to 1"),
    (float("nan"), "rate NaN is not"),
    (float("inf"), "rate Infinity is not"),
    (10**400, "rate 1000000000"),
    ("0.5", 'rate "0.5" is not a number'),
    (True, "rate true is not a number"),
    (None, "rate null is not a number"),
    ([0.5], "rate [0.5] is not a number"),
    ({}, '{} has no "rate"'),
    ({"method": "l1"}, '{"method": "l1"} has no "rate"'),
    ({"rate": 2}, "rate 2 is not a number"),
    ({"rate": 0.5, "ratio": 1}, 'unknown key "ratio"; known: rate, method'),
    ({"rate": 0.5, "method": "l2"}, 'unknown method "l2"; known: head_l1, l1, linear_map'),
    ({"rate": 0.5, "method": None}, "method null is not a name"),
    ({"rate": 0.5, "method": ""}, 'method "" is not a name'),
    ({"rate": 0.5, "method": 7}, "method 7 is not a name"),
    ({"rate": 1, "method": "l1", "through": 3}, '"through" is 3; write the path of a layer'),
    ({"rate": 1, "method": "l1", "through": "last"}, '"through" is "last"; write the path'),
    ({"rate": 1, "through": "e.block.3"}, "replaces a block of layers; write"),
    ({"rate": 0.5, "method": "l1", "through": "e.block.3"}, "replaces a block of layers; write"),
]


def with_o(rate: Any, o: Any, **more: Any) -> dict[str, Any]:
    return {"rate": rate, "parts": {"o": o}, **more}


BAD_IN_SCHEMES = [
    (1.5, "rate 1.5 is not a number from 0 to 1"),
    (with_o(1, 1, method="l1", through="e.block.3"), "replaces a block of layers"),
    (with_o(0.5, 3), 'part "o": rate 3 is not a number'),
    (with_o(0.5, {"rate": 0.5, "method": "l2"}), 'part "o": unknown method "l2"'),
    (with_o(0.5, with_o(0.5, 0.5)), '"parts" inside "parts"'),
    (with_o(0.5, {"rate": 1, "method": "l1", "through": "e.1"}), '"through" inside "parts"'),
    (with_o(0.5, 0), 'part "o": rate 0 needs no variant'),
    (with_o(0, 0.5), "rate 0 with o at rate 0.5; the module keeps all its units, so write"),
    (with_o(0, 1, method="head_l1"), "rate 0 (head_l1) has a method and prunes nothing"),
    (with_o(1, 0.3), 'part "o": the module is removed whole (rate 1), so nothing is left'),
    (with_o(0.5, 1), 'part "o": a linear cannot be removed whole (rate 1)'),
    ({"rate": 0.5, "parts": {"": 0.5}}, '"parts": "" is not the path'),
    ({"rate": 0.5, "parts": {}}, '"parts" is {}, an object {part: entry} was expected'),
    ({"rate": 0.5, "parts": 0.3}, '"parts" is 0.3, an object'),
    ({"rate": 0.5, "o": 0.3}, 'unknown key "o"; known: rate, method, parts'),
    (0, "0 has rate 0, which needs no variant"),
    ({"rate": 0, "method": "l1"}, "has rate 0"),
]


@pytest.mark.parametrize(("value", "message"), BAD_ENTRIES)
def test_bad_entry(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Entry.parse(value, f'conf.json[1]: "{ATTENTION}"', METHODS)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f'conf.json[1]: "{ATTENTION}"')
    assert len(str(caught.value)) < 250


def test_unknown_methods_pass_where_the_caller_knows_none() -> None:
    assert Entry.parse({"rate": 0.5, "method": "l2"}, "").method == "l2"


# --- conf.json -----------------------------------------------------------------------------------

BAD_FILES = [
    ("[1", FormatError, "not a JSON file"),
    (f'[{{"{ATTENTION}": 0.1, "{ATTENTION}": 0.2}}]', FormatError, f'"{ATTENTION}" occurs twice'),
    (f'[{{"{ATTENTION}": NaN}}]', FormatError, "NaN"),
    (f'[{{"{ATTENTION}": 1e999}}]', FormatError, "1e999 is not a number that JSON"),
    (f'[{{"{ATTENTION}": {{"rate": 0.5, "rate": 0.5}}}}]', FormatError, '"rate" occurs twice'),
    ([{}, {ATTENTION: 1.5}], ConfigError, f'conf.json[1]: "{ATTENTION}": rate 1.5 is not a number'),
    ({ATTENTION: 0.5}, ConfigError, "a list of configurations was expected"),
    ("0.5", ConfigError, "conf.json: holds 0.5"),
    ([], ConfigError, "conf.json: [] holds no configuration"),
    ([{}, 0.5], ConfigError, "conf.json[1]: holds 0.5, an object"),
    ([{}, [ATTENTION]], ConfigError, "conf.json[1]: holds ["),
    ([{"": 0.5}], ConfigError, 'conf.json[0]: "" is not the path'),
    ([{"a\nb": 0.5}], ConfigError, '"a\\nb" is not the path'),
    ('[{"\\ud800": 0.5}]', FormatError, "surrogates not allowed"),
    ([{"a" * 1001: 0.5}], ConfigError, "aaa... is not the path"),
    *(
        (
            [{"encoder.block.0": {"rate": 1, "method": "m", "through": f"encoder.block.{last}"}}],
            ConfigError,
            "write the path of a layer",
        )
        for last in ("99999999999", "9" * 5000, "\u0663", "01")
    ),
    (
        [
            {f"encoder.block.{i}": {"rate": 1, "method": "m", "through": "encoder.block.9999"}}
            for i in range(11)
        ],
        ConfigError,
        "conf.json: its blocks are 109945 layers, at most 100000 were expected",
    ),
    (
        [{ATTENTION: with_o(0.5, 0.3)}],
        ConfigError,
        f'one key for each, "{ATTENTION}" and "{OUT}"',
    ),
]


@pytest.mark.parametrize(("content", "error", "message"), BAD_FILES)
def test_bad_configurations(tmp_path: Path, content: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        config.read_configurations(written(tmp_path, content))
    assert message in str(caught.value)
    assert "conf.json" in str(caught.value)


OTHER = "encoder.block.9.layer.0.SelfAttention"


def block(through: str) -> dict[str, Any]:
    return {"rate": 1, "method": "linear_map", "through": through}


BAD_FOR_MODEL = [
    ({OTHER: 0.5}, f'conf.json[1]: no module "{OTHER}" in this model'),
    ({OTHER: 0.5}, "(2 encoder and 1 decoder layers; nearest: encoder.block.0.layer.0.SelfAtt"),
    ({OTHER: 0.5}, "run config_generator.py -m model.pth for the names"),
    ({OTHER: 0}, f'no module "{OTHER}"'),
    ({f"{FFN}.wi_0": 0.5}, f"nearest: {WI}"),
    ({WI: 1}, f'"{WI}": a linear cannot be removed whole (rate 1)'),
    ({OUT: 1}, f'"{OUT}": a linear cannot be removed whole'),
    ({LAYER: 0.5}, f'"{LAYER}": no method prunes a layer at rate 0.5 yet; known: 0 and 1'),
    ({LAYER: 0.25}, f'"{LAYER}": no method prunes a layer at rate 0.25 yet'),
    ({ATTENTION: 1, OUT: 0.3}, 'part "o": the module is removed whole (rate 1), so nothing is'),
    ({FFN: 1, WI: 0.5}, f'"{FFN}" (rate 1) and its part "{WI}" (rate 0.5) are both above 0'),
    ({WO: 0.5, FFN: 1}, f'"{FFN}" (rate 1) and its part "{WO}" (rate 0.5)'),
    ({LAYER: 1, ATTENTION: 0.25}, f'"{LAYER}" (rate 1) and its part "{ATTENTION}" (rate 0.25)'),
    ({LAYER: 1, OUT: 0.25}, f'"{LAYER}" (rate 1) and its part "{OUT}" (rate 0.25)'),
    ({LAYER: 1, LAYER1: 1}, "all 2 encoder layers are at rate 1"),
    ({"decoder.block.0": 1}, "all 1 decoder layers are at rate 1"),
    ({LAYER: block(LAYER1)}, "all 2 encoder layers are at rate 1"),
    ({LAYER1: block(LAYER)}, f'a block from "{LAYER1}" through "{LAYER}"; expected'),
    ({LAYER: block("decoder.block.0")}, f'a block from "{LAYER}" through "decoder.block.0"'),
    ({ATTENTION: block(LAYER)}, f'a block from "{ATTENTION}" through "{LAYER}"'),
    ({LAYER: block("encoder.block.7")}, 'no module "encoder.block.2" in this model'),
    ({LAYER: block(LAYER), WI: 0.5}, f'and its part "{WI}" (rate 0.5) are both above 0'),
    ({LAYER: block(LAYER1), LAYER1: 1}, f'(linear_map) through {LAYER1}) and its part "{LAYER1}"'),
]


@pytest.mark.parametrize(("configuration", "message"), BAD_FOR_MODEL)
def test_configuration_for_another_model(
    tmp_path: Path, configuration: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, [{}, configuration])
    with pytest.raises(ConfigError) as caught:
        config.read_configurations(path, MODULES, METHODS)
    assert message in str(caught.value)
    assert "conf.json[1]: " in str(caught.value)


GOOD_FOR_MODEL = [
    {},
    {ATTENTION: 0.25, OUT: 0.3, WI: 0.3, WO: 0.99},
    {ATTENTION: 1, OUT: 0},
    {ATTENTION: 1, FFN: 1},
    {FFN: 1, WI: 0, WO: 0},
    {FFN: 0, WI: 0.5},
    {LAYER: 1, ATTENTION: 0, OUT: 0, FFN: 0},
    {ATTENTION: {"rate": 0.5, "method": "head_l1"}, OUT: {"rate": 0.5, "method": "l1"}},
    {ATTENTION: {"rate": 0, "method": "head_l1"}, OUT: 0.5},
]


@pytest.mark.parametrize("configuration", GOOD_FOR_MODEL)
def test_configurations_are_read_as_written(tmp_path: Path, configuration: dict[str, Any]) -> None:
    path = written(tmp_path, [configuration])
    (found,) = config.read_configurations(path, MODULES, METHODS)
    assert {name: entry.to_json() for name, entry in found.items()} == configuration
    assert list(found) == list(configuration)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        config.read_configurations(tmp_path / "conf.json")


PICKS = [(3, "no configuration 3; -n counts from 0, here 0 to 2"), (-1, "no configuration -1")]


@pytest.mark.parametrize(("index", "message"), PICKS)
def test_pick_names_the_range(index: int, message: str) -> None:
    with pytest.raises(ConfigError, match=r"conf\.json: ") as caught:
        config.pick([{}, {}, {}], index, Path("conf.json"))
    assert message in str(caught.value)


def test_pick() -> None:
    configurations = [{WI: Entry(0.5)}, {WI: Entry(0.3)}]
    assert config.pick(configurations, 1, "conf.json") == {WI: Entry(0.3)}
    with pytest.raises(ConfigError, match=r"configuration 1; -n counts from 0, here 0 only\."):
        config.pick(configurations[:1], 1, "conf.json")


# --- conf_prune.json -----------------------------------------------------------------------------

BAD_SCHEMES = [
    ("{", "not a JSON file"),
    ([{ATTENTION: 0.5}], "an object {module: [entry, ...]} was expected"),
    ({ATTENTION: 0.5}, f'"{ATTENTION}" holds 0.5, a list of rates was expected'),
    ({ATTENTION: []}, f'"{ATTENTION}" holds [], a list'),
    ({ATTENTION: [0.5, 0.25, 0.5]}, f'"{ATTENTION}"[2]: rate 0.5 occurs twice'),
    ({ATTENTION: [1, 1.0]}, "rate 1 occurs twice"),
    (
        {ATTENTION: [with_o(0.5, 0.3), with_o(0.5, {"rate": 0.3})]},
        "rate 0.5 with o at rate 0.3 occurs twice",
    ),
    (f'{{"{WI}": [0.5], "{WI}": [0.3]}}', f'"{WI}" occurs twice'),
    ({"": [0.5]}, '"" is not the path'),
    ({OTHER: [0.5]}, f'no module "{OTHER}" in this model (2 encoder and 1 decoder layers'),
    ({WI: [0.5, 1]}, f'"{WI}": a linear cannot be removed whole (rate 1)'),
    ({LAYER: [0.5]}, "no method prunes a layer at rate 0.5 yet"),
    ({WI: [with_o(0.5, 0.3)]}, 'with o at rate 0.3, but this linear has no part "o"'),
    ({FFN: [with_o(0.5, 0.3)]}, 'this ffn has no part "o" to prune (has wi, wo); name one'),
    ({ATTENTION: [{"rate": 0.5, "parts": {"q": 0.5}}]}, 'no part "q" to prune (has o)'),
    ({ATTENTION: [with_o(0, 1)]}, 'part "o": a linear cannot be removed whole (rate 1)'),
    ({FFN: [{"rate": 0.5, "parts": {"wi": 0.3}}]}, "neurons and weights of an ffn cannot both be"),
    ({FFN: [{"rate": 0, "parts": {"wi": 1}}]}, 'part "wi": a linear cannot be removed whole'),
]


@pytest.mark.parametrize(("content", "message"), BAD_SCHEMES)
def test_bad_scheme(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path, content, "conf_prune.json")
    with pytest.raises((ConfigError, FormatError)) as caught:
        config.read_scheme(path, MODULES, METHODS)
    assert message in str(caught.value)
    assert "conf_prune.json" in str(caught.value)


@pytest.mark.parametrize(("value", "message"), BAD_IN_SCHEMES)
def test_bad_entry_in_scheme(tmp_path: Path, value: Any, message: str) -> None:
    path = written(tmp_path, {ATTENTION: [0.125, value]}, "conf_prune.json")
    with pytest.raises(ConfigError) as caught:
        config.read_scheme(path, MODULES, METHODS)
    assert f'conf_prune.json: "{ATTENTION}"[1]' in str(caught.value)
    assert message in str(caught.value)


def test_scheme_there_and_back(tmp_path: Path) -> None:
    scheme = {
        ATTENTION: [
            Entry(0.25, None, {"o": Entry(0.3)}),
            Entry(0.25),
            Entry(1),
            Entry(0.25, "head_l1"),
        ],
        WI: [Entry(0.5)],
        FFN: [Entry(1)],
    }
    path = tmp_path / "conf_prune.json"
    config.write_scheme(path, scheme)
    assert config.read_scheme(path, MODULES, METHODS) == scheme
    assert json.loads(path.read_text())[ATTENTION][0] == with_o(0.25, 0.3)
    config.write_scheme(path, {})
    assert config.read_scheme(path) == {}


# --- parts and transpose -------------------------------------------------------------------------


def test_an_attention_and_its_output_projection_are_one_entry() -> None:
    configuration = {
        WI: Entry(0.5),
        ATTENTION: Entry(0.25, "head_l1"),
        OUT: Entry(0.3, "l1"),
        CROSS: Entry(0),
        f"{CROSS}.o": Entry(0.3),
    }
    before = dict(configuration)
    merged = config.merge_parts(configuration)
    assert configuration == before
    assert list(merged.items()) == [
        (WI, Entry(0.5)),
        (ATTENTION, Entry(0.25, "head_l1", {"o": Entry(0.3, "l1")})),
        (CROSS, Entry(0)),
        (f"{CROSS}.o", Entry(0.3)),
    ]


@pytest.mark.parametrize("given", [[], [Entry(0.0)], [Entry(0.0, "neuron_l1")]])
@pytest.mark.parametrize(
    ("ffn", "prefix", "first", "second", "untouched"),
    [
        ("model.layers.3.mlp", "model.layers.3.mlp", "gate_proj", "up_proj", "down_proj"),
        # its linears lie in the layer itself
        ("bert.encoder.layer.3.ffn", "bert.encoder.layer.3", "intermediate.dense", "output.dense",
         "attention.output.dense"),
    ],
)  # fmt: skip
def test_linears_that_go_as_a_whole_are_parts_of_their_ffn(
    tmp_path: Path, ffn: str, prefix: str, first: str, second: str, untouched: str, given: Any
) -> None:
    configuration = {
        f"{prefix}.{second}": Entry(1.0),
        f"{prefix}.{untouched}": Entry(0.0),
        **dict(zip([ffn], given, strict=False)),
        f"{prefix}.{first}": Entry(0.5, "l1"),
    }
    joined = Entry(0.0, None, {first: Entry(0.5, "l1"), second: Entry(1.0)})
    merged = config.merge_parts(configuration)
    assert [entry for entry in merged.values() if entry.removals] == [joined]
    assert merged[ffn] == joined
    scheme, asked, needed = config.scheme_of([configuration, configuration])
    assert (scheme, asked, needed) == ({ffn: [joined]}, 2, 1)
    config.write_scheme(tmp_path / "scheme.json", scheme)
    assert config.read_scheme(tmp_path / "scheme.json") == scheme


BAD_MERGES = [
    (
        {ATTENTION: Entry(1), OUT: Entry(0.3)},
        'part "o": the module is removed whole (rate 1), so nothing is left of its part (rate 0.3)',
    ),
    ({ATTENTION: Entry(0.5), OUT: Entry(1)}, "a linear cannot be removed whole (rate 1)"),
    ({LAYER: Entry(1), WI: Entry(0.5)}, f'"{LAYER}" (rate 1) and its part "{WI}" (rate 0.5)'),
    (
        {"e.block.3": Entry(1, "x", through="e.block.5"), "e.block.5.layer.0": Entry(0.5)},
        '"e.block.3" (rate 1 (x) through e.block.5) and its part "e.block.5.layer.0" (rate 0.5)',
    ),
    (
        {"e.block.3": Entry(1, "x", through="e.block.5"), "e.block.4": Entry(1)},
        'and its part "e.block.4" (rate 1)',
    ),
    ({FFN: Entry(1), WO: Entry(0.5)}, f'"{FFN}" (rate 1) and its part "{WO}" (rate 0.5)'),
    (  # its linears lie in the layer itself
        {"bert.encoder.layer.3.ffn": Entry(1), "bert.encoder.layer.3.output.dense": Entry(0.5)},
        '.ffn" (rate 1) and its part "bert.encoder.layer.3.output.dense" (rate 0.5)',
    ),
    ({FFN: Entry(0.5), WO: Entry(1)}, f'"{FFN}" (rate 0.5) and its part "{WO}" (rate 1)'),
    (
        {LAYER: Entry(1), ATTENTION: Entry(0.5), OUT: Entry(0.5)},
        f'"{LAYER}" (rate 1) and its part',
    ),
]


@pytest.mark.parametrize(("configuration", "message"), BAD_MERGES)
def test_bad_merge(configuration: dict[str, Entry], message: str) -> None:
    for shuffled in (configuration, dict(reversed(configuration.items()))):
        with pytest.raises(ConfigError) as caught:
            config.scheme_of([{}, shuffled])
        assert message in str(caught.value)
        assert str(caught.value).startswith("conf.json[1]: ")


def test_layers_that_go_leave_what_lies_in_them_at_0() -> None:
    rates = {"attention": [0.25, 0.25], "linear": [0.5, 0.0]}
    gone: Any = [{LAYER: Entry(1)}, {LAYER: Entry(1, "linear_map", through=LAYER)}]
    for found, layers in zip(
        config.uniform_configurations(_MODULES, rates, gone), gone, strict=True
    ):
        assert {n: e for n, e in found.items() if n.startswith(LAYER)} == {
            ATTENTION: Entry(0), OUT: Entry(0), WI: Entry(0), WO: Entry(0), **layers,
        }  # fmt: skip
        assert found[CROSS] == Entry(0.25)


def test_names_that_only_begin_alike_do_not_overlap() -> None:
    configuration = {"encoder.block.1": Entry(1), "encoder.block.10.layer.0.x": Entry(0.5)}
    assert config.merge_parts(configuration) == configuration


def test_scheme_of_the_defaults() -> None:
    rates = {"attention": [0.25, 0.5, 0.25], "linear": [0.3, 0.3, 0.5]}
    configurations = config.uniform_configurations(_MODULES, rates)
    scheme, asked, needed = config.scheme_of(configurations)
    pairs = [Entry(a, None, {"o": Entry(b)}) for a, b in [(0.25, 0.3), (0.5, 0.3), (0.25, 0.5)]]
    assert scheme == {
        ATTENTION: pairs,
        WI: [Entry(0.3), Entry(0.5)],
        WO: [Entry(0.3), Entry(0.5)],
        CROSS: pairs,
    }
    assert list(scheme) == [ATTENTION, WI, WO, CROSS]
    assert (asked, needed) == (12, 10)


def test_uniform_configurations_list_the_kinds_of_the_rates_in_model_order() -> None:
    found = config.uniform_configurations(_MODULES, {"linear": [0.3], "attention": [0]})
    assert found == [
        {
            ATTENTION: Entry(0),
            OUT: Entry(0.3),
            WI: Entry(0.3),
            WO: Entry(0.3),
            CROSS: Entry(0),
            f"{CROSS}.o": Entry(0.3),
        }
    ]


def test_scheme_leaves_out_rate_0_and_keeps_methods_apart() -> None:
    configurations = [{WI: Entry(0), WO: Entry(0.5)}, {WI: Entry(0), WO: Entry(0.5, "l1")}]
    assert config.scheme_of(configurations) == ({WO: [Entry(0.5), Entry(0.5, "l1")]}, 2, 2)
    assert config.scheme_of([{}, {WI: Entry(0)}]) == ({}, 0, 0)


# --- properties ----------------------------------------------------------------------------------

RATES = st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.75]) | st.floats(0, 0.999)
SINGLE = st.builds(Entry, RATES, st.sampled_from([None, "l1", "head_l1"]))
CONFIGURATION = st.dictionaries(
    st.sampled_from([ATTENTION, OUT, WI, WO, CROSS, f"{CROSS}.o"]), SINGLE
)
CONFIGURATIONS = st.lists(CONFIGURATION, min_size=1, max_size=5)


@given(CONFIGURATIONS)
def test_transpose_loses_no_entry(configurations: list[dict[str, Entry]]) -> None:
    scheme, asked, needed = config.scheme_of(configurations)
    merged = [config.merge_parts(one) for one in configurations]
    wanted = [pair for one in merged for pair in one.items() if pair[1].removals]
    made = [(name, entry) for name, entries in scheme.items() for entry in entries]
    assert set(made) == set(wanted)
    assert len(made) == len(set(made)) == needed
    assert asked == len(wanted)
    for configuration, one in zip(configurations, merged, strict=True):
        apart = {n: Entry(e.rate, e.method) for n, e in one.items()}
        apart |= {f"{n}.{key}": part for n, e in one.items() for key, part in e.parts.items()}
        assert apart == configuration


@given(CONFIGURATIONS, st.randoms())
def test_order_of_modules_does_not_matter(
    configurations: list[dict[str, Entry]], random: Any
) -> None:
    shuffled = [
        dict(random.sample(list(configuration.items()), len(configuration)))
        for configuration in configurations
    ]
    assert config.scheme_of(shuffled) == config.scheme_of(configurations)


@given(CONFIGURATIONS)
def test_written_then_read_is_equal(
    tmp_path_factory: pytest.TempPathFactory, configurations: list[dict[str, Entry]]
) -> None:
    folder = tmp_path_factory.mktemp("conf")
    config.write_configurations(folder / "conf.json", configurations)
    assert config.read_configurations(folder / "conf.json", MODULES, METHODS) == configurations
    scheme, _, _ = config.scheme_of(configurations)
    config.write_scheme(folder / "conf_prune.json", scheme)
    found = config.read_scheme(folder / "conf_prune.json", MODULES, METHODS)
    assert list(found.items()) == list(scheme.items())


def test_many_entries_that_differ_only_in_their_parts(tmp_path: Path) -> None:
    """Each is compared with all others; a tiny file must not take minutes."""
    path = tmp_path / "conf_prune.json"
    parts = [{"rate": 0.5, "parts": {"o": (i + 1) / 20_001}} for i in range(20_000)]
    path.write_text(json.dumps({ATTENTION: parts}))
    started = time.process_time()
    assert len(config.read_scheme(path)[ATTENTION]) == len(parts)
    assert time.process_time() - started < 20
    path.write_text(json.dumps({ATTENTION: [*parts, parts[7]]}))
    with pytest.raises(ConfigError, match=r"\[20000\]: .* occurs twice"):
        config.read_scheme(path)
