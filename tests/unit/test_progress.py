"""Progress: bars on a terminal alone, elsewhere one line of what takes long, nothing if quiet."""

import contextlib
import logging
import os
import pty
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from composable import progress
from composable.progress import Stage, bytes_of
from composable.training.callbacks import Progress


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPOSABLE_PROGRESS", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@contextlib.contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Let stderr, and the log, be a terminal; yields what returns what it was sent.

    No fixture: pytest sets stderr anew as a test begins.
    """
    main, side = pty.openpty()
    os.set_blocking(main, False)
    with os.fdopen(side, "w", buffering=1) as stream, contextlib.redirect_stderr(stream):
        handler = logging.StreamHandler(stream)
        progress.log.addHandler(handler)
        yield lambda: read(main)
        progress.log.removeHandler(handler)
    os.close(main)


def read(descriptor: int) -> str:
    found = b""
    with contextlib.suppress(BlockingIOError):  # nothing more came
        while True:
            found += os.read(descriptor, 1 << 16)
    return found.decode()


def through(stage: Stage) -> None:
    with stage:
        for _ in stage:
            pass


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # of 400 variants the first is done after `seconds`: 399 times as long is left
        (6.0, "prune: 1 of 400 variants, about 40 min left"),
        (5.0, "prune: 1 of 400 variants, about 33 min left"),
        (60.0, "prune: 1 of 400 variants, about 6.7 h left"),
    ],
)
def test_one_line_where_there_is_no_terminal(
    seconds: float, expected: str,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock = iter(i * seconds for i in range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "composable"):
        through(Stage(range(400), "prune", unit="variants"))
    assert lines(caplog) == [expected]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds", [0.09, 0.19])  # of each: 4.5 in all; 9.5, 4.5 after the first 5
def test_what_takes_no_time_has_no_line(
    seconds: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(i * seconds for i in range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "composable"):
        through(Stage(range(50), "prune", unit="variants"))
    assert lines(caplog) == []


def test_a_resumed_stage_counts_what_it_did_itself(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "composable"):
        Stage(None, "model", 100, unit="steps", initial=70).update(10)
    assert lines(caplog) == ["model: 80 of 100 steps, about 20 s left"]


def test_bytes_are_said_in_megabytes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 6.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "composable"):
        bytes_of("write model.pth", 4 * 10**9).update(10**9)
    assert lines(caplog) == ["write model.pth: 1000 of 4000 MB, about 18 s left"]


@pytest.mark.parametrize("variable", [("COMPOSABLE_PROGRESS", "0"), ("RANK", "1")])
def test_nothing_if_quiet_or_not_the_first_process(
    variable: tuple[str, str], caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with caplog.at_level("INFO", "composable"):
        through(Stage(range(50), "prune", unit="variants"))
        with terminal() as sent:
            through(Stage(range(50), "prune", unit="variants"))
            progress.log.info("the end")
            shown = sent()
    assert lines(caplog) == ["the end"]
    assert shown == "the end\r\n"
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with caplog.at_level("INFO", "composable"), terminal() as sent:
        through(Stage(range(50), "prune", unit="variants"))
        shown = sent()
    for part in ("prune:   0%", "prune: 100%", "50/50"):
        assert part in shown
    assert shown.endswith("\n")
    assert lines(caplog) == []


def test_a_log_line_has_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "composable"), terminal() as sent:
        with Stage(None, "prune", 3, unit="variants") as stage:
            stage.update()
            progress.log.info("grouped queries: rates are rounded")
            stage.update()
        shown = sent()
    before, _, after = shown.partition("grouped queries: rates are rounded\r\n")
    wiped, between = before.rsplit("\r", 2)[1:]
    assert wiped.isspace(), "the bar was not taken away"
    assert between == ""
    assert "prune:" in after


def test_a_part_leaves_no_trace() -> None:
    with terminal() as sent:
        through(Stage(range(50), "record", unit="batches", is_part=True))
        shown = sent()
    assert "record" in shown
    assert shown.rstrip("\r").rpartition("\r")[2].isspace()


def test_bytes_get_a_bar_only_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def written() -> str:
        with bytes_of("write model.pth", 10) as stage:
            stage.update(4)
            stage.update(6)
        return sent()

    with terminal() as sent:
        assert written() == ""
        monkeypatch.setattr(progress, "MOMENT", 0.0)
        assert "write model.pth: 100%" in written()


def test_only_the_first_validation_of_a_training_has_a_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "duration", lambda seconds: "1 s")
    state = SimpleNamespace(
        global_step=0, max_steps=8, log_history=[], is_world_process_zero=True
    )  # fmt: skip
    shown, batches = Progress("model"), [0] * 4
    row = {"training_loss": None, "validation_loss": 1.0, "epoch": 0}
    row |= {"training_seconds": 0.0, "validation_seconds": 2.0}
    with caplog.at_level("INFO", "composable"):
        shown.on_train_begin(None, state, None)
        for _ in range(2):
            for _ in batches:
                shown.on_prediction_step(None, state, None, eval_dataloader=batches)
            state.log_history.append({"stats": row})
            shown.on_evaluate(None, state, None)
            for _ in range(4):
                state.global_step += 1
                shown.on_step_end(None, state, None)
        shown.close()
    assert lines(caplog) == [
        "model, validation: 1 of 4 batches, about 1 s left",
        "model: epoch 0: validation loss 1.0000 (2 s)",
        "model: 1 of 8 steps, about 1 s left",
        "model: epoch 0: validation loss 1.0000 (2 s)",
    ]
