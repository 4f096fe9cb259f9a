"""A measurement that was interrupted goes on, with the bytes of one that was not."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composable import ranking, runs
from composable.calibration.batching import GivenBatches
from composable.errors import UserError
from composable.formats import scores_file
from composable.ranking import base
from composable.ranking.trajectory import Measuring, TrajectoryOptions
from tests import tiny


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the layers that are measured from now on."""
    found: list[str] = []
    layer_of = Measuring.layer

    def counted(self: Measuring, layer: Any, stage: Any) -> Any:
        found.append(layer.path)
        return layer_of(self, layer, stage)

    monkeypatch.setattr(Measuring, "layer", counted)
    return found


def rank(folder: Path, name: str = "scores.npz", seed: int = 0, **options: Any) -> bytes:
    made = tiny.dense("t5")
    texts = GivenBatches([tiny.inputs(made, seed=seed)])
    how = TrajectoryOptions(checkpoints=str(folder / "checkpoints"), **options)
    scores = base.rank(ranking.by_name("trajectory"), made, texts, how)
    scores_file.save(folder / name, scores)
    base.forget(scores, folder / "checkpoints")
    return (folder / name).read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, folder: Path, at: int) -> Path:
    """Stop after so many layers; the folder of what is kept."""
    before = Measuring.layer
    calls: list[int] = []

    def stops(self: Measuring, layer: Any, stage: Any) -> Any:
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        return before(self, layer, stage)

    with monkeypatch.context() as patch:
        patch.setattr(Measuring, "layer", stops)
        with pytest.raises(KeyboardInterrupt):
            rank(folder)
    (kept,) = (folder / "checkpoints").iterdir()
    return kept


def test_goes_on_with_the_layers_that_are_missing(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rank(tmp_path, "whole.npz")
    assert measured == [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
    kept = interrupt(monkeypatch, tmp_path, at=3)
    measured.clear()
    assert rank(tmp_path) == expected
    assert measured == ["decoder.block.1"]
    assert not kept.exists()


def test_a_damaged_part_is_measured_again(
    tmp_path: Path,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = rank(tmp_path, "whole.npz")
    part = interrupt(monkeypatch, tmp_path, at=3) / "encoder.block.1.npz"
    content = bytearray(part.read_bytes())
    content[-40] ^= 1
    part.write_bytes(content)
    measured.clear()
    assert rank(tmp_path) == expected
    assert measured == ["encoder.block.1", "decoder.block.1"]
    assert "encoder.block.1.npz: is damaged; it is measured again." in caplog.text


@pytest.mark.parametrize("content", [b"", b"PK", None, np.float32])
def test_a_part_with_a_right_seal_and_other_content(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: Any,
) -> None:
    expected = rank(tmp_path, "whole.npz")
    kept = interrupt(monkeypatch, tmp_path, at=3)
    one, other = kept / "encoder.block.1.npz", kept / "encoder.block.0.npz"
    if content is np.float32:
        with np.load(io.BytesIO(runs.read_sealed(one))) as stored:
            arrays = {name: values.astype(content) for name, values in stored.items()}
        file = io.BytesIO()
        np.savez(file, **arrays)
        content = file.getvalue()
    runs.write_sealed(one, runs.read_sealed(other) if content is None else content)
    assert rank(tmp_path) == expected
    assert "encoder.block.1.npz: " in caplog.text
    assert "it is measured again." in caplog.text


@pytest.mark.parametrize("other", [{"seed": 1}, {"group": 2}])
def test_nothing_is_taken_from_other_texts_or_options(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, other: Any
) -> None:
    kept = interrupt(monkeypatch, tmp_path, at=2)
    measured.clear()
    rank(tmp_path, **other)
    assert len(measured) == 4
    assert kept.exists()


def test_two_equal_measurements_at_once(tmp_path: Path) -> None:
    made = tiny.dense("t5")
    texts = GivenBatches([tiny.inputs(made)])
    how = TrajectoryOptions(checkpoints=str(tmp_path))
    ranker = ranking.by_name("trajectory")
    with (
        base.Parts.of(base.origin_of(ranker, made, texts, how), str(tmp_path)),
        pytest.raises(UserError, match="is at work on the same"),
    ):
        base.rank(ranker, made, texts, how)
