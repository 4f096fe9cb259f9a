"""Pictures of distances: a heat map of all blocks of layers, a strip of the single ones."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from composable.formats.scores import BlockDistances
from composable.ranking.layer_choice import best_block
from composable.reports import picture
from composable.reports.picture import Panel

#: Small distances are light.
_STYLE: dict[str, Any] = {
    "origin": "lower", "cmap": "viridis_r", "aspect": "auto", "interpolation": "none",
}  # fmt: skip
MARK = "#D55E00"


def blocks_panel(one: BlockDistances, raw: bool = False, offset: bool = False) -> Panel:
    """Draw the distances of a stack, 5 to 10 inches high.

    Args:
        one: the distances.
        raw: colours of the distances themselves; else each row of blocks has its own range.
        offset: mark blocks by the row of blocks that are larger by one layer.
    """
    size = min(10.0, max(5.0, 0.26 * one.layers))

    def draw(figure: SubFigure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[size, 1.5])
        _draw_blocks(figure, left, one, raw, offset)
        _draw_layers(figure, right, one)

    return Panel(size + 3.4, size, draw)


def by_row(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale every row to 0..1; one whose numbers are all equal, or that is empty, becomes 0."""
    scaled = np.full_like(values, np.nan)
    for row, numbers in zip(scaled, values, strict=True):
        used = ~np.isnan(numbers)
        if used.any():
            low, high = numbers[used].min(), numbers[used].max()
            row[used] = (numbers[used] - low) / (high - low) if high > low else 0.0
    return scaled


def _draw_blocks(
    figure: SubFigure, axes: Axes, one: BlockDistances, raw: bool, offset: bool
) -> None:
    layers = one.layers
    shown = np.ma.masked_invalid(one.values if raw else by_row(one.values))
    image = axes.imshow(shown, extent=(-0.5, layers - 0.5, 0.5, layers + 0.5), **_STYLE)
    marks = [
        (best_block(one, size, offset=offset)[0], size)
        for size in range(1, layers)
        if not np.isnan(one.values[size - 1 + offset]).all()
    ]
    if marks:
        first, sizes = zip(*marks, strict=True)
        label = "block to remove" if offset else "smallest distance of its size"
        axes.scatter(first, sizes, s=16, color=MARK, label=label)
        # between map and title: the blocks of few layers leave no room in the map
        place: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "borderaxespad": 0}
        axes.legend(**place, handletextpad=0.2, frameon=False)
    axes.set_xlabel("First layer of the block")
    axes.set_ylabel("Layers in the block")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    title = " ".join(filter(None, (one.distance, one.stack)))
    axes.set_title(picture.words(title), fontsize=10, pad=22 if marks else None)
    axes.spines[["top", "right"]].set_visible(False)
    label = "Distance" if raw else "Distance, each row from its least to its most"
    figure.colorbar(image, ax=axes, label=label)


def _draw_layers(figure: SubFigure, axes: Axes, one: BlockDistances) -> None:
    column = one.values[0][:, None]
    extent = (-0.5, 0.5, -0.5, one.layers - 0.5)
    image = axes.imshow(np.ma.masked_invalid(column), extent=extent, **_STYLE)
    if not np.isnan(column).all():
        axes.scatter([0], [int(np.nanargmin(column))], s=16, color=MARK)
    axes.set_xticks([])
    axes.set_ylabel("Layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title("single layers", fontsize=10)
    figure.colorbar(image, ax=axes, label="Distance", aspect=60)
