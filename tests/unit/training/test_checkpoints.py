"""Checkpoints of trainings: what a state must hold so that a run goes on from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from composable import runs
from composable.training import checkpoints

ROW = {
    "epoch": 0, "training_loss": None, "validation_loss": 2.5, "training_seconds": 0.0,
    "validation_seconds": 0.1, "learning_rate": 0.0,
}  # fmt: skip
LATER = {**ROW, "epoch": 1, "training_loss": 2.0}


def written(folder: Path, history: Any, more: str = "") -> Path:
    """A sealed checkpoint with this history, and more of a state."""
    made = folder / "checkpoint-4"
    made.mkdir(parents=True)
    for name in (checkpoints.MODEL, *checkpoints.STEPS, "rng_state.pth"):
        (made / name).write_bytes(b"content")
    state = {"global_step": 4, "epoch": 1.0, "log_history": history}
    (made / checkpoints.STATE).write_text(json.dumps(state).removesuffix("}") + more + "}")
    runs.seal(made)
    return made


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"stats": ROW}],
        [{"stats": ROW}, {"loss": 2.0, "learning_rate": 0.1, "epoch": 1.0}, {"stats": LATER}],
        [{"stats": ROW}, {"eval_loss": 2.5, "epoch": 1.0}, {"stats": LATER}],
    ],
)
def test_a_history_as_a_training_writes_it(history: Any, tmp_path: Path) -> None:
    made = written(tmp_path, history)
    assert checkpoints.newest(tmp_path, 1) == made


@pytest.mark.parametrize(
    "history",
    [
        7,
        None,
        [7],
        [{"stats": ROW}, float("inf")],
        [{"stats": 7}],
        [{"stats": {**ROW, "epoch": None}}],
        [{"stats": {**ROW, "epoch": 1}}],
        [{"stats": ROW}, {"stats": ROW}],
        [{"stats": LATER}, {"stats": ROW}],
        [{"stats": {name: ROW[name] for name in ROW if name != "training_seconds"}}],
        [{"stats": {**ROW, "validation_loss": float("nan")}}],
        [{"stats": {**ROW, "validation_loss": "2.5"}}],
        [{"stats": {**ROW, "learning_rate": None}}],
        [{"stats": ROW}, {"loss": "2"}],
        [{"stats": ROW}, {"loss": 2.0, "learning_rate": [1]}],
    ],
)
def test_a_history_that_no_training_writes(
    history: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, history)
    assert checkpoints.newest(tmp_path, 1) is None
    said = f"is damaged ({checkpoints.STATE} is not readable) and is left out."
    assert said in caplog.text


@pytest.mark.parametrize(
    "more", [', "unknown": 1', ', "log_history": []', ', "max_steps": 1, "max_steps": 2']
)
def test_a_state_that_trainer_does_not_know_or_reads_otherwise(more: str, tmp_path: Path) -> None:
    """Of a key that occurs twice a program may take either value."""
    written(tmp_path, [{"stats": ROW}], more)
    assert checkpoints.newest(tmp_path, 1) is None
