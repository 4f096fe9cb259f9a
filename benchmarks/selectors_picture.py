"""Picture of selectors: scores at every size, one colour for each corrector."""

import io
from collections.abc import Mapping
from typing import Any

#: Okabe and Ito's palette.
COLORS = {"none": "#999999", "tuned": "#56B4E9", "ls": "#D55E00"}
MARKS = {"none": "o", "tuned": "s", "ls": "D"}
LABELS = {"none": "as pruned", "tuned": "tuned masks", "ls": "refitted"}
#: A perplexity beyond so many times the dense one is drawn at the edge.
MOST = 20.0


def draw(found: Mapping[str, Any]) -> bytes:
    """Draw a row of panels for each model, one for each size: selectors downward.

    Args:
        found: name -> `selectors_page.Found`.

    Returns:
        A PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = max(len(each.sizes) for each in found.values())
    heights = [0.8 + 0.2 * len(each.pairs) for each in found.values()]
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(3.4 * columns, sum(heights)), dpi=140, layout="constrained")
        grid = figure.subplots(len(found), columns, squeeze=False, height_ratios=heights)
        for each, row in zip(found.values(), grid, strict=True):
            for axes in row[len(each.sizes) :]:
                axes.set_visible(False)
            for place, (size, axes) in enumerate(zip(each.sizes, row, strict=False)):
                _panel(axes, each, size, has_names=place == 0)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, found: Any, size: float, has_names: bool) -> None:
    dense = found.dense["value"]
    is_perplexity = found.dense["name"] == "perplexity"
    for corrector, color in COLORS.items():
        values = [found.score(pair, size, corrector) for pair in found.pairs]
        if is_perplexity:
            values = [None if v is None else min(v, MOST * dense) for v in values]
        points = [(value, place) for place, value in enumerate(values) if value is not None]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], MARKS[corrector], color=color,
            markersize=4.5, label=LABELS[corrector], clip_on=False,
        )  # fmt: skip
    axes.axvline(dense, color="#009E73", linewidth=1, label="dense")
    if is_perplexity:
        axes.set_xscale("log")
        shown = [x for x in (25, 50, 100, 200, 400) if dense * 0.9 <= x <= MOST * dense]
        axes.set_xticks(shown, [f"{x:,}" for x in shown])
        axes.minorticks_off()
    axes.set_title(f"{found.model.what.split(' (')[0]}" if has_names else "", loc="left")
    cut = f"\n(what is above {MOST * dense:,.0f} lies at the edge)" if is_perplexity else ""
    axes.set_xlabel(f"{found.dense['name']}, {size:.0%} of the {found.model.kept}{cut}")
    names = [f"{selector}, {allocation}" for selector, allocation in found.pairs]
    axes.set_yticks(range(len(names)), names if has_names else [""] * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
