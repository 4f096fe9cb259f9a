"""Every file that is read, damaged by chance and crafted: never a traceback or another result."""

from pathlib import Path

import pytest

from tests.faults.checkpoints import CHECKPOINTS, Left
from tests.faults.corruption import Corruption
from tests.faults.kinds import KINDS
from tests.faults.runner import Pool, Trial

pytestmark = pytest.mark.faults
COUNT = 250


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_harmless(
    name: str, home: Path, pool: Pool, book: list[Trial]
) -> None:
    kind = Corruption(KINDS[name], home, pool)
    check([*kind.kept(), *kind.random(COUNT), *kind.crafted(COUNT)], book)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, place: Path, home: Path, pool: Pool, book: list[Trial]
) -> None:
    """The command goes on from what is sound, or begins anew: its result is always the same."""
    left = Left(name, home, pool, place)
    check([*left.kept(), *left.random(COUNT), *left.crafted(COUNT)], book)


def check(trials: list[Trial], book: list[Trial]) -> None:
    """Note trials, and fail with those that ended badly, one of each way."""
    book += trials
    bad = {(t.outcome, t.said, t.case.get("name")): t for t in trials if t.is_bad}
    count = sum(trial.is_bad for trial in trials)
    lines = [f"{t.outcome}: {t.said:.300} {t.case!s:.300}" for t in list(bad.values())[:20]]
    assert not bad, f"{count} of {len(trials)} ended badly, such as\n" + "\n".join(lines)
