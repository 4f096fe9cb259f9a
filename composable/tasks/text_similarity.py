"""How alike two texts are, as a number (STS-B): Spearman and Pearson correlation."""

import math
from typing import Any

import torch
from torch import Tensor

from composable.errors import FormatError, MismatchError, UserError
from composable.tasks import labelled_texts, scores
from composable.tasks.base import Score, Task, report, signature
from composable.tasks.labelled_texts import LabelledTexts
from composable.tasks.losses import output_of
from composable.tasks.samples import Samples, labelled_collator, labelled_samples, measure


def regress(model: Any, batch: dict[str, Tensor], smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a model's one output and its squared error, each (batch,), float32."""
    outputs = output_of(model, batch).logits[:, 0].float()
    return outputs, (outputs - batch["labels"]).square()


class TextSimilarity(Task):
    """A number for a pair of texts."""

    name = "text_similarity"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    main = "spearman"
    tokens = 128  # of both texts together
    run = staticmethod(regress)
    collator = staticmethod(labelled_collator)

    def fits(self, labels: int) -> bool:
        """Tell regressions from classifiers."""
        return labels == 1

    def outputs(self, labels: int | None) -> int | None:
        """Return the one output a head gets."""
        if labels not in (None, 1):
            raise UserError(f"labels {labels}: {self.name} has one output; leave it out.")
        return 1

    def read(
        self, data: str | None, default: str | None, split: str, limit: int | None
    ) -> LabelledTexts:
        """Read a split, see `labelled_texts.read`; every label must be a number."""
        corpus = labelled_texts.read(data, default, split, limit, labelled_texts.SCORES)
        for index, label in enumerate(corpus.labels):
            if not _is_number(label):
                raise FormatError(
                    f"{corpus.place(index)}: the score is {label!r}; a finite number was expected."
                )
        return corpus

    def dataset(self, corpus: LabelledTexts, checkpoint: Any, is_sorted: bool = False) -> Samples:
        """Tokenise; labels are the scores."""
        outputs = checkpoint.model.config.num_labels
        if outputs != 1:
            raise MismatchError(
                f"the model has {outputs} outputs; for a similarity a model with one was expected."
            )
        labels = [float(label) for label in corpus.labels]
        return labelled_samples(checkpoint, corpus, labels, self.length(checkpoint), is_sorted)

    def evaluate(
        self, checkpoint: Any, corpus: LabelledTexts, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Predict, and score by Spearman and Pearson correlation."""
        data = self.dataset(corpus, checkpoint)
        found = measure(checkpoint, data, self.collator(checkpoint), regress, settings)
        outputs = torch.stack([row[0] for row in found.rows]).double().numpy()
        wanted = [item["labels"] for item in data.items]
        length, dtype = self.length(checkpoint), settings["dtype"]
        said = signature(corpus, len(data), max_length=length, dtype=dtype)
        found_scores = {
            "spearman": Score("Spearman", 100 * scores.spearman(outputs, wanted), said),
            "pearson": Score("Pearson", 100 * scores.pearson(outputs, wanted), said),
        }
        return [f"{output:.4f}" for output in outputs], report(
            corpus, found_scores, found.mean(1), len(data), found.seconds
        )


def _is_number(text: str) -> bool:
    try:
        # float knows the digits of all scripts, and 1_000
        return text.isascii() and "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False


TEXT_SIMILARITY = TextSimilarity()
