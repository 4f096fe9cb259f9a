"""config_generator.py and prune_scheme_generator.py: reports, exit codes, what goes where."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import baseline_finetuning
import block_level_finetuning
import config_generator
import evaluate
import prune
import prune_scheme_generator
import rank_importance
from composable.formats import config, scores_file
from composable.formats.config import Entry
from composable.formats.scores import Scores, TextsRead, UnitImportance
from composable.models import checkpoint, cost
from composable.ranking import base
from composable.ranking.base import NoOptions
from composable.ranking.unit_weights import L1
from composable.variants import compose, pruning
from tests import tiny
from tests.paths import ROOT

ATTENTION = "encoder.block.0.layer.0.SelfAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    checkpoint.save(path, tiny.checkpoint())
    return path


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        (rank_importance, "--seed", "99999999999999999999"),  # which torch does not take
        (baseline_finetuning, "--lr", "nan"),
        (block_level_finetuning, "--ridge", "inf"),
        (config_generator, "--sizes", "0"),
        (config_generator, "--sizes", "nan"),
        (config_generator, "--attention", "1.5"),
        (config_generator, "--linear", "-0.1"),
        (config_generator, "--ffn", "nan"),
        (prune, "--memory-budget", "much"),
        (prune, "--memory-budget", "0.0001"),
        (evaluate, "--device", "gpu"),
        (evaluate, "--device", "cuda:-1"),
        (evaluate, "--dtype", "float8"),
        (prune, "--attention", "neuron_l1"),
        (prune, "--linear", "star"),
        (rank_importance, "--method", "near"),
    ],
)
def test_numbers_that_nothing_can_be_done_with(
    script: Any, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(script, capsys, flag, value)
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: Invalid value for '{flag}': ")
    assert value in err


def run(script: Any, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Call a script in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        script.main.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def run_alone(script: str, *args: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Call a script as users do."""
    command = [sys.executable, str(ROOT / script), *(str(arg) for arg in args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def assert_one_line(err: str, *messages: str) -> None:
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    for message in messages:
        assert message in err


# --- config_generator ----------------------------------------------------------------------------

RATES = [
    ([], [0.25, 0.5, 0.25], [0.3, 0.3, 0.5]),
    (["--attention", 0.25, 0.5], [0.25, 0.5], [0, 0]),
    (["--linear", 0.3], [0], [0.3]),
    (["--linear", 0, "--attention", 1], [1], [0]),
    (["--attention", 0.1, 0.2, "--linear", 0.3, 0.4], [0.1, 0.2], [0.3, 0.4]),
]


@pytest.mark.parametrize(("args", "attention", "linear"), RATES)
def test_rates(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    args: list[Any],
    attention: list[float],
    linear: list[float],
) -> None:
    path = tmp_path / "conf.json"
    code, out, err = run(config_generator, capsys, "-m", model, "-o", path, *args)
    assert (code, err) == (0, "")
    found = json.loads(path.read_text())
    assert [one[ATTENTION] for one in found] == attention
    assert [one[WI] for one in found] == [one[f"{ATTENTION}.o"] for one in found] == linear
    report = json.loads(out)
    assert report.pop("seconds") >= 0
    assert len(report.pop("costs")) == len(attention)
    assert report.pop("dense")["parameters"] == tiny.checkpoint().info["dense_parameters"]
    assert report.pop("lengths") == {"encoder": 32, "decoder": 32}
    assert report == {
        "wrote": str(path),
        "configurations": len(attention),
        "modules": {"attention": 6, "linear": 14},
        "rates": {"attention": attention, "linear": linear},
    }


@pytest.mark.parametrize("gated", [False, True])
def test_modules_in_model_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gated: bool
) -> None:
    checkpoint.save(tmp_path / "m.pth", tiny.checkpoint(gated=gated))
    path = tmp_path / "conf.json"
    assert run(config_generator, capsys, "-m", tmp_path / "m.pth", "-o", path)[0] == 0
    attention, wis = ["SelfAttention", "SelfAttention.o"], ["wi_0", "wi_1"] if gated else ["wi"]
    ffn = [f"DenseReluDense.{part}" for part in [*wis, "wo"]]
    stacks = {"encoder": [attention, ffn]}
    stacks["decoder"] = [attention, ["EncDecAttention", "EncDecAttention.o"], ffn]
    expected = [
        f"{stack}.block.{block}.layer.{i}.{part}"
        for stack, layers in stacks.items()
        for block in range(2)
        for i, parts in enumerate(layers)
        for part in parts
    ]
    assert [list(one) for one in json.loads(path.read_text())] == [expected] * 3


BAD_RATES = [
    (["--attention", 0.1, 0.2, "--linear", 0.3], 2, "--attention has 2 values and --linear has 1"),
    (["--attention", 1.5], 2, "1.5 is not in the range 0<=x<=1"),
    (["--linear", 0.3, -0.1], 2, "-0.1 is not in the range"),
    (["--attention", 1, "--linear", 0.3], 1, "nothing is left of its part (rate 0.3)"),
    (["--linear", 0.5, 1], 1, "a linear cannot be removed whole (rate 1)"),
    (["--linear"], 2, "--linear"),
    (["--attention", "--linear", 0.3], 2, "--linear"),
    (["--linear", "much"], 2, "much"),
    (["--ffn", 0.5, "--linear", 0.5, 0.5], 2, "--linear has 2 values and --ffn has 1 values"),
    (["--layers", "0", "1", "--ffn", 0.5], 2, "--ffn has 1 values and --layers has 2 values"),
    (["--layers", "0", "--drop-layers", 1], 2, "both say which layers go; give one"),
    (["--drop-layers", 1], 2, "the model has encoder and decoder layers; say which with --stack"),
    (["--policy", "singles"], 2, "--policy has no effect without --drop-layers"),
    (["--layers", "0", "--policy", "singles"], 2, "--policy has no effect without --drop-layers"),
    (["--linear-map"], 2, "--linear-map has no effect without --drop-layers"),
]


@pytest.mark.parametrize(("args", "expected", "message"), BAD_RATES)
def test_bad_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    args: list[Any],
    expected: int,
    message: str,
) -> None:
    path = tmp_path / "conf.json"
    code, out, err = run(config_generator, capsys, "-m", model, "-o", path, *args)
    assert (code, out) == (expected, "")
    assert_one_line(err, message)
    assert list(tmp_path.iterdir()) == []


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    path = tmp_path / "conf.json"
    args = ("-m", model, "-o", path, "--sizes", 0.8, 0.5, "--metric", "layer-parameters")
    code, out, err = run(config_generator, capsys, *args)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["configurations"] == 2
    assert report["modules"] == {"attention": 6, "linear": 14, "ffn": 4}
    assert report["sizes"] == [0.8, 0.5]
    assert (report["metric"], report["allocation"]) == ("layer-parameters", "uniform")
    assert report["grid"] == 0
    shares = [one["shares"]["layer_parameters"] for one in report["costs"]]
    assert shares == pytest.approx([0.8, 0.5], abs=0.01)
    assert all(share <= size for share, size in zip(shares, [0.8, 0.5], strict=True))
    found = config.read_configurations(path)
    assert found[1][WI] == found[1][f"{ATTENTION}.o"] == Entry(0.0)
    assert found[1][ATTENTION].rate == 0.5
    assert list(found[0]) == list(found[1])


