"""config_generator.py and prune_scheme_generator.py: reports, exit codes, what goes where."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import config_generator
import prune_scheme_generator
from composable.formats import config
from composable.formats.config import Entry
from composable.models import checkpoint
from tests import tiny
from tests.paths import ROOT

ATTENTION = "encoder.block.0.layer.0.SelfAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    checkpoint.save(path, tiny.checkpoint())
    return path


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
    (["-n", 3], [0.25, 0.5, 0.25], [0.3, 0.3, 0.5]),
    (["--attention", 0.25, 0.5], [0.25, 0.5], [0, 0]),
    (["--linear", 0.3], [0], [0.3]),
    (["--linear", 0, "--attention", 1], [1], [0]),
    (["-n", 2, "--attention", 0.1, 0.2, "--linear", 0.3, 0.4], [0.1, 0.2], [0.3, 0.4]),
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
    (["--attention", 0.1, 0.2, "--linear", 0.3], 1, "--attention has 2 rates and --linear has 1"),
    (["-n", 5], 1, "-n asks for 5 configurations, --attention has 3 rates and --linear has 3"),
    (["-n", 3, "--linear", 0.1, 0.2], 1, "-n asks for 3 configurations, --linear has 2 rates"),
    (["--attention", 1.5], 1, "--attention: rate 1.5 is not a number from 0 to 1"),
    (["--linear", 0.3, -0.1], 1, "--linear: rate -0.1 is not a number"),
    (["--linear", "nan"], 1, "--linear: rate NaN is not a number"),
    (["--attention", 1, "--linear", 0.3], 1, "nothing is left of its part (rate 0.3)"),
    (["--linear", 0.5, 1], 1, "a linear cannot be removed whole (rate 1)"),
    (["--linear"], 2, "--linear"),
    (["--attention", "--linear", 0.3], 2, "--linear"),
    (["--linear", "much"], 2, "much"),
    (["-n", 0], 2, "0 is not in the range"),
    (["-n"], 2, "-n"),
    (["--ffn", 0.5, "--linear", 0.5, 0.5], 1, "--linear has 2 rates and --ffn has 1 rates"),
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
