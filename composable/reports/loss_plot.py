"""Loss curves of fine-tuning runs in one picture."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from composable.formats.stats_file import Curve
from composable.reports import picture

# Okabe and Ito's palette, without yellow (too light on white): told apart by colour-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def loss_png(curves: Sequence[Curve]) -> bytes:
    """Draw validation (solid) and training losses (dashed) over epochs, one colour per curve.

    Returns:
        A PNG; the same curves give the same bytes with the same matplotlib.
    """
    with matplotlib.rc_context({"font.size": 10, "lines.markersize": 4, "path.simplify": False}):
        styles = [_style(index) for index in range(len(curves))]
        handles = _legend(curves, styles)
        columns = 2 if all(len(curve.label) < 40 for curve in curves) else 1
        rows = math.ceil(len(handles) / columns)
        figure = Figure(figsize=(8, 4.4 + 0.21 * rows), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for curve, style in zip(curves, styles, strict=True):
            axes.plot(curve.epochs, curve.validation, "-", linewidth=1.8, **style)
            axes.plot(curve.epochs, curve.training, "--", linewidth=1.2, alpha=0.8, **style)
        axes.set_xlabel("Epoch (0: before training)")
        axes.set_ylabel("Loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        # Outside the axes, so that it hides no curve however the curves run.
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
        return picture.png_of(figure)


def _legend(curves: Sequence[Curve], styles: Sequence[dict[str, Any]]) -> list[Line2D]:
    """Explain colours by file and line styles once for all."""
    both = zip(curves, styles, strict=True)
    return [
        *(Line2D([], [], markersize=5, label=picture.words(c.label), **style) for c, style in both),
        Line2D([], [], color="#555555", linestyle="-", label="validation"),
        Line2D([], [], color="#555555", linestyle="--", label="training"),
    ]


def _style(index: int) -> dict[str, Any]:
    """Markers repeat in another rhythm than colours, so that 49 files stay distinct."""
    marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
    return {"color": PALETTE[index % len(PALETTE)], "marker": marker}
