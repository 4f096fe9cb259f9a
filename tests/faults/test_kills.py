"""Every command, killed at each write and at random times, stopped, out of disk; and run again."""

import signal
from pathlib import Path

import pytest

from tests.faults.kills import COMMANDS, Killing
from tests.faults.runner import Pool, Trial
from tests.faults.test_corruption import check

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_again_ends_as_an_undisturbed_run(
    name: str, home: Path, pool: Pool, book: list[Trial]
) -> None:
    command = Killing(name, home, pool)
    trials = [
        *command.at_every_write(),
        *command.at_every_write("full"),
        *command.at_random_times(20),
        *command.at_random_times(3, (signal.SIGTERM, signal.SIGHUP)),
    ]
    check(trials, book)
