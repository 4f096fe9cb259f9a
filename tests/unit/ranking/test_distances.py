"""The layers that policies choose by distances, tables of blocks, and pictures."""

import time
from typing import Any

import numpy as np
import pytest

from composable.errors import ConfigError, UserError
from composable.formats.scores import BlockDistances, Order, Scores
from composable.ranking.block_table import as_markdown, block_table
from composable.ranking.layer_choice import Choice, best_block
from composable.reports import block_plot, importance_plot
from tests import tiny_scores
from tests.tiny_scores import VALUES

NAN = np.nan


def scores(**changes: Any) -> Scores:
    """Of an encoder of five layers, by two distances, with an order of removal."""
    settings = {
        "distances": [
            BlockDistances("encoder", "bi_score", VALUES, 7),
            BlockDistances("encoder", "other", VALUES + 1, 6),
        ],
        "orders": [order(4, 0, 1)],
    }
    return Scores(tiny_scores.origin(5), **(settings | changes))


def order(*layers: int, protected: Any = ()) -> Order:
    names = [f"encoder.block.{layer}" for layer in layers]
    stay = [f"encoder.block.{layer}" for layer in protected]
    return Order(names, [0.1, 0.25, 0.3], "bi_score", stay)


def test_which_scores() -> None:
    both = scores(
        distances=[
            BlockDistances("encoder", "a", VALUES), BlockDistances("decoder", "a", VALUES + 1)
        ]
    )  # fmt: skip
    assert both.blocks("decoder").values[0, 0] == 1.3
    assert scores().blocks(None, "other").values[0, 0] == 1.3
    with pytest.raises(UserError, match="scores are of encoder and decoder; name one stack"):
        both.blocks()
    with pytest.raises(UserError, match='no scores by "x"; the file has bi_score, other'):
        scores().blocks(None, "x")
    with pytest.raises(UserError, match="no scores of the decoder; the file has those of encoder"):
        scores().blocks("decoder")
    with pytest.raises(UserError, match="no order of removal of the decoder; measure it"):
        scores().order_of_layers("decoder")


