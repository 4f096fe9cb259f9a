"""Long scripts that are killed at fixed points, interrupted, or run out of disk; and run again."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from composable import runs
from composable.models import checkpoint
from composable.training.options import EARLY_STOP, Options
from composable.variants.tuning import tune_variants
from tests import tiny
from tests.end_to_end.forked import Ended, Server, environment
from tests.paths import ROOT

#: script -> (its inputs, its output, its stats, how `forked` names the writing of its output)
SCRIPTS = {
    "baseline_finetuning.py": (
        ("-m", "composed.pth"), "tuned.pth", "stats_baseline.csv", "output"
    ),
    "block_level_finetuning.py": (
        ("-m", "model.pth", "--solver", "grad"), "tuned.npy", "stats_block.csv", "bundle"
    ),
    "model_level_finetuning.py": (
        ("-m", "model.pth", "-p", "modules.npy"), "tuned.pth", "stats_model.csv", "output"
    ),
}  # fmt: skip
BATCH, STEPS, EPOCHS = 8, 8, 4  # 60 pairs: 8 steps an epoch, the last batch has 4 pairs
OPTIONS = (
    *("--data", "data", "--batch-size", BATCH, "--epochs", EPOCHS),
    *("--device", "cpu", "--dtype", "float32"),
)
BLOCK = "block_level_finetuning.py"
ONE_BY_DAY = [
    BLOCK if script == BLOCK else pytest.param(script, marks=pytest.mark.nightly)
    for script in SCRIPTS
]
#: name -> (what happens in the process, the epoch after which the rerun continues)
POINTS: dict[str, tuple[dict[str, Any], float | None]] = {
    "mid-epoch": ({"call": "step", "count": 2 * STEPS + 3}, 2),
    "in-checkpoint": ({"call": "optimizer", "count": 2, "half": "optimizer.pt"}, 1),
    # the validation set has 2 batches; the first validation is of the start
    "in-validation": ({"call": "validation", "count": 2 * 2 + 1}, 2),
    "within-an-epoch": (
        {"call": "step", "count": 2 * STEPS + 7, "training": {"save_steps": 3}}, 2 + 5 / STEPS
    ),
}  # fmt: skip
MORE_POINTS: dict[str, tuple[dict[str, Any], float | None]] = {
    "early": ({"call": "step", "count": 4}, None),
    "in-first-checkpoint": ({"call": "optimizer", "count": 1}, None),
    "half-a-state": ({"call": "state", "count": 3, "half": "trainer_state.json"}, 2),
    "before-the-seal": ({"call": "seal", "count": 3}, 2),
    "before-old-checkpoints-go": ({"call": "rotate", "count": 2}, 2),
    "within-the-first-epoch": (
        {"call": "step", "count": 4, "training": {"save_steps": 1}},
        3 / STEPS,
    ),
    "in-a-checkpoint-of-steps": (
        {"call": "seal", "count": 4, "training": {"save_steps": 3}},
        1,
    ),
    "in-the-last-validation": ({"call": "validation", "count": 4 * 2 + 2}, EPOCHS),
    "before-the-output": ({"call": "bundle"}, EPOCHS),
}
BASELINE = "baseline_finetuning.py"
WITH_TRAINING = "tests/end_to_end/with_training.py"
#: After one epoch that is no better, as no option asks for.
IMPATIENT: Any = {"training": {"early_stop": 1}}
BY_DAY = [(BLOCK, point) for point in POINTS] + [
    (BASELINE, "in-validation"),
    (BASELINE, "within-an-epoch"),
    ("model_level_finetuning.py", "mid-epoch"),
]
BY_NIGHT = [(s, p) for s in SCRIPTS for p in POINTS if (s, p) not in BY_DAY]


@dataclass(frozen=True)
class Place:
    """A folder with everything that the long scripts read."""

    server: Server
    folder: Path

    def train(
        self, script: str, *args: object, training: dict[str, Any] | None = None, **fault: Any
    ) -> Ended:
        """Run a long script with the usual options, and settings that have no option."""
        inputs, output, *_ = SCRIPTS[script]
        words = (*inputs, "-o", output, *OPTIONS, *args)
        if training is None:
            return self.server.run(script, *words, cwd=self.folder, **fault)
        with_training = (WITH_TRAINING, json.dumps(training), ROOT / script)
        return self.server.run(*with_training, *words, cwd=self.folder, **fault)

    def result(self, script: str) -> tuple[bytes, list[list[str]]]:
        """The bytes of the output, and the stats without the columns of seconds."""
        _, output, stats, _ = SCRIPTS[script]
        lines = (self.folder / stats).read_text().splitlines()
        kept = [[*row[:3], *row[5:]] for row in (line.split(",") for line in lines)]
        return (self.folder / output).read_bytes(), kept

    def checkpoints(self) -> list[Path]:
        """Checkpoints that lie about, the newest last."""
        found = self.folder.glob("checkpoints/*/checkpoint-*")
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def tidy(self) -> None:
        """Remove what a run made."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        for path in (*self.folder.glob("tuned*"), *self.folder.glob("stats*")):
            path.unlink()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kill")
    tiny.corpus(folder / "data")
    checkpoint.save(folder / "model.pth", tiny.checkpoint())
    with Server() as server:
        for script, args in (
            ("config_generator.py", "--attention 0.5 --linear 0.3"),
            ("prune_scheme_generator.py", ""),
            ("prune.py", "--attention head_l1"),
            ("compose_model.py", "-o composed.pth"),
        ):
            model = () if script.startswith("prune_s") else ("-m", "model.pth")
            ended = server.run(script, *model, *args.split(), cwd=folder)
            assert ended.code == 0, ended.err
        yield Place(server, folder)


