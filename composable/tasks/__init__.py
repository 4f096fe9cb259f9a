"""Text, labels, loss, metric: one file a task, and the table of them."""

import pkgutil
from typing import TYPE_CHECKING

from composable.errors import find_named

if TYPE_CHECKING:
    from composable.tasks.base import Task


#: Where each task is. Named, not imported: their files load torch, which reading a data file or
#: a task's name must not.
TASKS = (
    "composable.tasks.translation:TRANSLATION",
    "composable.tasks.text_classification:TEXT_CLASSIFICATION",
    "composable.tasks.text_similarity:TEXT_SIMILARITY",
    "composable.tasks.question_answering:QUESTION_ANSWERING",
    "composable.tasks.language_modeling:LANGUAGE_MODELING",
    "composable.tasks.image_classification:IMAGE_CLASSIFICATION",
)


def _all() -> tuple["Task", ...]:
    return tuple(pkgutil.resolve_name(place) for place in TASKS)


def names() -> list[str]:
    """Names of all tasks, as in a checkpoint's info."""
    return [task.name for task in _all()]


def by_name(name: str) -> "Task":
    """Find a task, as a checkpoint's info names it; see `find_named`."""
    return find_named(_all(), name, "task")


def of_architecture(name: str, labels: int) -> "Task | None":
    """Find the task of a class of transformers.

    Args:
        name: of the class, as in a config's `architectures`.
        labels: the config's `num_labels`; a text classifier with one is a regression.

    Returns:
        None where there is no task for such a head.
    """
    for task in _all():
        if name.endswith(task.heads) and task.fits(labels):
            return task
    return None
