"""Labelled texts and pairs of texts: tables (TSV, CSV, JSONL, `datasets`), GLUE's, folders."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composable import files
from composable.errors import FormatError, UserError
from composable.tasks import splits
from composable.tasks.splits import Corpus, Source, json_lines, read_text

log = logging.getLogger("composable")
ENDINGS = (".tsv", ".csv", ".jsonl")
#: Columns of a TSV file without a header whose second column is 0 or 1.
UNNAMED = ("source", "label", "star", "sentence")
#: Largest share of rows that may be broken.
BROKEN = 0.01
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
    return [(read_text(path).strip(), label) for path, label in chosen]


@dataclass(frozen=True)
class Table:
    """Rows with a cell for each column; `classes` are names of the labels 0, 1, ..., if known."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    classes: tuple[str, ...] = ()


def read_table(path: Path) -> Table:
    """Read a table; a row with too many or too few cells is left out with a warning.

    Args:
        path: .tsv (nothing is quoted), .csv (as spreadsheets write it) or .jsonl (an object a
            line), each also .gz; or a folder that `datasets` saved.

    Raises:
        FormatError: not such a file, or more than one in a hundred of its rows is broken.
        UserError: the package for it is missing.
    """
    if path.is_dir():
        return _read_saved(path)
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in _READERS:
        raise FormatError(f"{path}: unknown kind of table; expected {', '.join(ENDINGS)} (.gz).")
    columns, rows = _READERS[ending](path, read_text(path))
    whole = [tuple(row) for row in rows if len(row) == len(columns)]
    broken = len(rows) - len(whole)
    if broken > BROKEN * len(rows):
        raise FormatError(
            f"{path}: {broken} of {len(rows)} rows do not have the {len(columns)} cells that the "
            f"first line names ({', '.join(columns)}); correct them."
        )
    if broken:
        log.warning("%s: %d of %d rows are broken and left out.", path, broken, len(rows))
    if not whole:
        raise FormatError(f"{path}: no rows; a line for each sample was expected.")
    return Table(tuple(columns), whole)


def _read_tsv(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    full = [line.removesuffix("\r") for line in text.split("\n")]
    lines = [line.split("\t") for line in full if line] or [[]]
    if len(lines[0]) == len(UNNAMED) and lines[0][1] in ("0", "1"):
        return list(UNNAMED), lines
    return lines[0], lines[1:]


def _read_csv(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise FormatError(f"{path}: not a CSV file ({error}).") from error
    return (rows[0], rows[1:]) if rows else ([], [])


def _read_jsonl(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    columns: list[str] = []
    rows = []
    for number, line, record in json_lines(path, text):
        if not isinstance(record, dict):
            raise FormatError(f"{path}: line {number} is {line[:40]!r}; expected an object.")
        columns = columns or list(record)
        rows.append([str(record[column]) for column in columns if column in record])
    return columns, rows


_READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}


def _read_saved(path: Path) -> Table:
    """Read a split that `datasets` saved with save_to_disk."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: was saved by the package datasets, which is not installed; pip install "
            "datasets, or save the splits as CSV files (Dataset.to_csv)."
        ) from error
    saved = datasets.load_from_disk(str(path))
    columns = tuple(saved.column_names)
    cells = [[str(cell) for cell in saved[column]] for column in columns]
    classes = getattr(saved.features.get("label"), "names", None) or ()
    return Table(columns, list(zip(*cells, strict=True)), tuple(classes))
