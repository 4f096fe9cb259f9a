"""Warm processes and sound files for all fault trials, and the page that they end in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import corruption, report, runner, sound
from tests.faults.runner import Pool, Trial


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
