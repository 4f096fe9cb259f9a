"""Wrong pairings, hostile files, outputs that are inputs, equal runs, files changed while read."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.forked import Server
from tests.faults import runner, sound
from tests.faults.attacks import ATTACKS, EVIL, Attack
from tests.faults.kills import COMMANDS, NEEDS
from tests.faults.runner import Job, Pool, Trial
from tests.faults.test_corruption import check

pytestmark = pytest.mark.faults
FAULT = "put together wrongly"
ALL = (
    *NEEDS, "other.pth", "other_data", "text_classification.pth", "text_classification",
    "image_classification.pth", "image_classification", "images.npz", "units.npz",
)  # fmt: skip
#: Commands whose model is overwritten in place.
READERS = ("prune.py", "compose_model.py", "evaluate.py", "export_model.py", "config_generator.py",
           "block_level_finetuning.py (ls)", "model_level_finetuning.py")  # fmt: skip


@pytest.mark.parametrize("attacks", ATTACKS, ids=lambda function: function.__name__)
def test_nothing_is_run_lost_or_wrong(
    attacks: Callable[[], Iterator[Attack]], home: Path, pool: Pool, book: list[Trial]
) -> None:
    cases = list(attacks())
    lines = {case.command: case.results for case in cases if case.results}
    expected = {line: _expected(line, results, home, pool) for line, results in lines.items()}
    jobs = [attack_job(case, home, expected.get(case.command, "")) for case in cases]
    check(pool.run(jobs), book)


def _expected(line: Any, results: tuple[str, ...], home: Path, pool: Pool) -> str:
    with pool.place() as (server, folder):
        sound.copy(home, folder, ALL)
        ended = runner.run(server, [line], folder)
        assert ended.code == 0, ended.err
        return runner.digest(folder, results)


def attack_job(case: Attack, home: Path, expected: str) -> Job:
    """Run one attack and judge it."""

    def job(server: Server, folder: Path) -> Trial:
        sound.copy(home, folder, ALL)
        before = (folder / case.intact).read_bytes() if case.intact else b""
        _own(folder / case.intact, before)
        case.prepare(folder)
        ended = runner.run(server, [case.command], folder)
        found = expected if case.intact else runner.digest(folder, case.results)
        outcome, said = runner.judge(ended, found, expected, False)
        if outcome == "survived" and case.must_refuse:
            outcome, said = "another result", "accepted"
        if list(folder.rglob(EVIL)) or Path("/tmp", EVIL).exists():
            outcome, said = "another result", "the hostile file appeared"
        if case.intact and (folder / case.intact).read_bytes() != before:
            outcome, said = "another result", f"{case.intact} was written over; {said}"
        what = {"name": case.name, "command": [str(each) for each in case.command]}
        return Trial(case.row, FAULT, what, outcome, said)

    return job


def _own(path: Path, content: bytes) -> None:
    """Make a copy of what is a link to the sound file, lest that be destroyed."""
    if path.is_file():
        path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("name", COMMANDS)
def test_two_equal_runs_at_once(name: str, home: Path, pool: Pool, book: list[Trial]) -> None:
    line, results = COMMANDS[name]
    expected = _expected(line, results, home, pool)
    trials = []
    with pool.place() as (first, folder), runner.Server(runner.PRELOAD) as second:
        for _ in range(2):
            sound.copy(home, folder, ALL)
            with ThreadPoolExecutor(2) as threads:
                (folder / "log").mkdir()
                ends = list(
                    threads.map(
                        lambda s: runner.run(s, [line], folder, log=f"log/{id(s)}"), (first, second)
                    )
                )
            found = runner.digest(folder, results)
            judged = [runner.judge(ended, found, expected, False) for ended in ends]
            if {outcome for outcome, _ in judged} == {"refused"}:
                judged = [("another result", f"both refused: {said}") for _, said in judged]
            trials += [
                Trial("two equal runs at once", FAULT, {"name": name}, *each) for each in judged
            ]
            _empty(folder)
    check(trials, book)


def _empty(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("name", READERS)
def test_a_model_overwritten_in_place(name: str, home: Path, pool: Pool, book: list[Trial]) -> None:
    """The result is that of the one model or of the other, or there is none."""
    line, results = COMMANDS[name]
    expected = {_expected(line, results, home, pool), _of_other(line, results, home, pool)}
    faults: list[dict[str, Any]] = [{"write": n} for n in range(1, 6)]
    faults += [{"seconds": 0.05 * n} for n in range(1, 11)]
    jobs = [_overwritten(name, fault, home, expected) for fault in faults]
    check(pool.run(jobs), book)


def _of_other(line: Any, results: tuple[str, ...], home: Path, pool: Pool) -> str:
    with pool.place() as (server, folder):
        sound.copy(home, folder, ALL)
        (folder / "model.pth").unlink()
        (folder / "other.pth").rename(folder / "model.pth")
        runner.run(server, [line], folder)  # where other inputs do not fit, it is refused
        return runner.digest(folder, results)


def _overwritten(name: str, fault: dict[str, Any], home: Path, expected: set[str]) -> Job:
    line, results = COMMANDS[name]

    def job(server: Server, folder: Path) -> Trial:
        sound.copy(home, folder, ALL)
        _own(folder / "model.pth", (folder / "model.pth").read_bytes())
        act = ["overwrite", str(home / "other.pth"), str(folder / "model.pth")]
        ended = runner.run(server, [line], folder, **fault, act=act)
        found = runner.digest(folder, results)
        outcome, said = runner.judge(ended, str(found in expected), "True", False)
        return Trial(f"overwritten while read: {name}", FAULT, fault, outcome, said)

    return job
