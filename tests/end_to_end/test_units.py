"""Heads and neurons through prune.py: what the defaults need, and what is said of a choice."""

from pathlib import Path

import pytest

from composable.formats import bundle
from composable.methods import neuron_l1
from tests.end_to_end.test_depth import call, made_of, ok


def scheme(folder: Path, *rates: object) -> None:
    ok(folder, "config_generator.py", "-m", "dense.pth", *rates)
    ok(folder, "prune_scheme_generator.py")


def test_defaults_need_texts_and_say_so(tmp_path: Path) -> None:
    _, data = made_of("opt", tmp_path)
    scheme(tmp_path, "--attention", 0.5, "--ffn", 0.5)
    ended = call(tmp_path, "prune.py", "-m", "dense.pth")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "no texts to calibrate on, and the methods of the scheme look at inputs" in ended.err
    assert "--data, or methods that read weights alone (--attention head_l1 " in ended.err
    weights = ok(
        tmp_path, "prune.py", "-m", "dense.pth", "--attention", "head_l1", "--ffn", "neuron_l1"
    )
    assert "calibration" not in weights
    report = ok(tmp_path, "prune.py", "-m", "dense.pth", "--data", data)
    assert report["calibration"] == "calibration.npy"
    found = bundle.open_bundle(tmp_path / "modules.npy").load_all()
    assert {(v.kind, v.entry.method) for v in found} == {
        ("attention", "head_gram"), ("ffn", "exchange"),
    }  # fmt: skip


@pytest.mark.parametrize(("layout", "warnings"), [("opt", 0), ("llama_gqa", 1)])
def test_neurons_by_weights_are_warned_of_once_where_there_is_a_gate(
    layout: str, warnings: int, tmp_path: Path
) -> None:
    made_of(layout, tmp_path)
    scheme(tmp_path, "--ffn", 0.5)
    neuron_l1._warn_of_gates.cache_clear()
    for script in (("prune.py", "--ffn", "neuron_l1"), ("rank_importance.py", "--method", "l1")):
        ended = call(tmp_path, script[0], "-m", "dense.pth", *script[1:])
        assert ended.code == 0
        assert ended.err.count("neuron_l1: in an ffn with a gate") == warnings
        neuron_l1._warn_of_gates.cache_clear()


def test_rates_of_grouped_heads_are_those_that_were_made(tmp_path: Path) -> None:
    made_of("llama_gqa", tmp_path)  # two groups of four heads
    scheme(tmp_path, "--attention", 0.3, 0.5, 0.99)
    for gqa, rates in (
        ("per-group", {"0.3": 0.25, "0.5": 0.5, "0.99": 0.75}),
        ("whole-groups", {"0.3": 0.5, "0.5": 0.5, "0.99": 0.5}),
    ):
        ended = call(
            tmp_path, "prune.py", "-m", "dense.pth", "--attention", "head_l1", "--gqa", gqa
        )
        assert ended.report["head_rates"] == rates
        said = f"grouped queries: rates of heads are rounded; 0.3 is {rates['0.3']}, "
        assert ended.err.count(said) == 1
    made_of("opt", tmp_path)
    scheme(tmp_path, "--attention", 0.3)
    assert "head_rates" not in ok(tmp_path, "prune.py", "-m", "dense.pth", "--attention", "head_l1")
