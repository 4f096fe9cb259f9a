"""What a task is: data, a loss and a metric; and Score, a number with its signature."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from composable.errors import UserError
from composable.tasks.labels import are_numbers, class_names
from composable.tasks.splits import short_name

log = logging.getLogger("composable")


@dataclass(frozen=True)
class Score:
    """A measured quality that never travels without the settings it was measured with.

    Attributes:
        name: the metric as its library calls it ("BLEU").
        value: the number, not rounded; in hundredths (BLEU, accuracy, F1, correlations: at most
            100), but for perplexity and bits per byte.
        signature: settings and version, enough to measure the same number again.
        counts: the counts the number was made from, where the library gives them.
        interval: half the width of the 95 % interval of the value over bootstrap samples of the
            test set, where it was measured.
    """

    name: str
    value: float
    signature: str
    counts: dict[str, Any] = field(default_factory=dict)
    interval: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the form that reports hold; counts and interval stay out when there are none.

        A UserError where the value is NaN or infinite.
        """
        value = round(_finite(self.name, self.value), 4)
        report = {"name": self.name, "value": value, "signature": self.signature}
        if self.interval is not None:
            report["interval_95"] = round(self.interval, 4)
        return report | ({"counts": self.counts} if self.counts else {})

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.2f} ({self.signature})"


