"""Tables of samples, row by row: TSV, CSV, JSON lines, folders that `datasets` saved."""

import csv
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from composable.errors import FormatError, UserError
from composable.files import MOST_BYTES
from composable.tasks.labels import MISSING
from composable.tasks.text_files import json_lines, lines

log = logging.getLogger("composable")
ENDINGS = (".tsv", ".csv", ".jsonl")
#: Columns of a TSV file without a header whose second column is 0 or 1.
UNNAMED = ("source", "label", "star", "sentence")
#: Largest share of rows that may be broken.
BROKEN = 0.01
Rows = Iterator[tuple[int, Sequence[Any]]]


@dataclass(frozen=True)
class Table:
    """A table, of which `rows` are read anew each time.

    Attributes:
        path: a file, or a folder that `datasets` saved.
        columns: in the order of the file.
        classes: names of the labels 0, 1, ..., if known.
        first: number of the first row that is a sample: 2 after a header.
        is_typed: whether the file tells texts from what is missing, as JSON does.
    """

    path: Path
    columns: tuple[str, ...]
    classes: tuple[str, ...] = ()
    first: int = 1
    is_typed: bool = False

    def all_rows(self) -> Rows:
        """Read number, from 1 and with the header, and cells of each row, also of broken ones."""
        if self.path.is_dir():
            saved = _saved(self.path)
            return enumerate(zip(*(saved[name] for name in self.columns), strict=True), 1)
        if self.is_typed:
            found = json_lines(self.path)
            return ((number, [*map(record.get, self.columns)]) for number, record in found)
        return ((number, cells) for number, cells in _cells(self.path) if number >= self.first)

    def rows(self) -> Rows:
        """Read those rows that have a cell for each column."""
        return (row for row in self.all_rows() if len(row[1]) == len(self.columns))

    def index(self, column: str) -> int:
        """Find a column; a FormatError where two have its name."""
        if self.columns.count(column) > 1:
            raise FormatError(f'{self.path}: two columns are called "{column}"; rename one.')
        return self.columns.index(column)

    def text(self, number: int, column: str, cell: Any) -> str | None:
        """Return a cell as text, without white space around it; None where it is missing.

        A FormatError, with the number of the row, where it is a list or an object.
        """
        if isinstance(cell, str):
            text = cell.strip()
            return None if not text or (text in MISSING and not self.is_typed) else text
        if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
            return None
        if not isinstance(cell, bool | int | float):
            raise FormatError(
                f"{self.path}: row {number}: the {column} is {str(cell)[:40]!r}; a text or a "
                "number was expected."
            )
        return str(cell)

    def refuse(self, number: int, column: str) -> NoReturn:
        """Raise a FormatError for a row in which a cell is missing."""
        raise FormatError(
            f"{self.path}: row {number}: the {column} is missing (empty, or a word such as nan "
            "that stands for it); fill it in, or take the row out."
        )


def open_table(path: Path) -> Table:
    """Find the columns of a table.

    Args:
        path: .tsv (nothing is quoted), .csv (as spreadsheets write it) or .jsonl (an object a
            line), each also .gz; or a folder that `datasets` saved.

    Raises:
        FormatError: not such a file.
        UserError: the package for it is missing.
    """
    if path.is_dir():
        saved = _saved(path)
        classes = getattr(saved.features.get("label"), "names", None) or ()
        return Table(path, tuple(saved.column_names), tuple(classes), is_typed=True)
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in ENDINGS:
        raise FormatError(f"{path}: unknown kind of table; expected {', '.join(ENDINGS)} (.gz).")
    if ending == ".jsonl":
        return Table(path, tuple(_keys(path)), is_typed=True)
    first, header = next(_cells(path), (1, []))
    if ending == ".tsv" and len(header) == len(UNNAMED) and header[1] in ("0", "1"):
        return Table(path, UNNAMED, first=first)
    return Table(path, tuple(header), first=first + 1)


def is_table(path: Path) -> bool:
    """Tell files, and folders that `datasets` saved, from folders of texts."""
    return path.is_file() or (path / "state.json").is_file()


def check_rows(table: Table, total: int, broken: int) -> None:
    """Warn of rows with more or fewer cells than there are columns, which are left out.

    A FormatError where these are more than `BROKEN` of all rows, or there are no others.
    """
    if broken > BROKEN * total:
        raise FormatError(
            f"{table.path}: {broken} of {total} rows do not have the {len(table.columns)} cells "
            f"that the first line names ({', '.join(table.columns)}); correct them."
        )
    if broken:
        log.warning("%s: %d of %d rows are broken and left out.", table.path, broken, total)
    if total == broken:
        raise FormatError(f"{table.path}: no rows; a line for each sample was expected.")


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a TSV or CSV file that are not empty, numbered from 1 with the empty."""
    if path.name.removesuffix(".gz").endswith(".tsv"):
        for number, line in enumerate(lines(path), 1):
            if stripped := line.rstrip("\r\n"):
                yield number, stripped.split("\t")
        return
    csv.field_size_limit(MOST_BYTES)  # the default refuses a cell of 131,073 characters
    # a cell in quotes may hold any line end
    pieces = (piece for line in lines(path) for piece in io.StringIO(line, newline=""))
    try:
        for number, row in enumerate(csv.reader(pieces, strict=True), 1):
            if row:
                yield number, row
    except csv.Error as error:
        raise FormatError(f"{path}: not a CSV file ({error}).") from error


def _keys(path: Path) -> dict[str, None]:
    """Read the keys of all objects of a file, in the order of their first appearance."""
    keys: dict[str, None] = {}
    for number, record in json_lines(path):
        if not isinstance(record, dict):
            raise FormatError(f"{path}: line {number} is {str(record)[:40]!r}; expected an object.")
        keys |= dict.fromkeys(record)
    return keys


def _saved(path: Path) -> Any:
    """Open a split that `datasets` saved with save_to_disk."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: was saved by the package datasets, which is not installed; pip install "
            "datasets, or save the splits as CSV files (Dataset.to_csv)."
        ) from error
    return datasets.load_from_disk(str(path))
