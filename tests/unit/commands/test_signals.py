"""Commands that are told to stop: one line, the exit code that shells expect."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from composable.commands import cli, options
from tests.end_to_end.forked import environment


@dataclass(frozen=True)
class Nothing:
    """No options."""


def run(
    do: Callable[[], Any], capsys: pytest.CaptureFixture[str], settings: type = Nothing
) -> tuple[int, str]:
    """Exit code and stderr of a command that does this."""

    @cli.command(settings)
    def main(_: Any) -> None:
        """Do it."""
        do()

    with pytest.raises(SystemExit) as caught:
        main.main([])
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def _hears_sighup() -> Iterator[None]:
    """Whoever runs the tests may have said nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [
        (signal.SIGINT, 130, "interrupted; "),
        (signal.SIGTERM, 143, "interrupted by SIGTERM; "),
        (signal.SIGHUP, 129, "interrupted by SIGHUP; "),
    ],
)
def test_signals_are_one_line(
    number: signal.Signals, code: int, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            for another in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(another)  # a second one does not end the clean-up
            cleaned.append(True)

    before = signal.getsignal(number)
    found, said = run(work, capsys)
    assert found == code
    assert said == f"Error: {how}run the same command again.\n"
    assert cleaned == [True]
    assert signal.getsignal(number) == before


def test_commands_that_resume_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, said = run(lambda: signal.raise_signal(signal.SIGTERM), capsys, options.WholeModel)
    assert said.endswith("run the same command again; it goes on from its last checkpoint.\n")


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGTERM, 143, "interrupted by SIGTERM; "), (signal.SIGINT, 130, "interrupted; ")],
)
def test_a_signal_within_a_destructor_is_not_lost(
    number: signal.Signals, code: int, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python drops what is raised there."""

    class Dies:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def work() -> None:
        Dies()
        for _ in range(1000):
            time.sleep(0.01)
        raise AssertionError("the command went on")

    found, said = run(work, capsys)
    assert found == code
    assert said.startswith(f"Error: {how}")


def test_signals_at_the_end_of_a_process_that_was_stopped(tmp_path: Path) -> None:
    """Libraries compute something when Python ends; a second Ctrl-C there is no traceback."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, os, signal\n"
        "from composable.commands import cli, options\n"
        "def end():\n"
        "    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        os.kill(os.getpid(), number)\n"
        "atexit.register(end)\n"
        "@cli.command(options.WholeModel)\n"
        "def main(_):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "main([])\n"
    )
    command = [sys.executable, str(program)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert ended.stderr == (
        "Error: interrupted; run the same command again; it goes on from its last checkpoint.\n"
    )


def test_a_signal_in_the_first_instant(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is heard from the moment that its handler is set, before the command begins."""
    set_handler = signal.signal

    def signal_at_once(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        if number == signal.SIGHUP and callable(handler):
            signal.raise_signal(signal.SIGHUP)
        return before

    monkeypatch.setattr(signal, "signal", signal_at_once)
    code, said = run(lambda: None, capsys)
    monkeypatch.undo()
    for number in (signal.SIGTERM, signal.SIGINT):  # as the end of the process would
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        )
    assert (code, said) == (129, "Error: interrupted by SIGHUP; run the same command again.\n")


def test_nohup_keeps_sighup_away(capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run(lambda: signal.raise_signal(signal.SIGHUP), capsys) == (0, "")


def test_the_signal_reaches_a_process_that_prepares_batches_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    monkeypatch.setattr("time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    assert run(die, capsys)[0] == 143
    monkeypatch.setattr("time.sleep", lambda _: None)
    code, said = run(die, capsys)
    assert code == 1
    assert said.startswith("Error: a process that prepares batches was ended")
