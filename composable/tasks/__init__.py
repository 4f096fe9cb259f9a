"""The table of tasks."""

from typing import TYPE_CHECKING

from composable.errors import UserError

if TYPE_CHECKING:
    from composable.tasks.base import Task


def by_name(name: str) -> "Task":
    """Find a task, as a checkpoint's info names it.

    Raises:
        UserError: unknown; the message lists the known ones.
    """
    # here, not above: its modules import torch and are reached one by one from elsewhere too
    from composable.tasks.translation import TRANSLATION

    tasks: dict[str, Task] = {task.name: task for task in (TRANSLATION,)}
    if name not in tasks:
        raise UserError(f'unknown task "{name}"; known are {", ".join(tasks)}.')
    return tasks[name]
