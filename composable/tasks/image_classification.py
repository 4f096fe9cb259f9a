"""Classes of images: folders with a folder for each class, or .npz; top-1 and top-5 accuracy."""

from collections.abc import Sequence
from typing import Any

import torch

from composable import files
from composable.errors import MismatchError
from composable.tasks import images, scores
from composable.tasks.base import Classification, Score, report, signature
from composable.tasks.images import Images, Pixels, Preparation
from composable.tasks.labels import are_numbers, class_ids, class_names
from composable.tasks.samples import measure
from composable.tasks.text_classification import classify


def outputs_of(corpus: Images, checkpoint: Any) -> tuple[dict[str, int], str]:
    """Return class -> output of a model, and how: by "name", "order" or "number" (`class_ids`)."""
    names = class_names(checkpoint)
    if corpus.classes:
        one = {corpus.classes[n]: it for n, it in zip(corpus.labels, corpus.pictures, strict=True)}
        # folders by number or code, in their order, are what image models are trained on
        is_trusted = are_numbers(names) or (_are_codes(corpus.classes) and not _are_codes(names))
        trusts: Any = {"trusts_order": is_trusted}
        return class_ids(one, corpus.classes, names, where=lambda it: str(one[it]), **trusts)
    least, most = min(corpus.labels), max(corpus.labels)
    if least < 0 or most >= len(names):
        raise MismatchError(
            f"{corpus.name}: labels from {least} to {most}, the model has {len(names)} classes; "
            f"numbers from 0 to {len(names) - 1} were expected."
        )
    return {str(number): number for number in range(len(names))}, "number"


def _are_codes(names: Sequence[str]) -> bool:
    """Tell whether names have a digit each: n01440764, 17."""
    return all(any(map(str.isdigit, name)) for name in names)


class ImageClassification(Classification):
    """One class for an image."""

    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    heads = ("ForImageClassification", "ForImageClassificationWithTeacher")
    main = "top1"
    has_length = False
    read = staticmethod(images.read)
    run = staticmethod(classify)
    collator = staticmethod(lambda checkpoint: images.stack)
    outputs_of = staticmethod(outputs_of)

    def dataset(self, corpus: Images, checkpoint: Any, is_sorted: bool = False) -> Pixels:
        """Prepare the images as the model file says; all are of one length."""
        ids, _ = outputs_of(corpus, checkpoint)
        classes = corpus.classes
        labels = [ids[classes[label] if classes else str(label)] for label in corpus.labels]
        return Pixels(corpus, labels, Preparation.of(checkpoint), self.length(checkpoint))

    def length(self, checkpoint: Any) -> int:
        """Return the tokens of an image."""
        tokens = checkpoint.family.image_tokens
        if tokens is None:
            raise MismatchError(
                f"a model of the family {checkpoint.family.name} reads no images; a model for "
                "images was expected."
            )
        return int(tokens(checkpoint.model.config))

    def evaluate(
        self, checkpoint: Any, corpus: Images, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Classify, and score by the share of images whose class is the likeliest, or among 5."""
        names = class_names(checkpoint)
        data = self.dataset(corpus, checkpoint)
        found = measure(checkpoint, data, self.collator(checkpoint), classify, settings)
        logits = torch.stack([row[0] for row in found.rows])
        prepared_by = data.preparation.settings
        said = signature(
            corpus,
            len(data),
            size="x".join(map(str, data.preparation.size)),
            image_processor=prepared_by["image_processor_type"],
            image_settings=files.digest_of(prepared_by)[:12],
            classes_by=outputs_of(corpus, checkpoint)[1],
            dtype=settings["dtype"],
        )
        found_scores = {f"top{k}": _score(logits, data.labels, k, said) for k in (1, 5)}
        return [names[i] for i in logits.argmax(1).tolist()], report(
            corpus, found_scores, found.mean(1), len(data), found.seconds
        )


def _score(logits: torch.Tensor, labels: list[int], k: int, said: str) -> Score:
    """Score by the k likeliest classes, or by all where there are fewer."""
    counted = min(k, logits.shape[1])
    value = 100 * scores.top_k(logits.numpy(), labels, counted)
    return Score(f"top-{counted}", value, f"{said}|k:{counted} of {logits.shape[1]}")


IMAGE_CLASSIFICATION = ImageClassification()
