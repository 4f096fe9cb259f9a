"""The make targets: the whole chain side by side, nothing done twice, other settings refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.paths import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def make(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ready = f"READY={sys.prefix}/pyvenv.cfg"  # this environment is one already
    command = ["make", f"VENV={sys.prefix}", ready, f"OUT={out}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.nightly
def test_a_pipeline_from_folder_to_table(tmp_path: Path) -> None:
    folder, data, out = tmp_path / "folder", tiny.corpus(tmp_path / "data"), tmp_path / "out"
    tiny.t5().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    conf = tmp_path / "conf.json"
    attention = "encoder.block.0.layer.0.SelfAttention"
    # two equal configurations: side by side they must not share a checkpoint folder
    conf.write_text(json.dumps([{attention: 0.5, f"{attention}.o": 0.5}] * 2))
    settings = [f"MODEL={folder}", f"DATA={data}", f"CONFIGS={conf}", "EVAL_ARGS=--max-length 8"]
    settings += ["BLOCK_ARGS=--epochs 1", "MODEL_ARGS=--epochs 2"]

    first = make(out, "-j2", "pipeline", *settings)
    assert first.returncode == 0, first.stderr
    table = (out / "report.md").read_text()
    assert first.stderr.rstrip().endswith(table.rstrip())
    rates = "heads 50 % of one attention, weights 50 % of one linear"
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:5]]
    assert rows == ["dense", f"0: {rates}", f"1: {rates}"]
    losses = [json.loads((out / f"eval_model_{i}.json").read_text())["loss"] for i in range(2)]
    assert losses[0] == losses[1]
    assert (out / "loss.png").stat().st_size > 1000
    assert not [path for path in (out / "checkpoints").rglob("*") if path.is_file()]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    again = make(out, "pipeline", *settings)
    assert again.returncode == 0, again.stderr
    assert ".py" not in again.stderr.replace(table, "")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")} == before

    other = make(out, "pipeline", *settings, "LIMIT=8")
    assert other.returncode != 0
    assert "was made with other settings" in other.stderr


def test_module_level_finetuning_gets_no_option_that_a_solver_refuses(tmp_path: Path) -> None:
    """Options without effect are refused; these have one with every solver."""
    bundle, arguments = tmp_path / "out" / "modules_finetuned.npy", "--solver grad"
    ran = make(tmp_path / "out", "-n", str(bundle), "DATA=data", f"BLOCK_ARGS={arguments}")
    assert ran.returncode == 0, ran.stderr
    (line,) = (at for at in ran.stdout.splitlines() if "block_level_finetuning.py" in at)
    flags = set(re.findall(r" (--?[a-z-]+)", line.partition("block_level_finetuning.py")[2]))
    assert flags - {"--workdir"} == {"-m", "-p", "-o", "--stats", "--data", "--solver"}


def test_the_demo_trains_whole_models_on_the_hand_written_captions(tmp_path: Path) -> None:
    """They are the first of the training captions (tests/unit/test_captions.py)."""
    hand = (ROOT / "assets/captions/train_handwritten.en").read_text(encoding="utf-8")
    ran = make(tmp_path / "unused", "-n", "demo")
    assert f'MODEL_ARGS="--limit {len(hand.splitlines())} ' in ran.stdout
    asked = make(tmp_path / "unused", "-n", "demo", "MODEL_ARGS=--epochs 1")
    assert 'MODEL_ARGS="--epochs 1"' in asked.stdout


def test_an_environment_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pyvenv.cfg").write_text("home = elsewhere")
    command = ["make", "setup", f"VENV={tmp_path / 'mine'}", f"PYTHON3={sys.executable}"]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "mine is there and was not made by make setup; delete it, or name another" in ran.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize(
    "target", ["setup", "demo", "pipeline", "control", "test", "faults", "bench"]
)
def test_a_dry_run_does_nothing(target: str, tmp_path: Path) -> None:
    ran = make(tmp_path / "out", "-n", target)
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "out").exists()
