"""The picture of quality against cost: where points stand, and that no words overlap."""

import pytest

from composable.reports.quality_plot import DODGE, Point, placed, png_of, quality_figure
from tests.pictures import assert_words_are_apart

STAGES = {"pruned": "pruned", "block": "+ module-level", "model": "+ model-level"}


def point(number: int, parameters: float, macs: float, *scores: float) -> Point:
    return Point(
        f"{number}: heads {number} %", parameters, macs, dict(zip(STAGES, scores, strict=True))
    )


POINTS = [
    point(0, 0.75, 0.85, 30.0, 44.0, 43.0),
    point(1, 0.7, 0.5, 16.0, 42.0, 42.5),
    point(2, 0.66, 0.85, 27.0, 41.0, 43.0),
]


def markers(axes) -> list[tuple[float, float]]:
    """Places of the points: lines of one place."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def test_a_point_for_each_configuration_and_stage_and_a_line_for_the_dense_model() -> None:
    left, right = quality_figure("BLEU", 45.5, 2.0, STAGES, POINTS).axes
    assert markers(left) == [(p.parameters, y) for p in POINTS for y in p.scores.values()]
    heights = [score for p in POINTS for score in p.scores.values()]
    assert [height for _, height in markers(right)] == heights
    for axes in (left, right):
        (dense,) = (line for line in axes.lines if line.get_linestyle() == "--")
        assert set(dense.get_ydata()) == {45.5}
        (band,) = axes.patches
        assert (band.get_y(), band.get_height()) == (43.5, 4.0)
    assert left.get_ylabel() == "BLEU"
    assert left.get_yscale() == "linear"


def test_configurations_of_equal_cost_stand_side_by_side() -> None:
    _, right = quality_figure("BLEU", 45.5, None, STAGES, POINTS).axes
    first, second = markers(right)[0][0], markers(right)[6][0]
    assert (first + second) / 2 == pytest.approx(0.85)
    assert second - first == pytest.approx(DODGE * (right.get_xlim()[1] - right.get_xlim()[0]))
    assert not right.patches


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([0.9, 0.1], [0.9, 0.1]),
        ([0.5, 0.5], [0.475, 0.525]),
        ([0.5, 0.5, 0.5], [0.45, 0.5, 0.55]),
        # the pair of 0.5 would stand on 0.53: three share a place, in the order of their costs
        ([0.53, 0.5, 0.5], [0.56, 0.46, 0.51]),
    ],
)
def test_what_is_drawn_keeps_its_distance(costs: list[float], expected: list[float]) -> None:
    assert placed(costs, 1.0) == pytest.approx(expected)


def test_scores_far_apart_are_drawn_by_logarithms() -> None:
    figure = quality_figure("perplexity", 22.0, None, STAGES, [point(0, 0.5, 0.5, 5e3, 60, 30)])
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("points", [POINTS[:1], POINTS, [*POINTS] * 4])
def test_no_words_overlap_and_none_is_cut_off(points: list[Point]) -> None:
    figure = quality_figure("BLEU", 45.5, 2.0, STAGES, points)
    # dense, configurations, stages, band
    assert assert_words_are_apart(figure) == 1 + 3 * len(points) + 4


def test_the_same_points_give_the_same_bytes() -> None:
    first, second = (png_of(quality_figure("BLEU", 45, 2, STAGES, POINTS)) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")
