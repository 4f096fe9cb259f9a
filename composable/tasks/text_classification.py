"""Classes of texts and pairs of texts: GLUE, IMDb and other tables; accuracy, F1, Matthews."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from composable.tasks import labelled_texts, scores
from composable.tasks.base import Classification, Score, report, signature
from composable.tasks.labelled_texts import LabelledTexts
from composable.tasks.labels import class_ids, class_names
from composable.tasks.losses import output_of
from composable.tasks.samples import Samples, labelled_collator, labelled_samples, measure


def outputs_of(corpus: LabelledTexts, checkpoint: Any) -> tuple[dict[str, int], str]:
    """Return class -> output of a model, and how, see `labels.class_ids`."""
    numbers = {each: str(number) for number, each in enumerate(corpus.classes)}
    is_known = corpus.is_numbered and "labels" in checkpoint.info
    return class_ids(
        corpus.labels,
        corpus.known,
        class_names(checkpoint),
        corpus.classes,
        numbers=numbers if is_known else {},
        where=lambda label: corpus.place(corpus.labels.index(label)),
    )


def classify(model: Any, batch: dict[str, Tensor], smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a classifier's logits (batch, classes) and cross-entropies (batch,), float32."""
    logits = output_of(model, batch).logits.float()
    losses = cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smoothing)
    return logits, losses


class TextClassification(Classification):
    """One class for a text or a pair of texts."""

    name = "text_classification"
    auto_class = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    main = "accuracy"
    tokens = 128  # of a text, or of both together
    run = staticmethod(classify)
    collator = staticmethod(labelled_collator)
    outputs_of = staticmethod(outputs_of)

    def read(
        self, data: str | None, default: str | None, split: str, limit: int | None
    ) -> LabelledTexts:
        """Read a split, see `labelled_texts.read`."""
        return labelled_texts.read(data, default, split, limit, labelled_texts.CLASSES)

    def dataset(self, corpus: LabelledTexts, checkpoint: Any, is_sorted: bool = False) -> Samples:
        """Tokenise; labels are the numbers of the model's outputs."""
        ids, _ = outputs_of(corpus, checkpoint)
        labels = [ids[label] for label in corpus.labels]
        return labelled_samples(checkpoint, corpus, labels, self.length(checkpoint), is_sorted)

    def evaluate(
        self, checkpoint: Any, corpus: LabelledTexts, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Classify, and score by accuracy, F1 and Matthews correlation."""
        names = class_names(checkpoint)
        ids, how = outputs_of(corpus, checkpoint)
        data = self.dataset(corpus, checkpoint)
        found = measure(checkpoint, data, self.collator(checkpoint), classify, settings)
        predicted = torch.stack([row[0] for row in found.rows]).argmax(1)
        labels = torch.tensor([item["labels"] for item in data.items])
        positive = ids.get(corpus.classes[1], 1) if len(corpus.classes) == 2 else 1
        length, dtype = self.length(checkpoint), settings["dtype"]
        said = signature(corpus, len(data), max_length=length, classes_by=how, dtype=dtype)
        found_scores = _scores(predicted.numpy(), labels.numpy(), names, positive, said)
        return [names[i] for i in predicted.tolist()], report(
            corpus, found_scores, found.mean(1), len(data), found.seconds
        )


def _scores(
    predicted: Any, labels: Any, names: list[str], positive: int, said: str
) -> dict[str, Score]:
    """Score classes: F1 is that of the second of two classes, else the mean over all."""
    if len(names) == 2:
        f1 = scores.f1(predicted, labels, positive)
        how = f"average:binary|positive:{names[positive]}"
    else:
        f1, how = scores.macro_f1(predicted, labels), "average:macro"
    return {
        "accuracy": Score("accuracy", 100 * scores.accuracy(predicted, labels), said),
        "f1": Score("F1", 100 * f1, f"{said}|{how}"),
        "matthews": Score("Matthews", 100 * scores.matthews(predicted, labels), said),
    }


TEXT_CLASSIFICATION = TextClassification()