@pytest.mark.parametrize(
    ("policy", "count", "protected", "expected"),
    [
        ("block", 1, [], [1]), ("block", 2, [], [2, 3]), ("block", 3, [], [1, 2, 3]),
        ("block", 4, [], [0, 1, 2, 3]), ("block", 1, [1], [3]), ("block", 2, [3], [1, 2]),
        ("block", 0, [], []),
        ("singles", 1, [], [1]), ("singles", 3, [], [0, 1, 3]), ("singles", 3, [0], [1, 2, 3]),
        ("deepest", 1, [], [3]), ("deepest", 3, [], [1, 2, 3]), ("deepest", 2, [2], [1, 3]),
        ("iterative", 1, [], [4]), ("iterative", 3, [], [0, 1, 4]), ("iterative", 2, [2], [0, 4]),
    ],
)  # fmt: skip
def test_policies(policy: str, count: int, protected: list[int], expected: list[int]) -> None:
    some = scores()
    if policy == "iterative":
        some = scores(orders=[order(4, 0, 1, protected=protected)])
    assert Choice(policy, some, protected=protected).layers(count, 5) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 5}, "5 of 5 layers to drop: at least one goes and one stays; choose 1 to 4"),
        ({"count": 9, "policy": "singles"}, "9 of 5 layers to drop: 4 can go by the policy"),
        ({"count": 5, "policy": "deepest"}, "5 of 5 layers to drop: 4 can go"),
        ({"count": 4, "policy": "iterative"}, "4 of 5 layers to drop: 3 can go"),
        ({"count": 3, "policy": "singles", "protected": [0, 1, 2]},
         "3 of 5 layers to drop: 2 can go by the policy singles with 3 protected"),
        ({"count": 2, "protected": [1, 3]}, "no block of 2 layers: the protected layers"),
        ({"count": 1, "protected": [5]}, "protected layer 5: expected 0 to 4"),
        ({"count": 0, "protected": [5]}, "protected layer 5: expected 0 to 4"),
        ({"count": 1, "policy": "near"}, "policy near: unknown; known are block, singles, deepest"),
        ({"count": 1, "policy": "singles", "offset": True}, "offset: not for the policy singles"),
        ({"count": 1, "policy": "deepest", "distance": "x"}, "distance x: the policy deepest"),
        ({"count": 1, "policy": "iterative", "distance": "other"},
         "distance other: the order of removal was measured by bi_score"),
        ({"count": 1, "policy": "iterative", "protected": [2]},
         "protected layers 2: the order of removal was measured with none protected"),
        ({"count": 1, "layers": 6}, "the scores are of 5 layers, the encoder has 6"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(settings: dict[str, Any], message: str) -> None:
    settings = {"stack": "encoder"} | settings
    count, layers = settings.pop("count"), settings.pop("layers", 5)
    with pytest.raises(ConfigError, match=message):
        Choice(scores=scores(), **settings).layers(count, layers)


def test_scores_are_needed() -> None:
    assert Choice("deepest").layers(2, 5) == [2, 3]
    with pytest.raises(UserError, match="the policy singles needs scores"):
        Choice("singles").layers(2, 5)


def test_ties_go_to_the_first() -> None:
    even = BlockDistances("encoder", "x", np.where(np.isnan(VALUES), NAN, 1.0))
    assert best_block(even, 2) == (0, 1.0)
    assert Choice("singles", Scores(distances=[even])).layers(2, 5) == [0, 1]


def test_the_table_of_blocks() -> None:
    rows = list(block_table(scores().blocks(), threshold=0.8))
    assert [tuple(row.values()) for row in rows] == [(1, 1, 1, 0.1), (2, 2, 3, 0.3), (3, 1, 3, 0.8)]
    shifted = list(block_table(scores().blocks(), offset=True))
    assert [row["first"] for row in shifted] == [2, 1, 0, 0]
    assert as_markdown(rows) == (
        "| Block size | Removed layers | Score (avg dist) |\n|---|---|---|\n"
        "| 1 | 1-1 | 0.100 |\n| 2 | 2-3 | 0.300 |\n| 3 | 1-3 | 0.800 |\n"
    )


def test_rows_are_scaled_to_their_own_range() -> None:
    scaled = block_plot.by_row(VALUES)
    np.testing.assert_allclose(scaled[0], [0.5, 0, 0.75, 0.25, 1])
    assert scaled[3][:2].tolist() == [0, 0]
    assert scaled[4][0] == 0
    assert (np.isnan(scaled) == np.isnan(VALUES)).all()


def test_a_stack_of_one_layer_is_drawn() -> None:
    one = BlockDistances("encoder", "x", np.array([[0.5]]))
    for offset in (False, True):
        drawn = importance_plot.png(Scores(distances=[one]), offset=offset)
        assert drawn[:4] == b"\x89PNG"


def test_pictures_of_equal_scores_are_equal() -> None:
    first = importance_plot.png(scores(), title="title")
    assert first == importance_plot.png(scores(), title="title")
    assert first != importance_plot.png(scores(), "other", title="title")
    assert first != importance_plot.png(scores(), title="title", raw=True)
    assert first != importance_plot.png(scores(), title="title", offset=True)
    assert first[:4] == b"\x89PNG"
    assert b"tEXt" not in first


def test_the_best_blocks_of_many_layers_are_soon_found() -> None:
    """Other programs' files say how many there are; it took time by their third power."""
    layers = 1200
    values = np.full((layers, layers), 1.0)
    values[np.add.outer(np.arange(layers), np.arange(layers)) >= layers] = np.nan
    table = BlockDistances("", "", values)
    started = time.process_time()
    assert {best_block(table, size, (3,))[0] for size in range(1, 400)} == {0, 4}
    assert time.process_time() - started < 5
