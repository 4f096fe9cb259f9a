"""What a task is: data and a metric; and Score, a number with its signature."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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
    """Data and a metric for one kind of model.

    Attributes:
        name: as in a checkpoint's info["task"] ("translation").
    """

    name: str

    @abstractmethod
    def batches(self, split: str, tokenizer: Any) -> Iterable[dict[str, "Tensor"]]:
        """Yield one pass over a split ("train", "valid", "test") as tokenised, padded batches.

        Every batch holds an attention mask, and labels that are -100 where there is padding.
        """

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, "Tensor"]) -> "Tensor":
        """Return the scalar training loss of one batch: the mean over its unpadded labels."""

    @abstractmethod
    def evaluate(self, model: Any) -> Score:
        """Measure the model on the test split."""
