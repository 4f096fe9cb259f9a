"""Training of every family: the best epoch and an interrupted run have the right weights."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from composable import runs, tasks
from composable.errors import UserError
from composable.models.checkpoint import Checkpoint
from composable.training import train, trainer
from composable.training.options import Options
from tests import tiny, tiny_tasks
from tests.end_to_end.test_matrix import dense_of, tasks_of


def prepared(layout: str, folder: Path) -> tuple[Checkpoint, Any, Any]:
    """A tiny model with its first task: model, task, corpora."""
    name = tasks_of(layout)[0]
    made, task, data = dense_of(layout, name), tasks.by_name(name), folder / "data"
    if not data.exists():
        tiny.corpus(data) if name == "translation" else tiny_tasks.data(name, data)
    corpora = tuple(task.read(str(data), None, split, None) for split in ("train", "valid"))
    return made, task, corpora


def run(
    layout: str, folder: Path, name: str, info: dict[str, Any] | None = None, **changes: Any
) -> tuple[Checkpoint, train.Outcome]:
    """Train for three epochs; `info` is what the model file says beside the usual."""
    made, task, corpora = prepared(layout, folder)
    made.info |= info or {}
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.02, "early_stop": 0, "device": "cpu"}
    options = Options(**settings | changes, checkpoint_dir=folder / name)  # type: ignore[arg-type]
    data = train.data_of(made, corpora)
    return made, train.run(made.model, {}, data, task.functions(), options, {"layout": layout})


@pytest.mark.parametrize("layout", tiny.ALL)
def test_a_resumed_run_is_the_uninterrupted_one(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(layout, tmp_path, "whole")
    save = trainer.Trainer._save_checkpoint

    def save_and_stop(self: Any, model: Any, trial: Any) -> None:
        save(self, model, trial)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(layout, tmp_path, "stopped")
    monkeypatch.setattr(trainer.Trainer, "_save_checkpoint", save)
    resumed, outcome = run(layout, tmp_path, "stopped")
    assert outcome.resumed_from == 1
    found = resumed.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_when_checkpoints_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By steps, by the clock or after epochs alone: the weights are the same."""
    saved: list[int] = []
    save = trainer.Trainer._save_checkpoint

    def note(self: Any, model: Any, trial: Any) -> None:
        saved.append(self.state.global_step)
        save(self, model, trial)

    monkeypatch.setattr(trainer.Trainer, "_save_checkpoint", note)
    states = []
    for steps, pause, expected in (
        (0, 0.0, [5]),
        (None, 0.0, [1, 2, 3, 4, 5]),
        (2, 600.0, [2, 4, 5]),
    ):
        monkeypatch.setattr(trainer, "PAUSE", pause)
        monkeypatch.setattr(trainer, "SHARE", 0)
        made, outcome = run("vit", tmp_path, "x", epochs=1, save_steps=steps)
        outcome.clean_up()
        assert saved == expected
        saved.clear()
        states.append(made.model.state_dict())
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, other[name]) for other in states[1:]), name


@pytest.mark.parametrize("layout", tiny.ALL)
def test_the_weights_are_those_of_the_best_epoch(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation is made to say that the first of three epochs was the best."""
    losses = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(train, "mean_of_samples", lambda _: {"loss": next(losses)})
    seen = {}
    save = trainer.Trainer._save_checkpoint

    def save_and_keep(self: Any, model: Any, trial: Any) -> None:
        save(self, model, trial)
        state = self.model.state_dict().items()
        seen[round(self.state.epoch)] = {name: tensor.clone() for name, tensor in state}

    monkeypatch.setattr(trainer.Trainer, "_save_checkpoint", save_and_keep)
    made, outcome = run(layout, tmp_path, "best")
    assert outcome.best_epoch == 1
    found = made.model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in seen[1].items())
    assert any(not torch.equal(tensor, found[name]) for name, tensor in seen[3].items())


@pytest.mark.parametrize(
    ("layout", "info"),
    [
        ("opt", {"max_length": 8}),
        ("bert", {"max_length": 5}),
        ("vit", {"image_processor": tiny.dense("vit").info["image_processor"] | {"resample": 3}}),
    ],
)
def test_the_same_data_seen_in_another_way_is_another_run(
    layout: str, info: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoints of the first run are still there; only the same run goes on with them."""
    resumed = [
        run(layout, tmp_path, "x", said, epochs=1)[1].resumed_from for said in ({}, info, {}, info)
    ]
    assert resumed == [None, None, 1, 1]


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json")
        ),
    ],
)
def test_no_checkpoint_runs_code(name: str, tmp_path: Path) -> None:
    """A seal can be made by anyone; what is unpickled must not be able to do anything."""

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    run("vit", tmp_path, "x", epochs=1)
    (folder,) = tmp_path.glob("x/*/checkpoint-*")
    (folder / name).write_bytes(pickle.dumps(Hostile(), protocol=2))
    (folder / runs.SEAL).unlink()
    runs.seal(folder)
    if name == "trainer_state.json":
        assert run("vit", tmp_path, "x", epochs=1)[1].resumed_from is None
    else:
        with pytest.raises(
            UserError, match=rf"{folder}: a checkpoint does not fit the model"
        ) as caught:
            run("vit", tmp_path, "x", epochs=1)
        assert "weights_only" not in str(caught.value)  # torch says how to execute it
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer.Trainer._save

    def save_other_names(self: Any, output_dir: Any = None, state_dict: Any = None) -> None:
        save(self, output_dir, state_dict)
        from safetensors.torch import load_file, save_file

        path = Path(output_dir) / "model.safetensors"
        tensors = load_file(path)
        tensors["other"] = tensors.pop(sorted(tensors)[0])
        save_file(tensors, path)

    monkeypatch.setattr(trainer.Trainer, "_save", save_other_names)
    with pytest.raises(UserError, match="a checkpoint does not fit the model"):
        run("vit", tmp_path, "x")
