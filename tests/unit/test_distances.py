"""Files of scores, and the layers that policies choose by them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composable.errors import ConfigError, FormatError, UserError
from composable.formats import scores_file
from composable.formats.scores_file import Distances, Removal, Scores
from composable.ranking import layer_choice
from composable.ranking.layer_choice import Choice
from composable.reports import importance_plot

NAN = np.nan
# by hand: singles 3 1 4 2 5; the best pair begins at 2, the best three at 1
VALUES = np.array(
    [
        [0.3, 0.1, 0.4, 0.2, 0.5],
        [0.6, 0.5, 0.3, 0.7, NAN],
        [0.9, 0.8, 0.85, NAN, NAN],
        [1.1, 1.1, NAN, NAN, NAN],
        [2.0, NAN, NAN, NAN, NAN],
    ]
)


def scores(**changes: Any) -> Scores:
    settings = {
        "distances": [
            Distances("encoder", "bi_score", VALUES, 7),
            Distances("encoder", "other", VALUES + 1, 6),
        ],
        "removals": [Removal("encoder", [4, 0, 1], [0.1, 0.25, 0.3], "bi_score")],
        "model": "some/model",
        "fingerprint": "ab" * 32,
    }  # fmt: skip
    return Scores(**(settings | changes))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    scores_file.save(path, scores())
    found = scores_file.load(path)
    for one, wanted in zip(found.distances, scores().distances, strict=True):
        assert (one.stack, one.metric, one.samples) == (wanted.stack, wanted.metric, wanted.samples)
        np.testing.assert_array_equal(one.values, wanted.values)
    assert (found.removals, found.model, found.fingerprint) == (
        scores().removals, "some/model", "ab" * 32,
    )  # fmt: skip
    scores_file.save(other, found)
    assert other.read_bytes() == path.read_bytes()


def test_other_programs_find_what_they_know(tmp_path: Path) -> None:
    scores_file.save(tmp_path / "a.npz", scores())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        for name in ("arr_0", "result"):
            np.testing.assert_array_equal(stored[name], np.nan_to_num(VALUES))
        np.testing.assert_array_equal(stored["valid"], ~np.isnan(VALUES))
        assert (int(stored["count"]), int(stored["n_layers"])) == (7, 5)
        assert str(stored["metric"]) == "bi_score"
        assert stored["layer_indices"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["arr_0", "result"])
def test_files_of_the_reference_program(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "memory.npz", **{name: np.nan_to_num(VALUES)})
    found = scores_file.load(tmp_path / "memory.npz")
    np.testing.assert_array_equal(found.of().values, VALUES)
    assert found.of("decoder").metric == ""


def rewritten(path: Path, **changes: Any) -> None:
    scores_file.save(path, scores())
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "format composable.scores 2, this program reads composable.scores 1"),
        ({"format": "other"}, "format other 1"),
        ({"result_1": None}, "result_1"),
        ({"result_0": np.zeros((2, 3))}, r"distances of shape \(2, 3\), a square was expected"),
        ({"result_0": np.full((2, 2), np.inf)}, "no finite numbers"),
        ({"result_0": np.zeros((2, 2), int)}, "no finite numbers"),
        ({"order_encoder": np.array([0, 0])}, "order"),
        ({"order_encoder": np.array([9])}, "order"),
        ({"format": None, "result": None, "arr_0": None}, "arr_0"),
        ({"counts": np.array([1])}, "shorter"),
    ],
)
def test_files_that_are_no_scores(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.npz"
    rewritten(path, **changes)
    with pytest.raises(FormatError, match=rf"x\.npz: not a file of scores .*{message}"):
        scores_file.load(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    scores_file.save(path, scores())
    for content in (path.read_bytes()[:-40], b"", b"text", b"\x80\x04N."):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.npz: not a readable \.npz file"):
            scores_file.load(path)
    np.save(tmp_path / "y.npy", VALUES)
    with pytest.raises(FormatError, match=r"y\.npy: not a readable \.npz file \(one array alone\)"):
        scores_file.load(tmp_path / "y.npy")
    np.savez(path, arr_0=np.array([{}], dtype=object))
    with pytest.raises(FormatError, match="allow_pickle"):
        scores_file.load(path)


def test_which_scores() -> None:
    both = scores(
        distances=[Distances("encoder", "a", VALUES), Distances("decoder", "a", VALUES + 1)]
    )
    assert both.of("decoder").values[0, 0] == 1.3
    assert scores().of(None, "other").values[0, 0] == 1.3
    with pytest.raises(
        UserError, match="scores are of encoder and decoder; say which with --stack"
    ):
        both.of()
    with pytest.raises(UserError, match='no scores by "x"; the file has bi_score, other'):
        scores().of(None, "x")
    with pytest.raises(UserError, match="no scores of the decoder; the file has those of encoder"):
        scores().of("decoder")
    with pytest.raises(UserError, match=r"no order of removal of the decoder; .* --iterative N"):
        scores().removal("decoder")


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
        some = scores(removals=[Removal("encoder", [4, 0, 1], [0.1, 0.25, 0.3], "x", protected)])
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
        ({"count": 1, "protected": [5]}, "--protect 5: expected layers from 0 to 4"),
        ({"count": 0, "protected": [5]}, "--protect 5: expected layers from 0 to 4"),
        ({"count": 1, "policy": "near"}, "policy near: unknown; known are block, singles, deepest"),
        ({"count": 1, "policy": "singles", "offset": True}, "--reference-offset: not for the"),
        ({"count": 1, "policy": "deepest", "metric": "x"}, "--metric x: the policy deepest looks"),
        ({"count": 1, "policy": "iterative", "metric": "other"},
         "--metric other: the order of removal was measured by bi_score"),
        ({"count": 1, "policy": "iterative", "protected": [2]},
         "--protect 2: the order of removal was measured with none protected"),
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
    with pytest.raises(UserError, match="the policy singles needs --scores"):
        Choice("singles").layers(2, 5)


def test_ties_go_to_the_first() -> None:
    even = Distances("encoder", "x", np.where(np.isnan(VALUES), NAN, 1.0))
    assert layer_choice.best_block(even, 2) == (0, 1.0)
    assert Choice("singles", Scores([even])).layers(2, 5) == [0, 1]


def test_the_table_of_blocks() -> None:
    rows = list(layer_choice.block_table(scores().of(), threshold=0.8))
    assert [tuple(row.values()) for row in rows] == [(1, 1, 1, 0.1), (2, 2, 3, 0.3), (3, 1, 3, 0.8)]
    shifted = list(layer_choice.block_table(scores().of(), offset=True))
    assert [row["first"] for row in shifted] == [2, 1, 0, 0]
    assert layer_choice.as_markdown(rows) == (
        "| Block size | Removed layers | Score (avg dist) |\n|---|---|---|\n"
        "| 1 | 1-1 | 0.100 |\n| 2 | 2-3 | 0.300 |\n| 3 | 1-3 | 0.800 |\n"
    )


def test_rows_are_scaled_to_their_own_range() -> None:
    scaled = importance_plot.by_row(VALUES)
    np.testing.assert_allclose(scaled[0], [0.5, 0, 0.75, 0.25, 1])
    assert scaled[3][:2].tolist() == [0, 0]
    assert scaled[4][0] == 0
    assert (np.isnan(scaled) == np.isnan(VALUES)).all()


def test_a_stack_of_one_layer_is_drawn() -> None:
    one = Distances("encoder", "x", np.array([[0.5]]))
    for offset in (False, True):
        assert importance_plot.png([one], offset=offset)[:4] == b"\x89PNG"


def test_pictures_of_equal_scores_are_equal() -> None:
    some = [scores().of(), scores().of(None, "other")]
    first = importance_plot.png(some, "title")
    assert first == importance_plot.png(some, "title")
    assert first != importance_plot.png(some, "title", raw=True)
    assert first != importance_plot.png(some, "title", offset=True)
    assert first[:4] == b"\x89PNG"
    assert b"tEXt" not in first
