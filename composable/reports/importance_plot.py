"""Picture of a file of scores: importances of heads and neurons, distances of blocks of layers."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from composable.errors import UserError, as_user_error
from composable.formats.scores import Scores
from composable.reports import picture
from composable.reports.block_plot import blocks_panel
from composable.reports.unit_plot import units_panels

TITLE = 0.4  # inches


def png(scores: Scores, distance: str | None = None, **how: Any) -> bytes:
    """Draw scores, see `draw`.

    Returns:
        A PNG; the same scores give the same bytes with the same matplotlib.
    """
    # numbers near the ends of what a double holds have no axis
    with matplotlib.rc_context({"font.size": 10}), as_user_error("the picture cannot be drawn"):
        return picture.png_of(draw(scores, distance, **how))


def draw(
    scores: Scores,
    distance: str | None = None,
    title: str | None = None,
    raw: bool = False,
    offset: bool = False,
    dpi: int = 150,
) -> Figure:
    """Draw all importances and, of every stack, one distance, one panel below the other.

    Args:
        scores: what was measured.
        distance: None takes the first.
        title: over the picture; None: the model and the ranker.
        raw: see `block_plot.blocks_panel`, as for offset.
        offset: of the marks.
        dpi: pixels of an inch; fewer where the picture would be too large.

    Raises:
        UserError: there is no such distance, or nothing to draw.
    """
    panels = units_panels(scores)
    if scores.distances or distance is not None:
        found = [scores.blocks(stack, distance) for stack in scores.stacks or [""]]
        panels += [blocks_panel(one, raw, offset) for one in found]
    if not panels:
        raise UserError(
            "the scores hold neither importances of units nor distances of layers, which are what "
            "is drawn; measure them with rank_importance.py."
        )
    title = _title(scores) if title is None else title
    width, heights = max(panel.width for panel in panels), [panel.height for panel in panels]
    size = width, sum(heights) + (TITLE if title else 0)
    figure = Figure(size, picture.dots_per_inch(*size, dpi), layout="constrained")
    rows = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, panel in zip(rows, panels, strict=True):
        panel.draw(row)
    if title:
        figure.suptitle(picture.words(title))
    return figure


def _title(scores: Scores) -> str:
    """Name the model, of a path its last part, and the ranker."""
    origin = scores.origin
    if origin is None:
        return ""
    model = Path(origin.model).name if Path(origin.model).is_absolute() else origin.model
    return ": ".join(filter(None, (model, origin.method)))
