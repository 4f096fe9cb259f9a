"""Classes of texts and pairs of texts: GLUE, IMDb and other tables; accuracy, F1, Matthews."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from composable.errors import MismatchError
from composable.tasks import labelled_texts, scores
from composable.tasks.base import Classification, Score, report, signature
from composable.tasks.labelled_texts import LabelledTexts
from composable.tasks.losses import output_of
from composable.tasks.samples import Samples, labelled_collator, labelled_samples, measure


def class_names(checkpoint: Any) -> list[str]:
    """Names of a classifier's outputs; where the model file has none, their numbers."""
    count = checkpoint.model.config.num_labels
    return [str(name) for name in checkpoint.info.get("labels") or range(count)]


def class_ids(
    labels: list[str], classes: tuple[str, ...], names: list[str], trusts_order: bool = False
) -> tuple[dict[str, int], str]:
    """Find the output of a model for every label.

    Args:
        labels: of the samples.
        classes: all labels in the order of their numbers; () where nobody says.
        names: of the model's outputs.
        trusts_order: `classes` are in the model's order, whatever names it has for them.

    Returns:
        Label -> number of the output, and how they were brought together: by name (whatever the
        case), where the model has all of these names; by number, where the labels are numbers and
        nobody says more; by order, where the model has but numbers for names, and as many; and by
        the order of the alphabet, if nobody says another.

    Raises:
        MismatchError: none of these is possible.
    """
    known = list(classes) or sorted(set(labels))
    lowered = [name.lower() for name in names]
    if all(each.lower() in lowered for each in known):
        return {each: lowered.index(each.lower()) for each in known}, "name"
    if not classes and all(each.isdecimal() and int(each) < len(names) for each in known):
        return {each: int(each) for each in known}, "number"
    are_numbers = all(name.removeprefix("LABEL_").isdecimal() for name in names)
    if len(known) == len(names) and (trusts_order or are_numbers):
        order = "order" if classes else "alphabet"
        return {each: number for number, each in enumerate(known)}, order
    raise MismatchError(
        f"the data has the classes {', '.join(known[:10])}, the model {', '.join(names[:10])} "
        f"({len(names)}); the same names, or as many without names, were expected."
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

    def read(
        self, data: str | None, default: str | None, split: str, limit: int | None
    ) -> LabelledTexts:
        """Read a split, see `labelled_texts.read`."""
        return labelled_texts.read(data, default, split, limit, labelled_texts.CLASSES)

    def dataset(self, corpus: LabelledTexts, checkpoint: Any, is_sorted: bool = False) -> Samples:
        """Tokenise; labels are the numbers of the model's outputs."""
        ids, _ = class_ids(corpus.labels, corpus.classes, class_names(checkpoint))
        labels = [ids[label] for label in corpus.labels]
        return labelled_samples(checkpoint, corpus, labels, self.length(checkpoint), is_sorted)

    def evaluate(
        self, checkpoint: Any, corpus: LabelledTexts, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Classify, and score by accuracy, F1 and Matthews correlation."""
        names = class_names(checkpoint)
        ids, how = class_ids(corpus.labels, corpus.classes, names)
        data = self.dataset(corpus, checkpoint)
        found = measure(checkpoint, data, self.collator(checkpoint), classify, settings)
        predicted = torch.stack([row[0] for row in found.rows]).argmax(1)
        labels = torch.tensor([item["labels"] for item in data.items])
        positive = ids[corpus.classes[1]] if len(corpus.classes) == 2 else 1
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
