"""Loss curves: reading the stats CSVs of the fine-tuning scripts, and drawing them."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composable.errors import FormatError
from composable.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "epoch",
    "training_loss",
    "validation_loss",
    "training_seconds",
    "validation_seconds",
    "learning_rate",
)
# Okabe and Ito's palette, without yellow (too light on white): told apart by colour-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Curve:
    """One stats CSV.

    Attributes:
        label: name in the legend.
        epochs: as in the file; 0 is the state before training.
        training: losses; NaN where there is none (epoch 0).
        validation: losses.
    """

    label: str
    epochs: tuple[float, ...]
    training: tuple[float, ...]
    validation: tuple[float, ...]


def read_stats(path: Path, label: str | None = None) -> Curve:
    """Read and fully check a stats CSV.

    Args:
        path: the file.
        label: name in the legend; the file's name without suffix if None.

    Raises:
        FormatError: not text, another header, no rows, a cell that is missing or not a number.
        OSError: the file cannot be read.
    """
    rows = _read_rows(path)
    cells = [_numbers(path, number, row) for number, row in enumerate(rows, start=2) if row]
    if not cells:
        raise FormatError(
            f"{path}: no epochs below the header; was the fine-tuning interrupted? Run it again."
        )
    epochs, training, validation = zip(*(row[:3] for row in cells), strict=True)
    return Curve(label or path.stem, epochs, training, validation)


def read_all(paths: Sequence[Path]) -> list[Curve]:
    """Read several stats CSVs; the labels are the shortest endings of their paths that differ."""
    return [read_stats(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def loss_png(curves: Sequence[Curve]) -> bytes:
    """Draw validation (solid) and training losses (dashed) over epochs, one colour per curve.

    Returns:
        A PNG; the same curves give the same bytes with the same matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"font.size": 10, "path.simplify": False}):
        handles = _legend(curves)
        columns = 2 if all(len(curve.label) < 40 for curve in curves) else 1
        rows = math.ceil(len(handles) / columns)
        figure = Figure(figsize=(8, 4.4 + 0.21 * rows), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            _draw(axes, curve, index)
        axes.set_xlabel("Epoch (0: before training)")
        axes.set_ylabel("Loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        # Outside the axes, so that it hides no curve however the curves run.
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_loss_plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw `curves` into a PNG file, whole or not at all."""
    picture = loss_png(curves)
    with atomic_write(path) as file:
        file.write(picture)


def _read_rows(path: Path) -> list[list[str]]:
    """Return the rows below the header, which is checked."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(
            f"{path}: not a CSV file in UTF-8 ({error}); give a stats CSV."
        ) from error
    if not rows:
        raise FormatError(
            f"{path}: the file is empty; a stats CSV starts with {','.join(COLUMNS)}."
        )
    if tuple(rows[0]) != COLUMNS:
        met = ",".join(rows[0])
        met = met if len(met) <= 120 else met[:117] + "..."
        raise FormatError(
            f'{path}: the header is "{met}", expected "{",".join(COLUMNS)}"; give a CSV that a '
            "fine-tuning script wrote with --stats."
        )
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


def _draw(axes: "Axes", curve: Curve, index: int) -> None:
    style: dict[str, Any] = {"color": _color(index), "marker": _marker(index), "markersize": 4}
    axes.plot(curve.epochs, curve.validation, linestyle="-", linewidth=1.8, **style)
    axes.plot(curve.epochs, curve.training, linestyle="--", linewidth=1.2, alpha=0.8, **style)


def _legend(curves: Sequence[Curve]) -> list[Any]:
    """Explain colours by file and line styles once for all."""
    from matplotlib.lines import Line2D

    files = [
        Line2D([], [], color=_color(i), marker=_marker(i), markersize=5, label=curve.label)
        for i, curve in enumerate(curves)
    ]
    return [
        *files,
        Line2D([], [], color="#555555", linestyle="-", label="validation"),
        Line2D([], [], color="#555555", linestyle="--", label="training"),
    ]


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _marker(index: int) -> str:
    """Markers repeat in another rhythm than colours, so that 49 files stay distinct."""
    return MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
