"""Labelled texts and pairs of texts: which columns hold them, in GLUE's files and in others."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composable import files
from composable.errors import FormatError
from composable.tasks import splits
from composable.tasks.splits import Corpus, Source
from composable.tasks.tables import ENDINGS, read_table

log = logging.getLogger("composable")
#: Folders of a split that has a text a file, and the names of the classes.
REVIEWS = {"neg": "negative", "pos": "positive"}
NAMES = splits.NAMES | {"valid": (*splits.NAMES["valid"], "dev_matched", "validation_matched")}


@dataclass(frozen=True)
class Layout:
    """Columns of a table.

    Attributes:
        texts: column of the text, or of both texts.
        label: column of the label.
        classes: names of the classes in the order of their numbers; none: as the labels are.
        is_numbered: whether the labels are the numbers of `classes`, not their names.
        marks: columns by which the layout is known beside these.
    """

    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...] = ()
    is_numbered: bool = False
    marks: tuple[str, ...] = ()


ENTAILMENT = ("entailment", "not_entailment")
#: The first whose columns are all there counts.
CLASSES = (
    Layout(("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), True),  # MRPC
    Layout(("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"), True),  # QQP
    Layout(("question", "sentence"), "label", ENTAILMENT),  # QNLI
    Layout(("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction")),
    Layout(("sentence1", "sentence2"), "label", ENTAILMENT),  # RTE
    Layout(("sentence",), "label", ("unacceptable", "acceptable"), True, ("star",)),  # CoLA
    Layout(("sentence",), "label", ("negative", "positive"), True),  # SST-2
    Layout(("text1", "text2"), "label"),
    Layout(("premise", "hypothesis"), "label"),
    Layout(("question1", "question2"), "label"),
    Layout(("text",), "label"),
)
SCORES = (
    Layout(("sentence1", "sentence2"), "score"),  # STS-B
    Layout(("sentence1", "sentence2"), "label"),
    Layout(("text1", "text2"), "score"),
)
WANTED = (
    "a file (.tsv, .csv or .jsonl, also .gz) or a folder with such files named train, valid (val, "
    "dev, validation, dev_matched) and test, or with train/pos/*.txt and train/neg/*.txt, or one "
    "that the package datasets saved"
)


@dataclass(frozen=True)
class LabelledTexts(Corpus):
    """Texts, or pairs of texts, with their labels.

    Attributes:
        texts: the text, or the first of each pair.
        others: the second of each pair; None for single texts.
        labels: names of classes, or numbers, as text.
        classes: names of all classes in the order of their numbers; () where nobody says.
    """

    texts: list[str]
    others: list[str] | None
    labels: list[str]
    classes: tuple[str, ...]


def read(
    data: str | None, default: str | None, split: str, limit: int | None, layouts: Sequence[Layout]
) -> LabelledTexts:
    """Read a split, see `Task.read`; `layouts` are those that the task knows."""
    name, places = splits.locate(data, default, split, NAMES, _find, WANTED)
    for place in places:
        found = _rows(place, layouts, limit)
        if found is None:
            if place is not places[-1]:
                log.warning("%s: has no labels and is passed over.", place.path)
            continue
        rows, classes = found
        if not rows:
            raise FormatError(f"{place.path}: no samples for {split}; at least one was expected.")
        texts, *others, labels = ([*column] for column in zip(*rows, strict=True))
        digest, other = files.digest_of(rows), others[0] if others else None
        return LabelledTexts(name, split, place.label, digest, texts, other, labels, classes)
    raise FormatError(
        f"{places[-1].path}: no columns of labelled texts; expected "
        + ", or ".join(" ".join((*each.texts, each.label)) for each in layouts)
        + "."
    )


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    saved = (folder / name for name in names if (folder / name / "state.json").is_file())
    return (
        splits.first_of(folder, names, ENDINGS)
        or next(saved, None)
        or splits.folder_of(folder, names, [*REVIEWS])
    )


def _rows(
    place: Source, layouts: Sequence[Layout], limit: int | None
) -> tuple[list[tuple[str, ...]], tuple[str, ...]] | None:
    """Read texts and label of every sample, and the names of the classes; None: no labels."""
    if all((place.path / name).is_dir() for name in REVIEWS):
        return _reviews(place, limit), tuple(REVIEWS.values())
    table = read_table(place.path)
    known = {*table.columns}
    layout = next((it for it in layouts if {*it.texts, it.label, *it.marks} <= known), None)
    if layout is None:
        return None
    indices = [table.columns.index(column) for column in (*layout.texts, layout.label)]
    if all(row[indices[-1]] == "-1" for row in table.rows):
        return None
    rows = [tuple(row[index].strip() for index in indices) for row in table.rows]
    is_numbered = layout.is_numbered or bool(table.classes)
    rows, classes = _named(rows, table.classes or layout.classes, is_numbered)
    return splits.share_of(rows, place.share)[:limit], classes


def _named(
    rows: list[tuple[str, ...]], classes: tuple[str, ...], is_numbered: bool
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Turn the numbers of classes into names; where the labels are others, there are no classes."""
    labels = {row[-1] for row in rows}
    numbers = {str(number): name for number, name in enumerate(classes)}
    if is_numbered and labels <= numbers.keys():
        return [(*row[:-1], numbers[row[-1]]) for row in rows], classes
    return rows, classes if labels <= {*classes} else ()


def _reviews(place: Source, limit: int | None) -> list[tuple[str, ...]]:
    """Read the files of a split with a folder for each class, one of each class in turn."""
    paths = []
    for folder, label in REVIEWS.items():
        found = splits.share_of(sorted((place.path / folder).glob("*.txt")), place.share)
        paths.append([(path, label) for path in found])
    chosen = splits.interleave(paths, limit)
    return [(splits.read_text(path).strip(), label) for path, label in chosen]
