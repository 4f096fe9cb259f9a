"""Pictures of importances: heads as maps of layers and heads, neurons as a curve for each layer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from composable.formats.scores import Numbers, Scores, UnitImportance
from composable.reports import picture
from composable.reports.picture import Panel

#: Kinds that are drawn as curves, and what their units are.
UNITS = {"ffn": "neurons", "layer": "tokens", "linear": "weights"}
#: Values that differ by more than this factor, but for the lowest twentieth, get a log scale.
WIDEST, LOWEST = 100.0, 0.05
#: Of the values above 0 so many may lie below a curve's axis: single ones are far below all others.
CUT = 0.01
POINTS = 1000  # of a curve at most
CELL = 0.24  # inches, of a head
CURVES = (7.6, 3.6)  # inches
WIDTH = 15.0  # inches, of maps beside each other


@dataclass(frozen=True, eq=False)
class Table:
    """Importances of modules of one kind and stack, one in a layer.

    Attributes:
        title: what they are.
        layers: number of the layer -> (units,).
        label: what the numbers are.
    """

    title: str
    layers: dict[int, Numbers] = field(default_factory=dict)
    label: str = "importance"

    @property
    def values(self) -> Numbers:
        """All of them."""
        return np.concatenate(list(self.layers.values()))

    @property
    def count(self) -> int:
        """Layers up to the last one that has some."""
        return max(self.layers) + 1


def units_panels(scores: Scores) -> list[Panel]:
    """Draw all importances: the maps of heads in a row, and a panel for every other kind."""
    found = []
    if maps := tables(scores, "attention"):
        found.append(_heads_panel(maps))
    return found + [
        _curves_panel(curves, noun)
        for kind, noun in UNITS.items()
        if (curves := tables(scores, kind))
    ]


def tables(scores: Scores, kind: str) -> list[Table]:
    """Sort the importances of modules of a kind by stack, attention and layer."""
    found: dict[tuple[str, int], Table] = {}
    numbers, places = Counter[str](), Counter[str]()  # of layers, and of modules in each
    for module in scores.origin.modules if scores.origin else ():
        if module.kind == "layer":
            numbers[module.stack] += 1
            places.clear()
        if module.kind != kind:
            continue
        places[kind] += 1
        if module.name in scores.units:
            label, values = shown(scores.units[module.name])
            key = module.stack, places[kind] if kind == "attention" else 0
            table = found.setdefault(key, Table(_title(*key), label=label))
            table.layers.setdefault(max(numbers[module.stack] - 1, 0), values)
    return list(found.values())


def _title(stack: str, place: int) -> str:
    # the second attention of a layer is the cross-attention
    return stack + {0: "", 1: " self-attention"}.get(place, " cross-attention")


def shown(one: UnitImportance) -> tuple[str, Numbers]:
    """Return what is drawn of a module and its name: what units are ordered by, if it is known.

    An importance that is a mere place in an order says nothing of how much units differ.
    """
    is_order = np.array_equal(np.sort(one.importance), np.arange(1, len(one.importance) + 1))
    if is_order and len(one.components) == 1:
        ((name, values),) = one.components.items()
        if values.ndim == 1:
            return f"importance ({name})", values
    return "importance", one.importance


def scale_of(values: Numbers) -> Normalize:
    """Choose a scale: linear, or by logarithms where values above 0 lie far apart."""
    above = values[values > 0]
    if values.min() < 0 or not len(above):
        return Normalize(values.min(), values.max())
    if above.max() <= WIDEST * np.quantile(above, LOWEST):
        return Normalize(values.min(), values.max())
    return LogNorm(above.min(), above.max())


def _heads_panel(maps: Sequence[Table]) -> Panel:
    heads = [max(map(len, one.layers.values())) for one in maps]
    widths = [min(10.0, max(2.6, 0.6 + CELL * count)) for count in heads]
    height = min(9.0, max(2.6, 1.1 + CELL * max(one.count for one in maps)))
    is_column = sum(widths) > WIDTH
    width = (max if is_column else sum)(widths) + 1.3
    shape = (len(maps), 1) if is_column else (1, len(maps))

    def draw(figure: SubFigure) -> None:
        ratios = None if is_column else widths
        axes = figure.subplots(*shape, squeeze=False, width_ratios=ratios).flatten()
        scale = scale_of(np.concatenate([one.values for one in maps]))
        colours = matplotlib.colormaps["viridis_r"].with_extremes(bad="#eeeeee")
        for each, one, count in zip(axes, maps, heads, strict=True):
            image = _draw_map(each, one, count, scale, colours)
        figure.colorbar(image, ax=list(axes), label=_begun(maps[0].label), aspect=30 * shape[0])

    return Panel(width, height * (len(maps) if is_column else 1), draw)


def _draw_map(
    axes: Axes, one: Table, heads: int, scale: Normalize, colours: matplotlib.colors.Colormap
) -> ScalarMappable:
    values = np.full((one.count, heads), np.nan)
    for layer, row in one.layers.items():
        values[layer, : len(row)] = row
    if isinstance(scale, LogNorm):
        values = np.maximum(values, scale.vmin or 0)  # zeros have no logarithm
    image = axes.imshow(
        np.ma.masked_invalid(values), norm=scale, cmap=colours, origin="lower", aspect="auto",
        interpolation="none",
    )  # fmt: skip
    axes.set_xlabel("Head")
    axes.set_ylabel("Layer")
    axes.set_title(picture.words(one.title), fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_whole())
    axes.spines[["top", "right"]].set_visible(False)
    return image


def _curves_panel(curves: Sequence[Table], noun: str) -> Panel:
    count = max(one.count for one in curves)
    colours = layer_colours(count)

    def draw(figure: SubFigure) -> None:
        axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
        for each, one in zip(axes, curves, strict=True):
            _draw_curves(each, one.layers, colours)
            each.set_xlabel(f"{_begun(noun)}, the most important first")
            each.set_title(picture.words(f"{one.title} {noun}"), fontsize=10)
        axes[0].set_ylabel(_begun(curves[0].label))
        _scale_axis(axes[0], np.concatenate([one.values for one in curves]))
        layers = ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, count), colours)
        bar = figure.colorbar(layers, ax=list(axes), label="Layer", aspect=30)
        bar.ax.yaxis.set_major_locator(_whole())
        bar.ax.minorticks_off()

    return Panel(CURVES[0] * (1 if len(curves) == 1 else 1.6), CURVES[1], draw)


def layer_colours(count: int) -> ListedColormap:
    """Choose a colour for every layer, dark to light; yellow is too light on white."""
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))


def _draw_curves(axes: Axes, layers: Mapping[int, Numbers], colours: ListedColormap) -> None:
    for layer, values in layers.items():
        points = np.unique(np.linspace(0, len(values) - 1, POINTS).round().astype(int))
        curve = np.sort(values)[::-1][points]
        marker = "o" if len(curve) == 1 else ""  # of which no line can be drawn
        axes.plot(points + 1, curve, marker, color=colours(layer), linewidth=1.2)
    longest = max(map(len, layers.values()))
    axes.set_xlim(1, max(longest, 2))
    axes.xaxis.set_major_locator(_whole())
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _scale_axis(axes: Axes, values: Numbers) -> None:
    """Scale the axis of the importances, which all curves share."""
    if isinstance(scale_of(values), LogNorm):
        low = np.quantile(values[values > 0], CUT)
        axes.set_ylim(low / 2, 1.5 * values.max())  # first, or all of them would be fitted in
        axes.set_yscale("log")
    elif values.min() >= 0:
        axes.set_ylim(bottom=0)


def _whole() -> MaxNLocator:
    """Place ticks at round whole numbers, up to a dozen."""
    return MaxNLocator(12, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _begun(text: str) -> str:
    """Begin it with a capital letter."""
    return text[:1].upper() + text[1:]