class Task(ABC):
    """Data, a loss and a metric for one kind of model, a `models.checkpoint.Checkpoint`.

    Attributes:
        name: as in a checkpoint's info["task"] ("translation").
        auto_class: class of transformers that loads a pretrained folder.
        heads: how class names of its models end.
        main: key of the score that stands for all others in a table.
        options: those of evaluate.py that not every task has, and this one has.
        answer_tokens: of an answer at most, where the model writes one.
        batch_size: samples of a training step, if nothing else is said.
        has_length: whether a model file may say how many tokens a sample has at most.
        tokens: how many these are, if it does not.
        run: (model, batch, smoothing) -> tensors (batch, ...), of which the last are the losses of
            the samples, float32.
        stacks: of models that can do it, see `families.base.Family.stacks`.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    main: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    answer_tokens: ClassVar[int | None] = None
    batch_size: ClassVar[int] = 64
    has_length: ClassVar[bool] = True
    tokens: ClassVar[int]
    run: ClassVar[Callable[..., tuple[Any, ...]]]
    stacks: ClassVar[tuple[tuple[str, ...], ...]] = (("encoder",), ("decoder",))

    def fits(self, labels: int) -> bool:
        """Tell whether a model with so many outputs, and one of the `heads`, is of this task."""
        return True

    def outputs(self, labels: int | None) -> int | None:
        """Return how many outputs the head of a model gets; None: as many as it has.

        A UserError where the user asks for `labels`, and the task has no classes, or not so many.
        """
        if labels is not None:
            raise UserError(f"labels {labels}: {self.name} has no classes; leave it out.")
        return None

    def knows(self, config: Any) -> dict[str, Any]:
        """Return what a checkpoint's info says for this task, of a model with this config."""
        return {}

    def learned(self, checkpoint: Any, corpus: Any) -> dict[str, Any]:
        """Return what a checkpoint's info says beside after a training on this corpus."""
        return {}

    @abstractmethod
    def read(self, data: str | None, default: str | None, split: str, limit: int | None) -> Any:
        """Read one split.

        Args:
            data: a folder or file, or a name that the task knows; None takes the default.
            default: what the model file asks for.
            split: train, valid or test; see `splits.sources` for what is missing.
            limit: take the first so many samples only.

        Returns:
            A corpus; its attributes `name`, `split` and `sha256` say what was read.

        Raises:
            FormatError: it is not what it should be.
            UserError: there is no such data.
        """

    @abstractmethod
    def dataset(self, corpus: Any, checkpoint: Any, is_sorted: bool = False) -> Any:
        """Tokenise a corpus once, as the model wants it.

        Returns:
            A dataset of dicts, longest first where `is_sorted`, with attributes `lengths` (tokens
            of every sample) and `sizes` (tokens of its target and its source; both the same where
            there is one stack).

        Raises:
            UserError: the corpus does not fit the model.
        """

    @abstractmethod
    def collator(self, checkpoint: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return what pads samples to a batch with an attention mask; labels of padding: -100."""

    def label_texts(self, batch: Mapping[str, Any]) -> dict[str, Any] | None:
        """Add labels to a batch of plain texts, with an attention mask; None: they have none."""
        return None

    def functions(self, smoothing: float = 0.0) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return (step, measure).

        step: (model, batch) -> summed loss and the count it is summed over.
        measure: (model, batch) -> the same for every sample, without label smoothing.
        """
        from composable.tasks.losses import mean_functions

        return mean_functions(self.run, smoothing)

    def length(self, checkpoint: Any) -> int:
        """Return the most tokens that the model reads of a sample."""
        from composable.tasks.samples import most_tokens

        return most_tokens(checkpoint, self.tokens)

    @abstractmethod
    def evaluate(
        self, checkpoint: Any, corpus: Any, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Measure a model on a corpus.

        Args:
            checkpoint: dense or composed.
            corpus: from `read`.
            settings: device and dtype; batch_tokens, and the task's `options`.

        Returns:
            The model's answer to every sample, and the part of the report that is the task's:
            scores with their signatures, loss, speed, what the data was.
        """


class Classification(Task):
    """What tasks with classes have in common."""

    def fits(self, labels: int) -> bool:
        """Tell whether there is something to choose from; one output is a regression."""
        return labels > 1

    def outputs(self, labels: int | None) -> int | None:
        """Return how many classes a head gets."""
        return labels

    #: (corpus, checkpoint) -> class -> output of the model, and how they were brought together.
    outputs_of: ClassVar[Callable[..., tuple[dict[str, int], str]]]

    def knows(self, config: Any) -> dict[str, Any]:
        """Return the names of the classes; nothing where the config has but numbers for them."""
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        return {} if are_numbers(names) else {"labels": names}

    def learned(self, checkpoint: Any, corpus: Any) -> dict[str, Any]:
        """Return the names of the classes that the outputs stand for from now on."""
        names = class_names(checkpoint)
        if are_numbers(names):
            for label, number in self.outputs_of(corpus, checkpoint)[0].items():
                names[number] = label
        return {"labels": names}


def signature(corpus: Any, count: int, **settings: Any) -> str:
    """Say what a score was measured on, how and with what, in the form of sacreBLEU's signatures.

    `corpus` is a `splits.Corpus` of `count` samples; the number depends on the `settings`, too.
    """
    import torch
    import transformers

    import composable

    said = {
        "data": short_name(corpus.name),
        "file": corpus.file,
        "split": corpus.split,
        "count": count,
        "sha256": corpus.sha256[:12],
        **settings,
        **{it.__name__: it.__version__ for it in (composable, torch, transformers)},
    }
    return "|".join(f"{key}:{value}" for key, value in said.items())


def measured(scores: dict[str, Score], loss: float) -> dict[str, Any]:
    """Return scores, by their keys, and loss as reports hold them.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    said = {"loss": round(_finite("loss", loss), 6)}
    return {key: score.to_json() for key, score in scores.items()} | said


def warn_if_far_worse(info: Mapping[str, Any], loss: float, data: str) -> None:
    """Say so in one line where a composed model's loss is more than twice the dense model's.

    Args:
        info: of the composed model's file. It tells the loss of the dense model where that was
            trained here; nothing is measured for this.
        loss: of the composed model.
        data: what it was measured on, without its folder; on other data nothing is compared.
    """
    steps = [one for one in info.get("history", []) if isinstance(one, dict)]
    place = next((i for i, step in enumerate(steps) if "composed" in step), 0)
    facts = [one for step in steps[:place] for one in step.values() if isinstance(one, dict)]
    dense = facts[-1].get("validation_loss") if facts and facts[-1].get("data") == data else None
    if isinstance(dense, int | float) and loss > max(2 * dense, dense + 0.1):
        log.warning(
            "far worse than the dense model: its loss on %s was %.2f, this one's is %.2f; prune "
            "less, tune the variants by block_level_finetuning.py, or train longer.",
            *(data, dense, loss),
        )


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise UserError(
            f"the model's {name} is {value}, a finite number was expected; its weights give no "
            "usable outputs in this dtype."
        )
    return value


def report(
    corpus: Any, scores: dict[str, Score], loss: float, count: int, seconds: float, **more: Any
) -> dict[str, Any]:
    """Return a task's part of the report of an evaluation.

    Args:
        corpus: a `splits.Corpus`.
        scores: by their keys in the report.
        loss: mean over samples or tokens.
        count: samples.
        seconds: that the model ran.
        more: what else the task says.
    """
    return {
        **measured(scores, loss),
        "samples": count,
        **more,
        "samples_per_second": round(count / seconds, 2),
        "data": {
            "name": short_name(corpus.name),
            "split": corpus.split,
            "file": corpus.file,
            "count": count,
            "sha256": corpus.sha256,
        },
    }
