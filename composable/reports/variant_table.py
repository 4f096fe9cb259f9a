"""The table of fine-tuned variants: CSV, text for the terminal, heat map of the errors."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composable import files
from composable.reports import picture

if TYPE_CHECKING:
    from composable.formats.bundle import Variant


HEADER = (
    "module", "rate", "method", "o_rate", "o_method", "error_before", "error_after", "seconds",
    "kept", "largest_coefficient", "tokens_per_input",
)  # fmt: skip


def rows_of(
    variants: Sequence["Variant"], seconds: Sequence[float], kept: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Make one row per variant, in their order; None: a removed module has no such value.

    Args:
        variants: fine-tuned.
        seconds: spent on each.
        kept: whose weights each has: "pruned", "ls", "trained", or None.
    """
    rows = []
    for variant, spent, kind in zip(variants, seconds, kept, strict=True):
        entry, (before, after) = variant.entry, map(variant.stats.get, HEADER[5:7])
        part = next(iter(entry.parts.values()), None)  # what is pruned with the module
        together = (part.rate, part.method) if part else (None, None)
        cells = (variant.module, entry.rate, entry.method, *together, before, after)
        facts = map(variant.stats.get, HEADER[9:])
        rows.append(dict(zip(HEADER, (*cells, round(spent, 3), kind, *facts), strict=True)))
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def as_text(rows: list[dict[str, Any]]) -> str:
    """Lay the table out for a terminal."""
    head = ("module", "method", "rate", "error before", "after", "seconds", "kept", "|T|")
    lines = [head] + [
        (
            row["module"],
            "+".join(filter(None, (row["method"], row["o_method"]))),
            _rate_of(row),
            *("" if row[key] is None else f"{row[key]:.4f}" for key in HEADER[5:7]),
            f"{row['seconds']:.2f}",
            row["kept"] or "",
            "" if row["largest_coefficient"] is None else f"{row['largest_coefficient']:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in (3, 4, 5, 7) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _rate_of(row: dict[str, Any]) -> str:
    pair = "" if row["o_rate"] is None else f", o {row['o_rate']:g}"
    return f"{row['rate']:g}{pair}"


def errors_png(rows: list[dict[str, Any]]) -> bytes:
    """Draw the relative errors before and after, modules downward and rates to the right.

    Returns:
        A PNG. Colours are logarithmic; the number in a cell is the error in percent.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["error_after"] is not None]
    modules = list(dict.fromkeys(row["module"] for row in shown))
    rates = sorted({(row["o_rate"] or 0, row["rate"], _rate_of(row)) for row in shown})
    keys = ("error_before", "error_after")
    values = [max(row[key], 1e-6) for row in shown for key in keys] or [1.0]
    norm = LogNorm(min(values), max(max(values), 1.0001 * min(values)))
    size = 5.2 + 1.3 * max(1, len(rates)), 1.7 + 0.23 * max(1, len(modules))
    with matplotlib.rc_context({"font.size": 8}):
        dpi = picture.dots_per_inch(*size, usual=130)
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title in zip(panels, keys, ("as pruned", "fine-tuned"), strict=True):
            grid = [[math.nan] * max(1, len(rates)) for _ in modules] or [[math.nan]]
            for row in shown:
                column = [label for *_, label in rates].index(_rate_of(row))
                grid[modules.index(row["module"])][column] = row[key]
            image = axes.imshow(grid, norm=norm, cmap="viridis_r", aspect="auto")
            axes.set_facecolor("#eeeeee")
            _write_numbers(axes, grid, norm)
            axes.set_title(title)
            axes.set_xticks(range(len(rates)), [label for *_, label in rates], rotation=30)
            axes.set_yticks(range(len(modules)), [picture.words(name) for name in modules])
            axes.set_xlabel("rate removed")
        label = "relative squared error (numbers: %)"
        figure.colorbar(image, ax=panels, shrink=0.6, label=label)
        return picture.png_of(figure)


def _write_numbers(axes: Any, grid: list[list[float]], norm: Any) -> None:
    """Write each cell's percentage, light on dark and dark on light."""
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if math.isfinite(value):
                color = "white" if norm(max(value, norm.vmin)) > 0.55 else "black"
                text = f"{100 * value:.2g}" if value < 0.1 else f"{100 * value:.0f}"
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=7)
