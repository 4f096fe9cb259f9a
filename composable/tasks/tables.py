"""Tables of labelled texts: TSV, CSV, JSONL, folders of the `datasets` package."""

import csv
import io
import logging
from dataclasses import dataclass
from pathlib import Path

from composable.errors import FormatError, UserError
from composable.tasks.splits import json_lines, read_text

log = logging.getLogger("composable")
ENDINGS = (".tsv", ".csv", ".jsonl")
#: Columns of a TSV file without a header whose second column is 0 or 1.
UNNAMED = ("source", "label", "star", "sentence")
#: Largest share of rows that may be broken.
BROKEN = 0.01


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
