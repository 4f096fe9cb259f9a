"""The picture of scores: what stands where, on which scale, and that no words overlap."""

import struct
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from composable import ranking
from composable.errors import UserError
from composable.formats.scores import BlockDistances, Scores, UnitImportance
from composable.ranking import base
from composable.reports import importance_plot
from composable.reports.block_plot import by_row
from composable.reports.unit_plot import shown, tables
from tests import tiny
from tests.pictures import assert_words_are_apart
from tests.tiny_scores import VALUES, origin

ATTENTION, FFN = "encoder.block.{}.attention", "encoder.block.{}.ffn"
NAME = "linear_approximation_token:12"


def of_units(heads: Any, neurons: Any = None) -> Scores:
    """Scores of layers with 4 heads and 6 neurons each."""
    units = {ATTENTION.format(n): UnitImportance(np.array(row, float)) for n, row in heads.items()}
    for number, row in (neurons or {}).items():
        units[FFN.format(number)] = UnitImportance(np.array(row, float))
    return Scores(origin(), units)


def by_l1(layout: str) -> Scores:
    return base.rank(ranking.by_name("l1"), tiny.dense(layout), None, base.NoOptions())


def maps(figure: Figure) -> list[Any]:
    """The maps of heads."""
    return [axes for axes in figure.axes if axes.images and axes.get_xlabel() == "Head"]


def curves(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_xlabel().endswith("the most important first")]


def test_every_kind_of_attention_has_a_map_and_every_stack_its_curves() -> None:
    made = by_l1("t5")
    figure = importance_plot.draw(made)
    names = ["encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention",
             "decoder.block.{}.layer.1.EncDecAttention"]  # fmt: skip
    titles = ["encoder self-attention", "decoder self-attention", "decoder cross-attention"]
    assert [axes.get_title() for axes in maps(figure)] == titles
    for axes, name in zip(maps(figure), names, strict=True):
        rows = [made.importance(name.format(layer)) for layer in range(2)]
        np.testing.assert_array_equal(axes.images[0].get_array(), rows)
    names = ["encoder.block.{}.layer.1.DenseReluDense", "decoder.block.{}.layer.2.DenseReluDense"]
    for axes, name in zip(curves(figure), names, strict=True):
        for layer, line in enumerate(axes.lines):
            best_first = sorted(made.importance(name.format(layer)), reverse=True)
            np.testing.assert_array_equal(line.get_ydata(), best_first)
            assert list(line.get_xdata()) == list(range(1, 49))


def test_layers_without_scores_leave_their_place() -> None:
    scores = of_units({0: [1, 2, 3, 4], 3: [4, 3, 2, 1]}, {3: range(6)})
    (table,) = tables(scores, "attention")
    assert list(table.layers) == [0, 3]
    figure = importance_plot.draw(scores)
    (image,) = maps(figure)[0].images
    assert np.ma.getmaskarray(image.get_array())[:, 0].tolist() == [False, True, True, False]
    (line,) = curves(figure)[0].lines
    assert list(line.get_ydata()) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("low", "scale"), [(1.0, "linear"), (0.02, "linear"), (1e-4, "log"), (-1.0, "linear")]
)
def test_values_far_apart_are_drawn_by_logarithms(low: float, scale: str) -> None:
    scores = of_units({0: [1, 0.5, low, low]}, {0: [1, 0.9, 0.8, low, low, low]})
    figure = importance_plot.draw(scores)
    assert curves(figure)[0].get_yscale() == scale
    name = type(maps(figure)[0].images[0].norm).__name__
    assert name == {"linear": "Normalize", "log": "LogNorm"}[scale]
    if low >= 0.02:
        assert curves(figure)[0].get_ylim()[0] == 0


def test_of_a_mere_order_its_reason_is_drawn() -> None:
    left = np.array([0.5, 9.0, 2.0])
    ranks = UnitImportance(np.array([1.0, 3.0, 2.0]), {"left": left})
    assert shown(ranks) == ("importance (left)", left)
    for other in (
        replace(ranks, importance=ranks.importance + 0.5),
        replace(ranks, components={}),
        replace(ranks, components={"left": left, "md": left}),
        replace(ranks, components={"md": np.ones((3, 2))}),
    ):
        assert shown(other) == ("importance", other.importance)


def test_all_tables_share_a_picture() -> None:
    distances = [BlockDistances("encoder", NAME, VALUES, 3)]
    scores = replace(of_units({0: [1, 2, 3, 4]}, {0: range(6)}), distances=distances)
    figure = importance_plot.draw(scores)
    assert (len(maps(figure)), len(curves(figure))) == (1, 1)
    (blocks,) = (axes for axes in figure.axes if axes.get_title() == f"{NAME} encoder")
    np.testing.assert_array_equal(blocks.images[0].get_array().filled(np.nan), by_row(VALUES))
    assert figure.get_suptitle() == "a/model: layer_distance"
    with pytest.raises(UserError, match="no scores by"):
        importance_plot.draw(scores, "other")
    with pytest.raises(UserError, match="hold neither importances of units nor distances of lay"):
        importance_plot.draw(Scores(origin()))


def many(layers: int, heads: int, neurons: int, spread: float) -> Scores:
    """Scores of all tables."""
    generator, made = np.random.default_rng(0), origin(layers)
    units = {}
    for module in made.modules:
        count = {"attention": heads, "ffn": neurons}.get(module.kind)
        if count:
            units[module.name] = UnitImportance(10 ** generator.normal(0, spread, count))
    rows, columns = np.indices((layers, layers))
    values = np.where(rows + columns < layers, generator.random((layers, layers)), np.nan)
    return Scores(made, units, [BlockDistances("encoder", NAME, values, 3)])


@pytest.mark.parametrize(
    "scores",
    [many(2, 4, 6, 3), many(6, 12, 40, 0.1), many(30, 32, 99, 3), by_l1("t5")],
    ids=["2 x 4", "6 x 12", "30 x 32", "t5"],
)  # fmt: skip
def test_no_words_overlap_and_none_is_cut_off(scores: Scores) -> None:
    # numbers at the ends of an axis may touch those of the other one, at its corner
    assert assert_words_are_apart(importance_plot.draw(scores), slack=2) > 2


@pytest.mark.parametrize(
    "row", [[0, 0, 0, 0], [1, 1, 1, 1], [-1, 0, 1, 2], [1e-150, 1, 1e100, 1e150], [0, 0, 0, 1]]
)
def test_any_finite_importance_is_drawn(row: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = importance_plot.png(of_units({0: row, 1: row}, {0: [*row, 0, 0]}), dpi=40)
    assert made.startswith(b"\x89PNG")


def test_numbers_that_have_no_axis_end_in_one_line() -> None:
    with pytest.raises(UserError, match="the picture cannot be drawn"):
        importance_plot.png(of_units({0: [1e-303, 1e-300, 3e-302, 1e-301]}), dpi=40)


def test_the_same_scores_give_the_same_bytes() -> None:
    first, second, other = (
        importance_plot.png(of_units({0: [1, 2, 3, last]}, {0: range(6)}), dpi=40)
        for last in (4, 4, 5)
    )
    assert first == second
    assert first != other
    assert struct.unpack(">II", first[16:24]) == (
        40 * 76 // 10,
        40 * 66 // 10,
    )  # of 7.6 x 6.6 inches
    assert b"tEXt" not in first
