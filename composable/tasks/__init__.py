"""The table of tasks."""

from typing import TYPE_CHECKING

from composable.errors import UserError

if TYPE_CHECKING:
    from composable.tasks.base import Task


def _all() -> tuple["Task", ...]:
    # here, not above: its modules import torch and are reached one by one from elsewhere too
    from composable.tasks.image_classification import IMAGE_CLASSIFICATION
    from composable.tasks.language_modeling import LANGUAGE_MODELING
    from composable.tasks.question_answering import QUESTION_ANSWERING
    from composable.tasks.text_classification import TEXT_CLASSIFICATION
    from composable.tasks.text_similarity import TEXT_SIMILARITY
    from composable.tasks.translation import TRANSLATION

    return (
        TRANSLATION,
        TEXT_CLASSIFICATION,
        TEXT_SIMILARITY,
        QUESTION_ANSWERING,
        LANGUAGE_MODELING,
        IMAGE_CLASSIFICATION,
    )


def names() -> list[str]:
    """Names of all tasks, as in a checkpoint's info."""
    return [task.name for task in _all()]


def by_name(name: str) -> "Task":
    """Find a task, as a checkpoint's info names it.

    Raises:
        UserError: unknown; the message lists the known ones.
    """
    for task in _all():
        if task.name == name:
            return task
    raise UserError(f'unknown task "{name}"; known are {", ".join(names())}.')


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