@pytest.fixture
def place(everything: Place) -> Iterator[Place]:
    everything.tidy()
    yield everything
    everything.tidy()


@pytest.fixture(scope="module")
def undisturbed(everything: Place) -> dict[str, tuple[bytes, list[list[str]]]]:
    """What each script makes when nothing happens."""
    results = {}
    for script in SCRIPTS:
        everything.tidy()
        report = everything.train(script).report
        assert report["epochs"] == EPOCHS
        assert report["resumed_from_epoch"] is None
        assert everything.checkpoints() == []
        results[script] = everything.result(script)
        assert len(results[script][1]) == 1 + 1 + EPOCHS
    everything.tidy()
    return results


@pytest.mark.parametrize(
    ("script", "point"),
    [*BY_DAY, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in BY_NIGHT)],
)
def test_killed_run_ends_as_an_undisturbed_one(
    place: Place, undisturbed: dict[str, Any], script: str, point: str
) -> None:
    check_killed(place, undisturbed, script, *POINTS[point])


@pytest.mark.nightly
@pytest.mark.parametrize("point", MORE_POINTS)
def test_killed_at_further_points(place: Place, undisturbed: dict[str, Any], point: str) -> None:
    check_killed(place, undisturbed, BLOCK, *MORE_POINTS[point])


def check_killed(
    place: Place, undisturbed: dict[str, Any], script: str, fault: dict[str, Any],
    resumed: float | None,
) -> None:  # fmt: skip
    killed = place.train(script, **fault)
    assert killed.code == -signal.SIGKILL
    assert not (place.folder / SCRIPTS[script][1]).exists()
    if fault["call"] == "optimizer":
        newest = {path.name for path in place.checkpoints()[-1].iterdir()}
        assert "model.safetensors" in newest
        assert "trainer_state.json" not in newest
    report = place.train(script, training=fault.get("training")).report
    assert report["resumed_from_epoch"] == resumed
    assert place.result(script) == undisturbed[script]
    assert place.checkpoints() == []


@pytest.mark.parametrize(
    "script", [BLOCK, pytest.param("baseline_finetuning.py", marks=pytest.mark.nightly)]
)
def test_killed_after_early_stopping(place: Place, script: str) -> None:
    """Some variants have stopped, or all: the rerun must not take one more step."""
    options = ("--epochs", 8, "--lr", 0.2)
    whole = place.train(script, *options, **IMPATIENT).report
    expected = place.result(script)
    assert 0 < whole["epochs"] < 8
    place.tidy()
    # rotate is called after the last checkpoint; output after the other one was removed
    for fault in ({"call": "rotate", "count": whole["epochs"]}, {"call": SCRIPTS[script][3]}):
        assert place.train(script, *options, **IMPATIENT, **fault).code == -signal.SIGKILL
        resumed = place.train(script, *options, **IMPATIENT).report
        assert resumed["resumed_from_epoch"] in (
            whole["epochs"],
            whole.get("best_epoch"),  # variants have one each
        )
        assert resumed["epochs"] == whole["epochs"]
        assert place.result(script) == expected
        place.tidy()


