"""What a model is worth and costs: the report of an evaluation, which shows itself as a table."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from composable import tasks
from composable.errors import UserError
from composable.models import cost
from composable.models.checkpoint import Checkpoint
from composable.reports.notebook import Row, as_html, as_text
from composable.tasks.base import Score, Task

#: What of a report is shown beside its scores, and how.
SHOWN = {
    "loss": "{:.4f}",
    "sentences_per_second": "{:.1f}",
    "samples_per_second": "{:.1f}",
    "parameters": "{:,}",
    "sparsity": "{:.1%}",
    "nonzero_parameters": "{:,}",
    "macs_per_token": "{:,.0f}",
}
NAMES = {"sparsity": "parameters gone or 0", "macs_per_token": "MACs per token"}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a model scored on a split of its task's data, and what it costs.

    Attributes:
        report: as evaluate.py writes it (docs/formats.md).
        predictions: the model's answer to every sample, in the order of the data.
    """

    report: dict[str, Any]
    predictions: list[str]

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by their keys in the report; values are rounded to four decimals."""
        found = {key: value for key, value in self.report.items() if isinstance(value, dict)}
        return {key: _score(**value) for key, value in found.items() if "signature" in value}

    @property
    def score(self) -> Score:
        """The score that stands for all others."""
        return self.scores[self.report["main"]]

    def _rows(self) -> Iterator[Row]:
        for score in self.scores.values():
            interval = "" if score.interval is None else f" ± {score.interval:.2f}"
            yield score.name, f"{score.value:.2f}{interval}"
        for key, form in SHOWN.items():
            if self.report.get(key) is not None:
                yield NAMES.get(key, key.replace("_", " ")), form.format(self.report[key])

    def _head(self) -> Row:
        data = self.report["data"]
        return f"{data['name']}, {data['split']}, {data['count']} samples", ""

    def __repr__(self) -> str:
        return as_text(self._head(), list(self._rows()))

    def _repr_html_(self) -> str:
        return as_html(self._head(), list(self._rows()))


def _score(interval_95: float | None = None, **said: Any) -> Score:
    """Make a score of what a report says of it."""
    return Score(**said, interval=interval_95)


def evaluate(
    loaded: Checkpoint, corpus: Any, settings: dict[str, Any], length: int | None = None
) -> Evaluation:
    """Measure a model on a corpus of its task.

    Args:
        loaded: dense or composed; it is moved to the device, and to float32 where that is the
            dtype.
        corpus: of `Task.read`.
        settings: device, dtype, batch_tokens, limit, and the options of the task.
        length: tokens for the MACs, in translation of the source and of the target; None: 32 in
            translation, else the most that the model reads of a sample.
    """
    task = tasks.by_name(loaded.info["task"])
    if settings["dtype"] == "float32":
        loaded.model.float()  # weights in bfloat16 would be computed with as they are
    lines, quality = task.evaluate(loaded, corpus, settings)
    dense = loaded.info.get("dense_parameters")
    lengths = _lengths(task, loaded, length, settings.get("max_length"))
    return Evaluation(
        {
            "fingerprint": loaded.fingerprint,
            "task": task.name,
            "main": task.main,
            **quality,
            **cost.report(loaded.model, loaded.family, dense, *lengths),
            "settings": settings | {"prefix": loaded.info.get("prefix", "")},
            "versions": _versions(task),
        },
        lines,
    )


def settings_of(task: Task, **asked: int | None) -> dict[str, Any]:
    """Return the options of a task, those that are None by their defaults.

    Raises:
        UserError: the task does not have one that is given.
    """
    for name, value in asked.items():
        if value is not None and name not in task.options:
            raise UserError(f"{name} {value}: has no meaning for {task.name}; leave it out.")
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: expected a number from 1.")
    defaults = {"num_beams": 1, "max_length": task.answer_tokens}
    return {name: asked.get(name) or defaults.get(name) for name in task.options}


def _lengths(
    task: Task, loaded: Checkpoint, length: int | None, window: int | None
) -> tuple[int, int]:
    """Source and target tokens for the MACs; a model with one stack has one kind of tokens."""
    if len(loaded.family.stacks) == 2:
        return length or cost.SOURCE_LENGTH, length or cost.TARGET_LENGTH
    tokens = length or window or task.length(loaded)
    return (tokens, 0) if "encoder" in loaded.family.stacks else (0, tokens)


def _versions(task: Task) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("composable", "torch", "transformers", *(["sacrebleu"] if task.main == "bleu" else []))
    return {name: str(importlib.import_module(name).__version__) for name in names}
