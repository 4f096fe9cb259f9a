"""Picture of composability: validation loss and BLEU against the seconds spent."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.composability_runs import Family, Path, Point

#: Okabe and Ito's palette
ALONE, COMPOSED, SHARED = "#D55E00", "#0072B2", "#56B4E9"
#: for how many configurations the shared seconds are divided in one of the curves
MANY = 16


def draw(families: "list[Family]", clock: str) -> bytes:
    """Draw one row per set of configurations: loss on the left, BLEU on the right.

    Returns:
        A PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 3.4 * len(families) + 0.5), dpi=140, layout="constrained")
        grid = figure.subplots(len(families), 2, squeeze=False)
        for family, row in zip(families, grid, strict=True):
            for axes, key, name in zip(
                row, ("loss", "bleu"), ("validation loss", "BLEU"), strict=True
            ):
                _panel(axes, family, key)
                axes.set_title(f"rates {family.levels.title}")
                axes.set_xlabel(f"{clock} per configuration")
                axes.set_ylabel(name)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, family: "Family", key: str) -> None:
    """Thin lines for the configurations, a thick one for their median at each number of steps."""
    largest = max(family.shared)
    whole = family.shared[largest]
    many = min(MANY, largest)
    styles = (
        (_alone, 0.0, ALONE, "individual"),
        (_composed, whole, COMPOSED, "composed, one configuration bears all shared seconds"),
        (_composed, family.shared[many] / many, SHARED, f"composed, {many} configurations share"),
    )
    for points_of, start, color, label in styles:
        curves = [_curve(points_of(path), start, key) for path in family.paths]
        for x, y in curves:
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.45)
        axes.plot(*_median(curves), color=color, linewidth=2, marker="o", markersize=3, label=label)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _alone(path: "Path") -> "list[Point]":
    return list(path.alone.values())


def _composed(path: "Path") -> "list[Point]":
    return path.composed


def _curve(points: "list[Point]", start: float, key: str) -> tuple[list[float], list[float]]:
    known = [point for point in points if getattr(point, key) is not None]
    return [start + point.seconds for point in known], [getattr(point, key) for point in known]


def _median(curves: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """Median of the i-th points of all curves that have as many."""
    from statistics import median

    length = min(len(x) for x, _ in curves)
    return (
        [median(x[i] for x, _ in curves) for i in range(length)],
        [median(y[i] for _, y in curves) for i in range(length)],
    )
