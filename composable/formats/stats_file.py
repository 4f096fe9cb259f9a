"""The stats CSV of fine-tuning runs: columns, write, read."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composable.errors import FormatError, shortened
from composable.files import read_bytes

MOST_EPOCHS, MOST_BYTES = 10_000, 1 << 24  # of one file
COLUMNS = (
    "epoch",
    "training_loss",
    "validation_loss",
    "training_seconds",
    "validation_seconds",
    "learning_rate",
)


@dataclass(frozen=True)
class Curve:
    """One stats CSV: the name in the legend, and columns; NaN where there is no training loss."""

    label: str
    epochs: tuple[float, ...]
    training: tuple[float, ...]
    validation: tuple[float, ...]


def read_stats(path: Path, label: str | None = None) -> Curve:
    """Read and fully check a stats CSV; without a label it has the file's name without suffix.

    Raises:
        FormatError: not text, another header, no rows, a cell that is missing or not a number.
        OSError: the file cannot be read.
    """
    rows = enumerate(_read_rows(path), start=2)
    cells = [_numbers(path, number, row) for number, row in rows if row]
    if not cells:
        raise FormatError(
            f"{path}: no epochs below the header; was the fine-tuning interrupted? Run it again."
        )
    epochs, training, validation = zip(*(row[:3] for row in cells), strict=True)
    return Curve(label or path.stem, epochs, training, validation)


def read_all(paths: Sequence[Path]) -> list[Curve]:
    """Read several stats CSVs; the labels are the shortest endings of their paths that differ."""
    return [read_stats(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_rows(path: Path) -> list[list[str]]:
    """Return the rows below the header, which is checked."""
    try:
        lines = read_bytes(path, MOST_BYTES).decode("utf-8-sig").splitlines()
        rows = list(csv.reader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        problem = f"not a CSV file in UTF-8 ({error}); give a stats CSV"
        raise FormatError(f"{path}: {problem}.") from error
    header = ",".join(COLUMNS)
    if not rows:
        raise FormatError(f"{path}: the file is empty; a stats CSV starts with {header}.")
    if tuple(rows[0]) != COLUMNS:
        met = shortened(",".join(rows[0]), 120)
        raise FormatError(
            f'{path}: the header is "{met}", expected "{header}"; give a CSV that a fine-tuning '
            "script wrote as its stats."
        )
    if len(rows) - 1 > MOST_EPOCHS:
        problem = f"has {len(rows) - 1} rows, at most {MOST_EPOCHS} were expected"
        raise FormatError(f"{path}: {problem}; give a stats CSV.")
    return rows[1:]


def _numbers(path: Path, line: int, row: list[str]) -> list[float]:
    """Check one row; an empty cell where there may be no value becomes NaN."""
    if len(row) != len(COLUMNS):
        raise FormatError(
            f"{path}: row {line} has {len(row)} cells, expected {len(COLUMNS)}; it is damaged."
        )
    is_start = _number(row[0]) == 0
    # training_loss: also where one of many variants diverged, which does not end the others
    may_be_empty = ("training_loss", *(("training_seconds", "learning_rate") if is_start else ()))
    numbers = []
    for column, text in zip(COLUMNS, row, strict=True):
        number = _number(text)
        if not math.isfinite(number) and not (column in may_be_empty and not text.strip()):
            raise FormatError(
                f'{path}: row {line}, {column} is "{text}", expected a finite number; the '
                "training diverged or the file is damaged."
            )
        numbers.append(number)
    return numbers


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names without suffix; with as many folders before them as it takes to differ."""
    whole = [path.absolute().with_suffix("").parts for path in paths]
    for depth in range(1, max(len(parts) for parts in whole) + 1):
        labels = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(labels)) == len(set(whole)):
            break
    return labels


def stats_csv(rows: list[dict[str, Any]]) -> str:
    """Render the stats; a value that does not exist (training loss of epoch 0) is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
