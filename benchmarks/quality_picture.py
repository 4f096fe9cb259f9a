#!/usr/bin/env python3
"""Picture of the README: quality against cost on two models, out of the tables of docs/results.md.

python benchmarks/quality_picture.py     # docs/quality_light.png and docs/quality_dark.png
"""

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import page
from composable import files

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: Of each line percent of the dense model's cost that is left, and the score.
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Theme:
    """Colors for a page of one background: lines in Okabe and Ito's, lighter on dark."""

    background: str
    text: str
    grid: str
    best: str
    control: str
    worst: str


#: The backgrounds are those of GitHub's two modes.
THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#e3e6ea", "#0072B2", "#6e7781", "#D55E00"),
    "dark": Theme("#0d1117", "#e6edf3", "#262c36", "#56B4E9", "#9198a1", "#FF8A4C"),
}


def embeddings(results: str) -> dict[str, Points]:
    """Return MiniLM's lines: MACs that are left, cosine with the dense model's embeddings.

    Args:
        results: the text of docs/results.md.
    """
    table = page.split(results)["sizes_small"].split("sentence embeddings.**")[1].split("\n**")[0]
    lines: dict[str, Points] = {"uniform": [(100, 1.0)], "stat": [(100, 1.0)]}
    for allocation, macs, _, cosine in _rows(table):
        lines[allocation].append((_number(macs), _number(cosine)))
    return lines


def perplexities(results: str) -> dict[str, Points]:
    """Return SmolLM2's lines: neurons that are left, perplexity after the refit.

    Args:
        results: the text of docs/results.md.
    """
    table = page.split(results)["unit_choice"].split(": neurons.**")[1].split("\n**")[0]
    dense = _number(re.findall(r"dense ([\d,]+\.\d+)", table)[0])
    lines = {}
    for method, _, fifth, _, half, *_ in _rows(table):
        points = [(100, dense), (80, _number(fifth)), (50, _number(half))]
        lines[method.split("`")[1]] = points
    return lines


def _rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [line[1:-1].split("|") for line in lines[2:]]


def _number(text: str) -> float:
    return float(text.strip("%").replace(",", ""))


def draw(results: str, theme: Theme) -> bytes:
    """Draw both panels.

    Args:
        results: the text of docs/results.md.
        theme: the colors.

    Returns:
        A PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    colors = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text
    )
    backgrounds = dict.fromkeys(("axes.facecolor", "figure.facecolor"), theme.background)
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": theme.control, **colors,
                                **backgrounds}):  # fmt: skip
        figure = Figure(figsize=(9, 3.9), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.get_layout_engine().set(wspace=0.08)
        _draw_embeddings(left, embeddings(results), theme)
        _draw_perplexities(right, perplexities(results), theme)
        for axes in (left, right):
            axes.grid(True, axis="y", color=theme.grid, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0, pad=5)
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="png", pil_kwargs={"optimize": True}, metadata={"Software": None}
        )
    return buffer.getvalue()


def _draw_embeddings(axes: Any, lines: dict[str, Points], theme: Theme) -> None:
    _line(axes, lines["uniform"], theme.control, "{:.2f}", (-18, -13))
    _line(axes, lines["stat"], theme.best, "{:.2f}", (18, 5))
    _name(axes, lines["uniform"], theme.control, "{:.2f}\nall layers keep\nthe same share", "top")
    _name(axes, lines["stat"], theme.best, "each layer keeps\nits own share\n{:.2f}", "bottom")
    _dense(axes, (100, 1), "dense model", (0, 9), theme)
    axes.set_xlim(103, 8)
    axes.set_ylim(0.79, 1.02)
    axes.set_yticks([0.8, 0.85, 0.9, 0.95, 1])
    axes.set_xticks([100, 70, 50, 30], ["100 %", "70 %", "50 %", "30 %"])
    axes.set_title("MiniLM-L6: sentence embeddings", loc="left", weight="bold", fontsize=11)
    axes.set_xlabel("multiply-accumulates (MACs) left", loc="left")
    axes.set_ylabel("cosine with the dense model's")


def _draw_perplexities(axes: Any, lines: dict[str, Points], theme: Theme) -> None:
    styles = (
        ("neuron_l1", theme.worst, "{:,.0f}\nsmallest weights\nremoved", (-13, 4)),
        ("random", theme.control, "{:.0f}\nremoved\nat random", (-12, 5)),
        ("exchange", theme.best, "{:.0f}\ndefault choice", (6, -16)),
    )
    for method, color, name, shift in styles:
        _line(axes, lines[method], color, "{:.0f}", shift)
        _name(axes, lines[method], color, name, "top")
    dense = lines["exchange"][0]
    _dense(axes, dense, f"dense: {dense[1]:.0f}", (-4, -19), theme)
    axes.set_yscale("log")
    axes.set_xlim(102, 26)
    axes.set_ylim(14, 3500)
    ticks = (20, 50, 100, 200, 500, 1000, 2000)
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks([100, 80, 50], ["100 %", "80 %", "50 %"])
    axes.set_title("SmolLM2-135M: language modelling", loc="left", weight="bold", fontsize=11)
    axes.set_xlabel("feed-forward neurons left", loc="left")
    axes.set_ylabel("perplexity on WikiText-2 (log scale)")


def _line(axes: Any, points: Points, color: str, form: str, shift: tuple[float, float]) -> None:
    """Draw a line with its values beside the points between its ends."""
    axes.plot(*zip(*points, strict=True), "-o", color=color, linewidth=2, markersize=5)
    for place in points[1:-1]:
        _say(axes, form.format(place[1]), place, shift, color=color, ha="center")


def _name(axes: Any, points: Points, color: str, text: str, align: str) -> None:
    """Write a line's last value and its name at its end."""
    shift = (8, 6 if align == "top" else -4)
    name = text.format(points[-1][1])
    _say(axes, name, points[-1], shift, color=color, va=align, weight="bold")


def _dense(
    axes: Any, place: tuple[float, float], name: str, shift: tuple[float, float], theme: Theme
) -> None:
    axes.plot(*place, "o", color=theme.text, markersize=8, zorder=5)
    _say(axes, name, place, shift, weight="bold")


def _say(axes: Any, text: str, place: Any, shift: Any, **style: Any) -> None:
    axes.annotate(text, place, shift, textcoords="offset points", **style)


def main() -> None:
    """Write both pictures."""
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    for name, theme in THEMES.items():
        with files.atomic_write(DOCS / f"quality_{name}.png") as file:
            file.write(draw(results, theme))


if __name__ == "__main__":
    main()
