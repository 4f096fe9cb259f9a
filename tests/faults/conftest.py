"""Warm processes and sound files for all fault trials, and the page that they end in.

Trials that ended well are kept in out/faults, so that an interrupted run goes on; they count for
the code that they were made with.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import corruption, report, runner, sound
from tests.faults.runner import Pool, Trial
from tests.paths import ROOT

KEPT = ROOT / "out" / "faults"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on one disk, so that files can be linked."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def pool(place: Path) -> Iterator[Pool]:
    (place / "cases").mkdir()
    with runner.pool(place / "cases") as made:
        yield made


@pytest.fixture(scope="session")
def home(place: Path, pool: Pool) -> Iterator[Path]:
    """Sound files, which nobody may change."""
    folder = place / "sound"
    folder.mkdir()
    with pool.place() as (server, _):
        sound.make(server, folder)
    before = _state(folder)
    yield folder
    assert _state(folder) == before


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


@pytest.fixture(scope="session")
def book() -> Iterator[list[Trial]]:
    """All trials of this run; they become docs/reliability.md where none is missing."""
    trials: list[Trial] = []
    yield trials
    if corruption.keeps():
        corruption.keep([trial for trial in trials if trial.is_bad])
    report.write(trials)


@pytest.fixture(scope="session")
def code() -> str:
    """Hash of the code that the trials are of."""
    total = hashlib.sha256()
    for folder in ("composable", "tests/faults"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


@pytest.fixture(autouse=True)
def _goes_on(request: pytest.FixtureRequest, code: str) -> Iterator[None]:
    """Take the trials of a test from a run that was interrupted, or keep them for the next."""
    if "book" not in request.fixturenames:
        yield
        return
    book: list[Trial] = request.getfixturevalue("book")
    path = KEPT / f"{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("code") == code:
        book += [Trial(**each) for each in found["trials"]]
        pytest.skip("ended well before, with the same code")
    before = len(book)
    yield
    trials = book[before:]
    if trials and not any(trial.is_bad for trial in trials):
        KEPT.mkdir(parents=True, exist_ok=True)
        kept = {"code": code, "trials": [dataclasses.asdict(trial) for trial in trials]}
        path.write_text(json.dumps(kept))