def scores_file_of(path: Path, **changes: Any) -> Path:
    """Scores of the tiny model: of no texts, or with the tables of the ranker stat."""
    ranked = base.rank(L1, tiny.checkpoint(), None, NoOptions())
    assert ranked.origin is not None
    origin = dataclasses.replace(ranked.origin, **changes)
    if origin.texts is None:
        scores_file.save(path, dataclasses.replace(ranked, origin=origin))
        return path
    units = {}
    for name, one in ranked.units.items():
        falling = np.arange(len(one.importance), 0.0, -1)
        key = "error" if "ttention" in name else "left"
        units[name] = UnitImportance(falling, {key: falling})
    scores_file.save(path, Scores(origin, units))
    return path


TEXTS = TextsRead("texts", "ab" * 32, 4, {"encoder": 30, "decoder": 18})


def test_sizes_at_the_lengths_of_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    scores = scores_file_of(tmp_path / "scores.npz", texts=TEXTS)
    args = ("-m", model, "-o", tmp_path / "conf.json", "--scores", scores, "--sizes", 0.6)
    reports = [
        json.loads(run(config_generator, capsys, *args, "--allocate", each)[1])
        for each in ("uniform", "stat")
    ]
    for report in reports:
        assert report["lengths"] == {"encoder": 7.5, "decoder": 4.5}
        assert 0.58 < report["costs"][0]["shares"]["macs"] <= 0.6
    assert reports[0]["costs"] != reports[1]["costs"]
    # scores that can tell are what is gone by, others leave all modules the same share
    usual = json.loads(run(config_generator, capsys, *args)[1])
    assert (usual["allocation"], usual["costs"]) == ("stat", reports[1]["costs"])
    ranked = base.rank(L1, tiny.checkpoint(), None, NoOptions())
    origin = dataclasses.replace(ranked.origin, texts=TEXTS)  # type: ignore[type-var]
    scores_file.save(scores, dataclasses.replace(ranked, origin=origin))
    usual = json.loads(run(config_generator, capsys, *args)[1])
    assert (usual["allocation"], usual["costs"]) == ("uniform", reports[0]["costs"])