@pytest.mark.nightly
def test_killed_run_of_some_steps(place: Place) -> None:
    """In bfloat16, which a default run has where the processor has it."""
    script = "baseline_finetuning.py"
    options = ("--steps", 2 * STEPS + STEPS // 2, "--dtype", "bfloat16")
    whole = place.train(script, *options).report
    assert (whole["epochs"], whole["dtype"]) == (2.5, "bfloat16")
    expected = place.result(script)
    assert [row[0] for row in expected[1][1:]] == ["0", "1", "2", "2.5"]
    faults: tuple[tuple[dict[str, Any], float], ...] = (
        ({"call": "step", "count": 2 * STEPS + 3}, 2),  # in the epoch that is cut short
        ({"call": "rotate", "count": 3}, 2.5),  # after its checkpoint
        ({"call": "output"}, 2.5),
    )
    for fault, resumed in faults:
        place.tidy()
        assert place.train(script, *options, **fault).code == -signal.SIGKILL
        assert place.train(script, *options).report["resumed_from_epoch"] == resumed
        assert place.result(script) == expected
        assert place.checkpoints() == []


@pytest.mark.nightly
def test_variants_that_had_stopped_stay_stopped(place: Place) -> None:
    """At this rate some variants stop before the others; their relative errors are kept too."""
    options = ("--epochs", 6, "--lr", 0.1)
    place.train(BLOCK, *options, **IMPATIENT)
    expected = place.result(BLOCK)
    table = errors_in(place)
    place.tidy()
    assert place.train(BLOCK, *options, **IMPATIENT, call="step", count=4 * STEPS + 2).code < 0
    state = load_file(place.checkpoints()[-1] / "model.safetensors")
    assert set(state["bad_epochs"].tolist()) == {0, 1}
    assert place.train(BLOCK, *options, **IMPATIENT).report["resumed_from_epoch"] == 4
    assert place.result(BLOCK) == expected
    assert errors_in(place) == table


def errors_in(place: Place) -> list[list[str]]:
    """The table of the variants without the seconds."""
    with (place.folder / "stats_block_variants.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    seconds = rows[0].index("seconds")
    return [[*row[:seconds], *row[seconds + 1 :]] for row in rows]


def kill_late(place: Place, script: str = BLOCK, *args: object) -> None:
    """Leave checkpoints of epoch 2 behind."""
    fault = POINTS["mid-epoch"][0]
    assert place.train(script, *args, **fault).code == -signal.SIGKILL
    assert place.checkpoints()


def test_without_resume_a_run_starts_afresh(
    place: Place, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python may ask; the same run would continue, since all other settings are the same."""
    kill_late(place)
    monkeypatch.chdir(place.folder)
    names = (Path(name) for name in ("tuned.npy", "stats_block.csv"))
    training = Options(
        epochs=EPOCHS, batch_size=BATCH, lr=4e-2, early_stop=EARLY_STOP, device="cpu", resume=False
    )
    result, report = tune_variants(
        Path("model.pth"), [Path("modules.npy")], *names, training, "grad", 0.0,
        data="data", limit=None, calibration=Path("calibration.npy"), memory_budget=1 << 30,
    )  # fmt: skip
    result.clean_up()
    assert report["resumed_from_epoch"] is None
    assert place.result(BLOCK) == undisturbed[BLOCK]


@pytest.mark.nightly
def test_another_run_does_not_continue_this_one(place: Place) -> None:
    """Nor does it remove the checkpoints of this one."""
    script, begins = "baseline_finetuning.py", {"call": "step", "count": 1}
    tiny.corpus(place.folder / "data2", seed=5)
    checkpoint.save(place.folder / "other.pth", tiny.checkpoint(seed=3))
    kill_late(place, script)
    # an option stands for all of them: test_train.py compares the identities of their values
    for change in (("--seed", 7), ("--limit", 50), ("-m", "other.pth"), ("--data", "data2")):
        ended = place.train(script, *change, **begins)
        assert ended.code == -signal.SIGKILL, ended.err
        assert "continuing" not in ended.err, change
    for change in (("-q",), ("--save-steps", 5, "--stats", "stats_other.csv")):
        ended = place.train(script, *change, **begins)
        assert ("continuing after epoch 2" in ended.err) == (change != ("-q",)), change


def test_another_bundle_does_not_continue_this_one(place: Place) -> None:
    (place.folder / "less.json").write_text(
        (place.folder / "conf_prune.json").read_text().replace("0.3", "0.4")
    )
    place.server.run(
        "prune.py", "-m", "model.pth", "-c", "less.json", "-o", "less.npy",
        "--attention", "head_l1", cwd=place.folder,
    )  # fmt: skip
    kill_late(place)
    assert place.train(BLOCK, "-p", "less.npy").report["resumed_from_epoch"] is None


def test_damaged_checkpoint_is_left_out(place: Place, undisturbed: dict[str, Any]) -> None:
    """One flipped bit gave another model; test_runs.py has what else may happen to a folder."""
    # the kill before the old checkpoints are removed leaves two
    assert place.train(BASELINE, call="rotate", count=2).code == -signal.SIGKILL
    first, last = place.checkpoints()
    weights = bytearray((last / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (last / "model.safetensors").write_bytes(weights)
    ended = place.train(BASELINE)
    assert ended.report["resumed_from_epoch"] == 1, first
    assert f"{last.name} is damaged (model.safetensors was changed) and is left out" in ended.err
    assert place.result(BASELINE) == undisturbed[BASELINE]


@pytest.mark.nightly
def test_the_best_checkpoint_is_damaged(place: Place) -> None:
    """Without the best weights a run cannot end; what needs them is left out, too."""
    options = ("--epochs", 8, "--lr", 0.2)
    whole = place.train(BASELINE, *options, **IMPATIENT).report
    expected = place.result(BASELINE)
    assert whole["best_epoch"] < whole["epochs"], "choose another --lr"
    place.tidy()
    assert place.train(BASELINE, *options, **IMPATIENT, call="output").code == -signal.SIGKILL
    best, last = place.checkpoints()
    (best / "model.safetensors").write_bytes(b"")
    ended = place.train(BASELINE, *options, **IMPATIENT)
    assert ended.report["resumed_from_epoch"] is None
    assert f"{last.name} needs {best.name}, which is damaged" in ended.err
    assert place.result(BASELINE) == expected


def test_two_equal_runs_at_once(place: Place, undisturbed: dict[str, Any]) -> None:
    kill_late(place)
    folder = runs.RunFolder(place.checkpoints()[0].parent)  # as the other run has it
    ended = place.train(BLOCK, "-q")
    assert ended.code == 1
    assert ended.err.strip() == ended.error, "one line"
    assert f"process {os.getpid()} on " in ended.error
    assert "is at work on the same" in ended.error
    folder.release()
    assert place.train(BLOCK).report["resumed_from_epoch"] == 2
    assert place.result(BLOCK) == undisturbed[BLOCK]


def test_checkpoints_may_move(place: Place) -> None:
    """The best epoch lies before the last: its weights are found where the folder is now."""
    script = "baseline_finetuning.py"
    options = ("--epochs", 8, "--lr", 0.2)
    whole = place.train(script, *options, **IMPATIENT).report
    expected = place.result(script)
    assert whole["best_epoch"] < whole["epochs"] < 8, "choose another --lr"
    place.tidy()
    fault = {"call": "rotate", "count": whole["epochs"]}
    assert place.train(script, *options, **IMPATIENT, **fault).code == -signal.SIGKILL
    (place.folder / "moved").mkdir()
    os.rename(place.folder / "checkpoints", place.folder / "moved" / "checkpoints")
    moved = ("--workdir", place.folder / "moved", "--stats", "stats_baseline.csv")
    assert (
        place.train(script, *options, *moved, **IMPATIENT).report["resumed_from_epoch"]
        == whole["epochs"]
    )
    assert place.result(script) == expected
    shutil.rmtree(place.folder / "moved")


@pytest.mark.parametrize(
    ("script", "number"),
    [
        (BLOCK, signal.SIGTERM),
        pytest.param(BLOCK, signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param(BASELINE, signal.SIGHUP, marks=pytest.mark.nightly),
    ],
)
def test_interrupted_by_a_signal(
    place: Place, undisturbed: dict[str, Any], script: str, number: signal.Signals
) -> None:
    fault = {**POINTS["mid-epoch"][0], "signal_": int(number)}
    ended = place.train(script, "-q", **fault)
    assert ended.code == 128 + number
    assert ended.out == ""
    assert ended.err.strip() == ended.error
    assert "interrupted" in ended.error
    assert not (place.folder / SCRIPTS[script][1]).exists()
    assert list(place.folder.glob(".*.tmp")) == []
    assert place.train(script).report["resumed_from_epoch"] == 2
    assert place.result(script) == undisturbed[script]


@pytest.mark.nightly
def test_signals_beside_processes_that_prepare_batches(
    place: Place, undisturbed: dict[str, Any]
) -> None:
    """A batch system sends SIGTERM to all of a job's processes; nohup keeps SIGHUP away."""
    inputs, output, *_ = SCRIPTS[BASELINE]
    arguments = [*inputs, "-o", output, *OPTIONS]
    workers = json.dumps({"workers": 2})
    script = [str(ROOT / WITH_TRAINING), workers, str(ROOT / BASELINE)]
    command = [sys.executable, *script, *map(str, arguments)]
    process = subprocess.Popen(
        ["nohup", *command], cwd=place.folder, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "epoch 1:" in line:
            os.killpg(process.pid, signal.SIGHUP)
        if "epoch 2:" in line:
            os.killpg(process.pid, signal.SIGTERM)
    process.stderr.close()
    assert process.wait(timeout=60) == 143
    assert lines[-1].startswith("Error: interrupted by SIGTERM; run the same command again")
    assert "Traceback" not in "".join(lines), "".join(lines)
    assert place.train(BASELINE).report["resumed_from_epoch"] == 2
    assert place.result(BASELINE) == undisturbed[BASELINE]


@pytest.mark.nightly
def test_command_as_users_call_it(place: Place, undisturbed: dict[str, Any]) -> None:
    """No server: `python block_level_finetuning.py`, killed from outside while it trains."""
    inputs, output, *_ = SCRIPTS[BLOCK]
    arguments = [*inputs, "-o", output, *OPTIONS]
    command = [sys.executable, str(ROOT / BLOCK), *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=place.folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    for line in process.stderr:  # wherever it is when this arrives, the rerun must end the same
        if "epoch 2:" in line:
            process.kill()
            break
    process.stderr.close()
    process.wait(timeout=60)
    assert place.train(BLOCK).code == 0
    assert place.result(BLOCK) == undisturbed[BLOCK]


@pytest.mark.parametrize("script", ONE_BY_DAY)
@pytest.mark.parametrize("kilobytes", [2, 20])
def test_disk_full_while_training(
    place: Place, undisturbed: dict[str, Any], script: str, kilobytes: int
) -> None:
    """2 KiB are not enough for what the training writes first, 20 not for a checkpoint's model."""
    output = place.folder / SCRIPTS[script][1]
    output.write_bytes(b"older")
    ended = place.train(script, "-q", file_limit=kilobytes * 1024)
    assert ended.code == 1
    assert ended.out == ""
    assert ended.err.strip() == ended.error, "one line"
    assert "space left" in ended.error
    assert output.read_bytes() == b"older"
    assert list(place.folder.glob(".tuned*")) == []
    output.unlink()
    assert place.train(script).report["resumed_from_epoch"] is None
    assert place.result(script) == undisturbed[script]


@pytest.mark.parametrize("script", ONE_BY_DAY)
def test_disk_full_while_the_output_is_written(
    place: Place, undisturbed: dict[str, Any], script: str
) -> None:
    name, fault = SCRIPTS[script][1], {"call": SCRIPTS[script][3]}
    assert place.train(script, **fault).code == -signal.SIGKILL  # nothing is left but to write
    (place.folder / name).write_bytes(b"older")
    ended = place.train(script, "-q", file_limit=len(undisturbed[script][0]) - 1)
    assert ended.code == 1
    assert ended.err.strip() == ended.error, "one line"
    assert name in ended.error
    assert (place.folder / name).read_bytes() == b"older"
    assert list(place.folder.glob(f".{name}*")) == []
    assert place.train(script).report["resumed_from_epoch"] == EPOCHS
    assert place.result(script) == undisturbed[script]


@pytest.mark.nightly
def test_disk_full_at_the_optimizer(place: Place, undisturbed: dict[str, Any]) -> None:
    """The model of the checkpoint is written; torch reports the full disk as a RuntimeError."""
    ended = place.train(BLOCK, "-q", call="full", count=2)
    assert ended.code == 1
    assert ended.err.strip() == ended.error, "one line"
    assert "a checkpoint could not be written" in ended.error
    assert place.train(BLOCK).report["resumed_from_epoch"] == 1
    assert place.result(BLOCK) == undisturbed[BLOCK]
