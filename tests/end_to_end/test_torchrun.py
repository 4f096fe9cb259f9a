"""Two processes (torchrun, gloo) against one with the same global batch."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from composable.formats import bundle
from composable.models import checkpoint
from tests import tiny
from tests.end_to_end.forked import Ended, Server, environment
from tests.paths import ROOT

pytestmark = pytest.mark.nightly  # two processes need 10 seconds to start
MODEL, BLOCK = "model_level_finetuning.py", "block_level_finetuning.py"
#: an attention without heads, an ffn and a layer that are gone, a stack without a used bias
REMOVED = {
    "encoder.block.0.layer.0.SelfAttention": 1,
    "encoder.block.1.layer.0.SelfAttention": 1,
    "decoder.block.0.layer.0.SelfAttention": 1,
    "decoder.block.0.layer.1.EncDecAttention": 0.5,
    "encoder.block.0.layer.1.DenseReluDense": 1,
    "decoder.block.1": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """61 pairs: whole batches of 8, and a last one of 5 that has no equal shares."""
    place = tmp_path_factory.mktemp("torchrun")
    tiny.corpus(place / "data", pairs=61)
    checkpoint.save(place / "model.pth", tiny.checkpoint(dropout_rate=0.0))
    (place / "removed.json").write_text(json.dumps([REMOVED]))
    with Server() as server:
        for script, args in (
            ("config_generator.py", "-m model.pth --attention 0.5 --linear 0.3"),
            ("prune_scheme_generator.py", ""),
            ("prune.py", "-m model.pth --attention head_l1"),
            ("prune_scheme_generator.py", "-i removed.json -o removed_prune.json"),
            ("prune.py", "-m model.pth -c removed_prune.json -o removed.npy --attention head_l1"),
        ):
            ended = server.run(script, *args.split(), cwd=place)
            assert ended.code == 0, ended.err
        for name, script, options in ONE:
            words = (str(ROOT / script), *options.split(), *NAMES[name])
            ended = server.run(*STOPS.get(name, ()), *words, cwd=place)
            assert ended.code == 0, ended.err
            shutil.rmtree(place / "checkpoints")
        yield place


#: in bfloat16 two halves of a batch round otherwise than the whole
COMMON = " --data data --batch-size 8 --epochs 3 --device cpu --dtype float32"
RUNS = {
    "model": (MODEL, "-m model.pth -p modules.npy" + COMMON),
    "removed": (MODEL, "-m model.pth -p removed.npy -c removed.json" + COMMON),
    "block": (BLOCK, "-m model.pth -p modules.npy --solver grad" + COMMON),
    "stops": (BLOCK, "-m model.pth -p modules.npy --solver grad --lr 0.1" + COMMON),
}
#: what runs a script with settings that have no option
STOPS = {"stops": ("tests/end_to_end/with_training.py", '{"early_stop": 1}')}
#: where some variants stop early the rate is so high that it magnifies rounding
TOLERANCE = {"stops": 1e-3}
NAMES = {name: ("-o", f"{name}_1.out", "--stats", f"{name}_1.csv") for name in RUNS}
ONE = [(name, *run) for name, run in RUNS.items()]


def torchrun(folder: Path, script: str, *args: object, program: tuple[str, ...] = ()) -> Ended:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "--local-addr", "127.0.0.1", *(program or (str(ROOT / script),)), *map(str, args),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def losses(path: Path) -> list[list[float]]:
    with path.open(newline="") as file:
        return [
            [float(row[key] or 0) for key in ("validation_loss", "training_loss", "learning_rate")]
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(folder: Path, name: str) -> None:
    script, options = RUNS[name]
    names = ("-o", f"{name}_2.out", "--stats", f"{name}_2.csv")
    words = (*options.split(), *names)
    if name in STOPS:
        with_training, settings = STOPS[name]
        program = (str(ROOT / with_training), settings, str(ROOT / script))
        ended = torchrun(folder, script, *words, program=program)
    else:
        ended = torchrun(folder, script, *words)
    report = ended.report  # fails unless stdout is one JSON object
    assert report["wrote"] == f"{name}_2.out"
    one, two = losses(folder / f"{name}_1.csv"), losses(folder / f"{name}_2.csv")
    assert len(one) == len(two) == 4
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=TOLERANCE.get(name, 1e-5))
    both = (tensors(folder, f"{name}_{count}.out") for count in (1, 2))
    for row, other in zip(*both, strict=True):
        assert other.shape == row.shape
        if name not in TOLERANCE:
            torch.testing.assert_close(other, row, rtol=1e-3, atol=1e-5)
    assert not list((folder / "checkpoints").iterdir())
    assert not list(folder.glob(".*.tmp"))


def tensors(folder: Path, name: str) -> list[torch.Tensor]:
    if name.startswith(("block", "stops")):
        variants = bundle.open_bundle(
            folder / name, checkpoint.load(folder / "model.pth").fingerprint
        ).load_all()
        return [tensor for variant in variants for _, tensor in sorted(variant.tensors.items())]
    return list(checkpoint.load(folder / name).model.state_dict().values())


def test_batch_that_does_not_divide_is_one_clear_line(folder: Path) -> None:
    ended = torchrun(folder, MODEL, *RUNS["model"][1].split(), "--batch-size", 7, "-o", "none.pth")
    lines = {line for line in ended.err.splitlines() if line.startswith("Error: ")}
    assert ended.code == 1
    assert lines == {"Error: batch_size 7 does not divide among 2 processes."}
    assert ended.out == ""
    assert not (folder / "none.pth").exists()


def test_killed_processes_continue(folder: Path) -> None:
    """All are killed in the middle of the second epoch; steps 10 and 11 are taken again.

    A loss of an epoch is the sum over both processes, also of the steps before the checkpoint.
    """
    script, options = RUNS["model"]
    kill = (
        "import os, runpy, signal, sys, transformers; sys.argv = sys.argv[1:];"
        "real, calls = transformers.Trainer.training_step, [];"
        "step = lambda *a, **k: (calls.append(1), len(calls) == 12 and os.kill(os.getpid(), 9),"
        " real(*a, **k))[-1];"
        "transformers.Trainer.training_step = step;"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (folder / "killed.py").write_text(kill)
    names = ("-o", "killed.out", "--stats", "killed.csv")
    command = (*options.split(), *names, "--save-steps", 3)
    killed = torchrun(folder, script, str(ROOT / script), *command, program=("killed.py",))
    assert killed.code != 0
    assert f"exitcode  : {-signal.SIGKILL}" in killed.err
    assert not (folder / "killed.out").exists()
    report: dict[str, Any] = torchrun(folder, script, *command).report
    assert report["resumed_from_epoch"] == 1 + 1 / 8
    for row, other in zip(
        losses(folder / "model_1.csv"), losses(folder / "killed.csv"), strict=True
    ):
        assert other == pytest.approx(row, rel=1e-5)


def test_least_squares_of_two_processes_equals_one(folder: Path) -> None:
    """Modules are dealt out; nothing is summed over the processes, so the bytes are the same."""
    files: dict[str, list[bytes]] = {}
    for name, run in (("one", alone), ("two", torchrun)):
        options = (
            "-m", "model.pth", "-p", "modules.npy", "--data", "data", "--device", "cpu",
            "-o", f"{name}.npy", "--stats", f"{name}.csv",
            "--calibration", f"{name}_calibration.npy",
        )  # fmt: skip
        ended = run(folder, BLOCK, *options)
        assert ended.code == 0, ended.err
        files[name] = [(folder / f"{name}{end}.npy").read_bytes() for end in ("", "_calibration")]
    assert files["one"] == files["two"]


def alone(folder: Path, script: str, *args: object) -> Ended:
    found = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(found.returncode, found.stdout, found.stderr)
