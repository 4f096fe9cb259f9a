"""What a task is: data, a loss and a metric; and Score, a number with its signature."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composable.checkpoint import Checkpoint


@dataclass(frozen=True)
class Score:
    """A measured quality that never travels without the settings it was measured with.

    Attributes:
        name: the metric as its library calls it ("BLEU").
        value: the number, on the metric's usual scale (BLEU: 0 to 100), not rounded.
        signature: settings and version, enough to measure the same number again.
        counts: the counts the number was made from, where the library gives them.
    """

    name: str
    value: float
    signature: str
    counts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the form that reports hold; counts stay out when there are none."""
        report = {"name": self.name, "value": round(self.value, 4), "signature": self.signature}
        return report | ({"counts": self.counts} if self.counts else {})

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.2f} ({self.signature})"


class Task(ABC):
    """Data, a loss and a metric for one kind of model.

    Attributes:
        name: as in a checkpoint's info["task"] ("translation").
    """

    name: str

    @abstractmethod
    def read(self, data: str | None, default: str | None, split: str, limit: int | None) -> Any:
        """Read one split: train, valid or test.

        Args:
            data: the `--data` option; None takes the default.
            default: what the model file asks for.
            split: train, valid or test.
            limit: take the first so many samples only.

        Returns:
            A corpus; its attributes `name`, `split` and `sha256` say what was read.

        Raises:
            UserError: there is no such data, or it is not what it should be.
        """

    @abstractmethod
    def dataset(self, corpus: Any, checkpoint: "Checkpoint", is_sorted: bool = False) -> Any:
        """Tokenise a corpus once, as the model wants it.

        Returns:
            A dataset of dicts, longest first where `is_sorted`, with attributes `lengths` (tokens
            of every sample) and `sizes` (tokens of its target and its source).
        """

    @abstractmethod
    def collator(self, checkpoint: "Checkpoint") -> Callable[[list[Any]], dict[str, Any]]:
        """Return what pads a list of samples to a batch: an attention mask, and labels of -100."""

    @abstractmethod
    def functions(self, smoothing: float = 0.0) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return (step, measure).

        step: (model, batch) -> summed loss and the count it is summed over.
        measure: (model, batch) -> the same for every sample, without label smoothing.
        """

    @abstractmethod
    def evaluate(
        self, checkpoint: "Checkpoint", corpus: Any, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Measure a model on a corpus.

        Args:
            checkpoint: dense or composed.
            corpus: from `read`.
            settings: num_beams, batch_tokens, max_length, device, dtype.

        Returns:
            The model's answer to every sample, and the part of the report that is the task's:
            scores with their signatures, loss, speed, what the data was.
        """
