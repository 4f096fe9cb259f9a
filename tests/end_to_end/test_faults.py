"""A sample of `make faults`, in this process: some files of a chain, damaged and crafted."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Workshop, call
from tests.end_to_end.forked import Ended
from tests.faults.corruption import Corruption
from tests.faults.kinds import KINDS
from tests.faults.runner import Job, Trial

#: Kinds whose commands take a few hundredths of a second.
NAMES = ("composed model.pth", "conf.json", "stats CSV")


class Here:
    """Stands for a pool of processes: one job after the other in this one, without limits."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0

    def run_all(
        self, scripts: Sequence[Sequence[Any]], cwd: Path, limits: Mapping[str, int]
    ) -> Ended:
        ended = Ended(0, "", "")
        for name, *args in scripts:
            if ended.code == 0:
                ended = call(name, *args, cwd=cwd)
        return ended

    @contextmanager
    def place(self) -> Iterator[tuple["Here", Path]]:
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        yield self, folder

    def run(self, jobs: Sequence[Job]) -> list[Trial]:
        trials = []
        for job in jobs:
            with self.place() as (server, folder):
                trials.append(job(server, folder))  # type: ignore[arg-type]
        return trials


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_or_harmless(
    name: str, workshop: Workshop, tmp_path: Path
) -> None:
    kind = KINDS[name]
    if name == "stats CSV":
        kind = dataclasses.replace(
            kind, files=("stats_block.csv",), needs=("stats_block.csv",),
            commands=(("plot_loss.py", "stats_block.csv", "-o", "made.png"),),
        )  # fmt: skip
    case = Corruption(kind, workshop.folder, Here(tmp_path))  # type: ignore[arg-type]
    trials = [*case.random(9), *case.crafted(6)]
    assert len(trials) == 15
    assert {trial.outcome for trial in trials} & {"refused"}
    assert [trial for trial in trials if trial.is_bad] == []