MODELS = ["t5", "bert", "llama_gqa", "gpt2", "opt"]


@pytest.mark.parametrize("layout", MODELS)
def test_reported_costs_are_those_of_the_composed_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """Heads, neurons, masks, an attention with a masked output projection, a layer gone."""
    checkpoint.save(tmp_path / "m.pth", tiny.dense(layout))
    stack = ["--stack", "decoder"] if layout == "t5" else []
    rates = ("--attention", 0.5, 0, 0.25, "--linear", 0.3, 0.6, 0, "--ffn", 0, 0, 0.4)
    layers = ("--layers", 1, "", 0, *stack) if layout == "t5" else ("--layers", 1, "", "0,2")
    path = tmp_path / "conf.json"
    code, out, err = run(
        config_generator, capsys, "-m", tmp_path / "m.pth", "-o", path, *rates, *layers
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    for found, configuration in zip(report["costs"], config.read_configurations(path), strict=True):
        dense = tiny.dense(layout)
        dense_costs = cost.report(dense.model, dense.family)
        scheme, *_ = config.scheme_of([configuration])
        made = compose.compose(dense, pruning.make_variants(dense, scheme, tiny.BY_WEIGHTS))
        expected = cost.report(made.model, made.family)
        assert found["parameters"] == expected["parameters"]
        assert found["unmasked_parameters"] == expected["nonzero_parameters"]
        tokens = sum(report["lengths"].values())
        assert round(found["macs"] / tokens, 2) == expected["macs_per_token"]
        share = expected["parameters"] / dense_costs["parameters"]
        assert found["shares"]["parameters"] == round(share, 6)


def test_an_image_has_its_own_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four patches and the class token, and so evaluate.py counts."""
    dense = tiny.dense("vit")
    checkpoint.save(tmp_path / "m.pth", dense)
    args = ("-m", tmp_path / "m.pth", "-o", tmp_path / "conf.json", "--sizes", 0.5)
    code, out, err = run(config_generator, capsys, *args)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["lengths"] == {"encoder": 5}
    assert report["dense"]["macs"] == cost.macs(dense.model, dense.family, 5, 0).total
    assert 0.45 < report["costs"][0]["shares"]["macs"] <= 0.5


BAD_SIZES = [
    (["--sizes", 0.001], "to 1, the fraction of the macs that stays"),
    (["--sizes", 0.5, "--attention", 0.5], "--attention has no effect beside --sizes, which says"),
    (["--sizes", 0.5, "--ffn", 0.5], "--ffn has no effect beside --sizes, which says"),
    (["--sizes", 0.5, "--layers", 1], "--layers has no effect beside --sizes"),
    (["--sizes", 0.5, "--drop-layers", 1], "--drop-layers has no effect beside --sizes"),
    (["--sizes", 0.5, "--policy", "deepest"], "--policy has no effect beside --sizes"),
    (["--metric", "macs"], "--metric has no effect without --sizes"),
    (["--allocate", "uniform", "--attention", 0.5], "--allocate has no effect without --sizes"),
    (["--gqa", "per-group"], "--gqa has no effect without --sizes"),
    (["--grid", 8], "--grid has no effect without --sizes"),
    (["--sizes", 0.2, "--grid", 2], "every module keeps at least one head or step of the grid."),
    (["--sizes", 0.5, "--allocate", "global"], "the allocation global needs scores, a file of"),
    (
        ["--sizes", 0.5, "--scores", "{stat}", "--allocate", "global"],
        "but the importances of stat compare only those of one module; choose the allocation stat.",
    ),
    (["--sizes", 0.5, "--allocate", "stat"], "the allocation stat needs scores"),
    (["--sizes", 0.5, "--scores", "{l1}"], "were measured on no texts"),
    (["--sizes", 0.5, "--scores", "{l1}", "--allocate", "stat"], '(of l1) hold no "error" of'),
    (["--sizes", 0.5, "--scores", "{other}", "--allocate", "stat"], "another model"),
    (["--sizes", 0.5, "--scores", "nothing.npz"], "nothing.npz: No such file"),
]


@pytest.mark.parametrize(("args", "message"), BAD_SIZES)
def test_bad_sizes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    args: list[Any],
    message: str,
) -> None:
    scores = {
        "{l1}": scores_file_of(tmp_path / "l1.npz"),
        "{stat}": scores_file_of(tmp_path / "stat.npz", texts=TEXTS, method="stat"),
        "{other}": scores_file_of(tmp_path / "o.npz", texts=TEXTS, fingerprint="ab" * 32),
    }
    path = tmp_path / "conf.json"
    given = [scores.get(arg, arg) for arg in args]
    code, out, err = run(config_generator, capsys, "-m", model, "-o", path, *given)
    assert (code, out) == (2 if "leave it out" in err else 1, "")
    assert_one_line(err, message)
    assert not path.exists()


def test_sizes_by_the_highest_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """Scores that texts were not looked at for, too; of 48 neurons 3 leave together, or 6."""
    path = tmp_path / "conf.json"
    scores = scores_file_of(tmp_path / "l1.npz")
    args = ("-m", model, "-o", path, "--scores", scores, "--allocate", "global", "--sizes", 0.4)
    for given, grid, step in ((), 16, 3), (("--grid", 8), 8, 6), (("--grid", 0), 0, 1):
        code, out, err = run(config_generator, capsys, *args, *given)
        assert (code, err) == (0, "")
        report, (found,) = json.loads(out), config.read_configurations(path)
        assert (report["allocation"], report["grid"]) == ("global", grid)
        assert 0.35 < report["costs"][0]["shares"]["macs"] <= 0.4
        gone = {n: 48 * e.rate for n, e in found.items() if n.endswith("DenseReluDense")}
        assert all(count % step == 0 for count in gone.values())
        assert len({*gone.values()}) > 1


def test_sizes_that_are_no_numbers(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    for args in (["--sizes"], ["--sizes", "much"], ["--sizes", 0.5, "--metric", "bytes"]):
        code, _, err = run(config_generator, capsys, "-m", model, *args)
        assert code == 2
        assert_one_line(err, "--" if args[-1] != "much" else "much")


# --- prune_scheme_generator ----------------------------------------------------------------------


def test_scheme_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    conf, scheme = tmp_path / "conf.json", tmp_path / "conf_prune.json"
    assert run(config_generator, capsys, "-m", model, "-o", conf)[0] == 0
    code, out, err = run(prune_scheme_generator, capsys, "-i", conf, "-o", scheme)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report.pop("seconds") >= 0
    # 6 attentions want 3 entries each, 8 linears 2 of 3 rates each
    assert report == {
        "wrote": str(scheme),
        "configurations": 3,
        "modules": 14,
        "variants_asked": 42,
        "variants_needed": 34,
        "share_saved": round(8 / 42, 4),
    }
    found = config.read_scheme(scheme)
    assert found[ATTENTION][0] == Entry(0.25, None, {"o": Entry(0.3)})
    assert f"{ATTENTION}.o" not in found
    assert found[WI] == [Entry(0.3), Entry(0.5)]


def test_nothing_to_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf, scheme = tmp_path / "conf.json", tmp_path / "conf_prune.json"
    conf.write_text("[{}]")
    code, out, _ = run(prune_scheme_generator, capsys, "-i", conf, "-o", scheme)
    assert code == 0
    assert json.loads(out)["share_saved"] == 0
    assert config.read_scheme(scheme) == {}


# --- as users call them --------------------------------------------------------------------------


#: What else is refused is in test_config.py.
BAD_INPUT = [
    ('[{}, {"a": 1, "a.b": 0.5}]', 'conf.json[1]: "a" (rate 1) and its part "a.b" (rate 0.5)'),
    ("\x89PNG", "not a JSON file"),
    (None, "conf.json: No such file"),
]


@pytest.mark.parametrize(("content", "message"), BAD_INPUT)
def test_bad_input_alone(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "conf.json").write_text(content)
    (tmp_path / "conf_prune.json").write_text("older")
    done = run_alone("prune_scheme_generator.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_line(done.stderr, message)
    assert (tmp_path / "conf_prune.json").read_text() == "older"


@pytest.mark.parametrize("script", ["config_generator", "prune_scheme_generator"])
def test_starts_without_torch(script: str) -> None:
    code = (
        f"import sys, {script}; from composable import families; families.owner('a.b');"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
