"""Results as notebooks show them: tables in HTML, and pictures."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from composable.formats.bundle import Bundle
from composable.formats.scores import Numbers, Scores

Row = Sequence[str]
DPI = 70  # of pictures


def as_html(head: Row, rows: Sequence[Row]) -> str:
    """Write a table whose first column is text and whose others are numbers, right-aligned."""
    lines = [_line("th", head), *(_line("td", row) for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _line(tag: str, cells: Row) -> str:
    sides = ("left", *["right"] * (len(cells) - 1))
    found = (
        f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
        for side, cell in zip(sides, cells, strict=True)
    )
    return f"<tr>{''.join(found)}</tr>"


def as_text(head: Row, rows: Sequence[Row]) -> str:
    """Write the same table as lines of text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (head, *rows)
    )


@dataclass(frozen=True, repr=False)
class ShownScores(Scores):
    """Scores that show themselves as a picture, and as a table where there are no pictures."""

    @classmethod
    def of(cls, scores: Scores) -> Self:
        """Make them of any scores."""
        return cls(**{field.name: getattr(scores, field.name) for field in fields(Scores)})

    def __repr__(self) -> str:
        method = self.origin.method if self.origin else "another program"
        shown = self._distances() if self.distances else self._units()
        return f"Scores of {method}\n{as_text(*shown)}"

    def _repr_png_(self) -> bytes | None:
        if not (self.units or self.distances):
            return None
        from composable.reports import importance_plot  # takes a second to import

        return importance_plot.png(self, dpi=DPI)

    def _distances(self) -> tuple[Row, list[Row]]:
        head = ("stack", "distance", "layers", "smallest of one layer", "largest")
        rows: list[Row] = []
        for one in self.distances:
            measured = one.values[0][~np.isnan(one.values[0])]
            rows.append((one.stack, one.distance, str(one.layers), *_bounds(measured)))
        return head, rows

    def _units(self) -> tuple[Row, list[Row]]:
        head = ("module", "units", "least important", "most important")
        rows: list[Row] = []
        for name, one in self.units.items():
            rows.append((name, str(len(one.importance)), *_bounds(one.importance)))
        return head, rows


def _bounds(values: Numbers) -> Row:
    return (f"{values.min():.4g}", f"{values.max():.4g}") if len(values) else ("", "")


@dataclass(repr=False)
class ShownBundle(Bundle):
    """A bundle that shows itself as a table of its variants."""

    def _repr_html_(self) -> str:
        head = ("module", "rate", "method", "kept", "error before", "error after")
        return as_html(head, [_of_variant(variant) for variant in self.variants])


def _of_variant(variant: Any) -> Row:
    """Say what a variant is; errors are in percent of the dense output's squares."""
    entry = variant.entry
    removals = entry.removals
    rates = " + ".join(f"{each.rate:g}" for each in removals.values())
    methods = " + ".join(each.method or "" for each in removals.values())
    kept = "" if variant.kept_units is None else f"{len(variant.kept_units)} units"
    errors = (variant.stats.get(key) for key in ("error_before", "error_after"))
    said = ("" if error is None else f"{100 * error:.3g} %" for error in errors)
    return (variant.module, rates, methods, kept, *said)
