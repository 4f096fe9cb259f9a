"""Picture of the methods that choose units: scores after the refit, beside the dense model's."""

import io
from collections.abc import Sequence
from typing import Any

#: Okabe and Ito's palette, for the two rates
COLORS = ("#56B4E9", "#D55E00")
#: Perplexities at which a logarithmic axis may have a number.
TICKS = (30, 40, 50, 75, 100, 200, 500, 1000, 2000, 5000)


def draw(setups: Sequence[Any], tries: Sequence[dict[str, dict[str, Any]]]) -> bytes:
    """Draw a panel for every model and kind: methods downward, scores to the right.

    Args:
        setups: the models, see `unit_choice.Setup`.
        tries: of each, kind -> method -> what the probe printed.

    Returns:
        A PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(9, 2.6 * len(setups)), dpi=140, layout="constrained")
        grid = figure.subplots(len(setups), 2, squeeze=False)
        for setup, by_kind, row in zip(setups, tries, grid, strict=True):
            for axes, (kind, found) in zip(row, by_kind.items(), strict=True):
                _panel(axes, setup, kind, found)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, setup: Any, kind: str, found: dict[str, Any]) -> None:
    names = list(found)
    for place, color in enumerate(COLORS):
        values = [found[name]["rates"][place]["ls"]["score"] for name in names]
        label = f"{found[names[0]]['rates'][place]['rate']:.0%} gone, refitted"
        axes.plot(values, range(len(names)), "o", color=color, label=label)
    axes.axvline(setup.score, color="#009E73", linewidth=1, label="dense")
    name = setup.report[setup.report["main"]]["name"]
    if name == "perplexity":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        shown = [tick for tick in TICKS if low <= tick <= high]
        axes.set_xticks(shown, [f"{tick:,}" for tick in shown])
        axes.minorticks_off()
    what = setup.what.split(" (")[0].split(" on ")[0]
    axes.set_title(f"{what}: {'neurons' if kind == 'ffn' else 'heads'}")
    axes.set_xlabel(name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
