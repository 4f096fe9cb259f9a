"""Labelled texts and pairs of texts: tables (TSV, CSV, JSONL, `datasets`), GLUE's, folders."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from composable import files
from composable.errors import FormatError
from composable.tasks import splits, tables
from composable.tasks.labels import MISSING, ordered, same
from composable.tasks.splits import Corpus, Source
from composable.tasks.tables import Table
from composable.tasks.text_files import read_text

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
        no_label: what stands for no label in single rows, which are left out.
        is_score: whether the labels are no classes.
    """

    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...] = ()
    is_numbered: bool = False
    marks: tuple[str, ...] = ()
    no_label: str | None = None
    is_score: bool = False


ENTAILMENT = ("entailment", "not_entailment")
#: The first whose columns are all there counts.
CLASSES = (
    Layout(("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), True),  # MRPC
    Layout(("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"), True),  # QQP
    Layout(("question", "sentence"), "label", ENTAILMENT),  # QNLI
    Layout(
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        no_label="-",  # those who labelled it did not agree
    ),
    Layout(("sentence1", "sentence2"), "label", ENTAILMENT),  # RTE
    Layout(("sentence",), "label", ("unacceptable", "acceptable"), True, ("star",)),  # CoLA
    Layout(("sentence",), "label", ("negative", "positive"), True),  # SST-2
    Layout(("text1", "text2"), "label"),
    Layout(("premise", "hypothesis"), "label"),
    Layout(("question1", "question2"), "label"),
    Layout(("text",), "label"),
)
SCORES = (
    Layout(("sentence1", "sentence2"), "score", is_score=True),  # STS-B
    Layout(("sentence1", "sentence2"), "label", is_score=True),
    Layout(("text1", "text2"), "score", is_score=True),
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
        labels: names of classes, see `labels.same`; or numbers, as text.
        rows: number of each sample in its file.
        classes: names of all classes in the order of their numbers; () where nobody says.
        known: all classes of the data, of all its splits, in their order; () of scores.
        is_numbered: whether the file has the numbers of the `classes`.
    """

    texts: list[str]
    others: list[str] | None
    labels: list[str]
    rows: list[int]
    classes: tuple[str, ...]
    known: tuple[str, ...]
    is_numbered: bool = False

    def place(self, index: int) -> str:
        """Say for messages where a sample is."""
        path = self.name if Path(self.name).is_file() else f"{self.name}/{self.file}"
        return f"{path}: row {self.rows[index]}"


@dataclass(frozen=True)
class _Survey:
    """What a table has, of which no row is kept.

    Attributes:
        table: where it is.
        layout: the first that fits it, or None.
        labels: all that occur.
        total: number of rows, also of the broken.
        broken: of these.
    """

    table: Table
    layout: Layout | None
    labels: frozenset[str] = frozenset()
    total: int = 0
    broken: int = 0

    @property
    def has_samples(self) -> bool:
        """Whether there is a row that is not broken."""
        return self.total > self.broken


@dataclass(frozen=True)
class _Classes:
    """What the labels of a data set mean: see `LabelledTexts`; `names` of numbers, if they are."""

    names: Mapping[str, str]
    classes: tuple[str, ...]
    known: tuple[str, ...]


Rows = list[tuple[int, tuple[str, ...]]]


def read(
    data: str | None, default: str | None, split: str, limit: int | None, layouts: Sequence[Layout]
) -> LabelledTexts:
    """Read a split, see `Task.read`; `layouts` are those that the task knows.

    What a label means depends on the labels of all splits, whatever the limit is.
    """
    name, found = splits.files_of(data, default, NAMES, _find, WANTED)
    places = splits.places(name, split, found, WANTED)
    for place in places:
        if all((place.path / folder).is_dir() for folder in REVIEWS):
            classes = tuple(REVIEWS.values())
            rows, meaning = _reviews(place, limit), _Classes({}, classes, classes)
        else:
            survey = _survey(place.path, tuple(layouts))
            if survey.layout is None or (survey.has_samples and survey.labels <= {"-1"}):
                if place is not places[-1]:
                    log.warning("%s: has no labels and is passed over.", place.path)
                continue
            tables.check_rows(survey.table, survey.total, survey.broken)
            meaning = _meaning(survey, [path for path in found.values() if path], tuple(layouts))
            rows = _samples(survey.table, survey.layout, meaning, place.share, limit)
        if not rows:
            raise FormatError(f"{place.path}: no samples for {split}; at least one was expected.")
        numbers, contents = zip(*rows, strict=True)
        texts, *others, labels = ([*column] for column in zip(*contents, strict=True))
        other, known = others[0] if others else None, (meaning.classes, meaning.known)
        said = name, split, place.label, files.digest_of(contents)
        columns = texts, other, labels, [*numbers]
        return LabelledTexts(*said, *columns, *known, is_numbered=bool(meaning.names))
    raise FormatError(
        f"{places[-1].path}: no columns of labelled texts, or no labels in them; expected "
        + ", or ".join(dict.fromkeys(" ".join((*each.texts, each.label)) for each in layouts))
        + "."
    )


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    saved = (folder / name for name in names if (folder / name / "state.json").is_file())
    return (
        splits.first_of(folder, names, tables.ENDINGS)
        or next(saved, None)
        or splits.folder_of(folder, names, [*REVIEWS])
    )


def _reviews(place: Source, limit: int | None) -> Rows:
    """Read the files of a split with a folder for each class, one of each class in turn."""
    paths = []
    for folder, label in REVIEWS.items():
        found = splits.share_of(sorted((place.path / folder).glob("[!.]*.txt")), place.share)
        paths.append([(path, label) for path in found])
    rows: Rows = []
    for number, (path, label) in enumerate(splits.interleave(paths, limit), 1):
        text = read_text(path).strip()
        if not text:
            raise FormatError(f"{path}: the text is missing; fill it in, or remove the file.")
        rows.append((number, (text, label)))
    return rows


def _survey(path: Path, layouts: tuple[Layout, ...]) -> _Survey:
    status = path.stat()
    return _surveyed(path, layouts, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=8)
def _surveyed(path: Path, layouts: tuple[Layout, ...], _: tuple[int, ...]) -> _Survey:
    """Read all labels of a table; not again until the file is another one."""
    table = tables.open_table(path)
    columns = {*table.columns}
    layout = next((it for it in layouts if {*it.texts, it.label, *it.marks} <= columns), None)
    if layout is None:
        return _Survey(table, None)
    place, labels, total, broken = table.index(layout.label), set(), 0, 0
    for number, cells in table.all_rows():
        total += 1
        if len(cells) == len(table.columns):
            cell = cells[place]
            labels.add(cell if isinstance(cell, str) else table.text(number, layout.label, cell))
        else:
            broken += 1
    texts = {label.strip() for label in labels if label} - MISSING
    there = texts if layout.is_score else {same(label) for label in texts}
    return _Survey(table, layout, frozenset(there), total, broken)


def _meaning(survey: _Survey, every: Sequence[Path], layouts: tuple[Layout, ...]) -> _Classes:
    """Find out what the labels mean, by those of all files with the same columns."""
    table, layout = survey.table, survey.layout
    assert layout is not None
    if layout.is_score:
        return _Classes({}, (), ())
    others = [_survey(path, layouts) for path in every if tables.is_table(path)]
    labels = {label for other in others if other.layout == layout for label in other.labels}
    labels -= {layout.no_label}
    classes = table.classes or layout.classes
    if table.classes or layout.is_numbered:
        numbers = dict(enumerate(classes))
        used = labels - {"-1"}  # of which nobody knows the class
        names = {label: classes[number] for label in used if (number := _number(label)) in numbers}
        if names.keys() == used:
            return _Classes(names, classes, classes)
    if labels <= {*classes}:
        return _Classes({}, classes, classes)
    return _Classes({}, (), ordered(labels))


def _number(label: str) -> int | None:
    """Return the number of a class that a label names: pandas writes False and True for 0 and 1."""
    number = {"false": "0", "true": "1"}.get(label.lower(), label)
    return int(number) if number.isdecimal() and len(number) < 10 else None


def _samples(
    table: Table, layout: Layout, meaning: _Classes, share: str, limit: int | None
) -> Rows:
    """Read texts and label of the samples that are wanted, no more of them than the limit."""
    columns = (*layout.texts, layout.label)
    cells = [(column, table.index(column)) for column in columns]
    unlabelled = {layout.no_label, *(["-1"] if meaning.names else [])} - {None}

    @functools.cache
    def named(label: str | None) -> str | None:
        """Return the name of a label, which most rows have in common."""
        if label is None or label in MISSING:
            return None
        return label if layout.is_score else meaning.names.get(same(label), same(label))

    def rows() -> Iterator[tuple[int, tuple[str | None, ...]]]:
        for number, row in table.rows():
            *texts, label = [table.text(number, column, row[place]) for column, place in cells]
            name = named(label)
            if name not in unlabelled:
                yield number, (*texts, name)

    found = splits.share_of(rows(), share, limit)
    for number, sample in found:
        if None in sample:
            table.refuse(number, columns[sample.index(None)])
    return cast("Rows", found)
