"""Picture of a pipeline run: quality against cost."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from composable.reports.loss_plot import PALETTE

GREY = "#555555"
DODGE = 0.05  # of the width of an axis, at least, between configurations
BAND = "#ececec"
#: Marker, its size and whether it is filled, by stage. The later ones are smaller, so that equal
#: scores show as one in the other.
MARKERS = {
    "baseline": ("s", 9, False),
    "pruned": ("v", 8, False),
    "block": ("D", 9, False),
    "model": ("o", 6, True),
}
WIDEST_RATIO = 20.0  # of the scores of a linear axis; above it perplexities are drawn by logarithms


@dataclass(frozen=True)
class Point:
    """One configuration.

    Attributes:
        name: for the legend; what stands before its colon names the points, too.
        parameters: that are left and not zero, a fraction of the dense model's.
        macs: for each token, a fraction of the dense model's.
        scores: by stage.
    """

    name: str
    parameters: float
    macs: float
    scores: Mapping[str, float]


def quality_figure(
    score: str,
    dense: float,
    interval: float | None,
    stages: Mapping[str, str],
    points: Sequence[Point],
) -> Figure:
    """Draw scores over what is left of the parameters, and over what is left of the MACs.

    Args:
        score: what the vertical axis is called.
        dense: the dense model's score, a line.
        interval: half the width of a band around that line, None for no band.
        stages: keys of `MARKERS` and of `Point.scores` -> what the legend calls them.
        points: the configurations.
    """
    columns = 2 if all(len(point.name) < 60 for point in points) else 1
    handles = _legend(stages, points, interval is not None, columns)
    height = 4.3 + 0.21 * math.ceil(len(handles) / columns)
    figure = Figure(figsize=(8.4, height), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, "Parameters left, not zero", [p.parameters for p in points], points)
    _panel(right, "MACs per token", [p.macs for p in points], points)
    for axes in (left, right):
        axes.axhline(dense, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
        if interval:
            axes.axhspan(dense - interval, dense + interval, color=BAND, zorder=0)
    left.set_ylabel(score)
    scores = [dense, *(value for point in points for value in point.scores.values())]
    if min(scores) > 0 and max(scores) / min(scores) > WIDEST_RATIO:
        left.set_yscale("log")
    left.annotate(
        f"dense {dense:.2f}", (0, dense), (4, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", color=GREY, fontsize=9,
    )  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a PNG; the same figure gives the same bytes with the same matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def placed(costs: Sequence[float], width: float) -> list[float]:
    """Move configurations of (nearly) equal cost apart, side by side around their mean cost.

    Args:
        costs: one per configuration.
        width: of the axis; what is drawn is at least `DODGE` of it apart.

    Returns:
        Where to draw each.
    """
    step = DODGE * width
    groups: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        groups.append([i])
        while len(groups) > 1 and _start(groups[-1], costs, step) < (
            _start(groups[-2], costs, step) + step * len(groups[-2])
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = list(costs)
    for group in groups:
        for place, i in enumerate(group):
            found[i] = _start(group, costs, step) + step * place
    return found


def _start(group: list[int], costs: Sequence[float], step: float) -> float:
    """Where the first of a group is drawn."""
    return sum(costs[i] for i in group) / len(group) - step * (len(group) - 1) / 2


def _panel(axes: Axes, cost: str, costs: list[float], points: Sequence[Point]) -> None:
    margin = 0.1 * max(0.05, max(costs) - min(costs))
    low, high = min(costs) - 2 * margin, max(costs) + 2 * margin
    for index, (x, point) in enumerate(zip(placed(costs, high - low), points, strict=True)):
        color = PALETTE[index % len(PALETTE)]
        axes.annotate(
            point.name.partition(":")[0], (x, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", color=color, fontsize=9,
        )  # fmt: skip
        heights = [*point.scores.values()]
        axes.plot([x] * len(heights), heights, color=color, alpha=0.35, linewidth=1.5)
        for stage, height in point.scores.items():
            axes.plot(
                [x], [height], linestyle="", color=color, clip_on=False, **_marker(stage, color)
            )
    axes.set_xlim(low, high)
    axes.set_xlabel(f"{cost}, % of the dense model")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _marker(stage: str, color: str) -> dict[str, Any]:
    marker, size, is_filled = MARKERS[stage]
    face = color if is_filled else "white"
    return {"marker": marker, "markersize": size, "markeredgewidth": 1.6, "markerfacecolor": face}


def _legend(
    stages: Mapping[str, str], points: Sequence[Point], has_band: bool, columns: int
) -> list[Artist]:
    """Explain colours by configuration, and markers by stage and the band in a column of theirs."""
    named: list[Artist] = [
        Line2D([], [], color=PALETTE[i % len(PALETTE)], linewidth=4, label=point.name)
        for i, point in enumerate(points)
    ]
    marked: list[Artist] = [
        Line2D([], [], linestyle="", color=GREY, label=label, **_marker(stage, GREY))
        for stage, label in stages.items()
    ]
    if has_band:
        marked.append(Patch(color=BAND, label="dense model on 95 % of redrawn test sets"))
    missing = len(marked) - len(named) if columns == 2 else 0
    blank = [Line2D([], [], linestyle="", label=" ") for _ in range(abs(missing))]
    return [*named, *(blank if missing > 0 else []), *marked, *(blank if missing < 0 else [])]
