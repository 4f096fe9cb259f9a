"""scores.npz: every table comes back, and what breaks a rule of docs/formats.md is refused."""

import io
import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composable.errors import FormatError, MismatchError, UserError
from composable.formats import scores_file
from composable.formats.config import Entry
from composable.formats.scores import (
    BlockDistances,
    Candidates,
    Order,
    Scores,
    Tree,
    UnitImportance,
)
from tests.tiny_scores import FINGERPRINT, VALUES, origin

A, F = "encoder.block.0.attention", "encoder.block.1.ffn"


def full() -> Scores:
    """Scores with all tables."""
    return Scores(
        origin(),
        units={
            A: UnitImportance(np.array([0.5, 0.25, 3.0, -1.0]), {"md": np.ones((4, 3)) / 3}),
            F: UnitImportance(np.arange(6) / 7, {"kl": np.arange(6) / 9, "md": np.zeros((6, 1))}),
            "encoder.block.2": UnitImportance(np.arange(17.0)),
        },
        distances=[
            BlockDistances("encoder", "bi_score", VALUES, 7),
            BlockDistances("encoder", "angular_token:0", VALUES + 1, 6),
        ],
        orders=[
            Order(["encoder.block.4", "encoder.block.0"], [0.1, 0.25], "bi_score",
                  ["encoder.block.1"]),
            Order([F, A], [0.5, 0.75]),
        ],
        trees=[
            Tree(A, [3], ["encoder.block.0.attention.o"], [], 96, 0.125),
            Tree("encoder.block.1.ffn.gate", [], [F], ["encoder.block.1.ffn.act"], 288, -0.5),
        ],
        candidates=Candidates(
            [A, F], [Entry(0.25), Entry(0.5, "ranked")],
            {"error": np.array([0.1, np.nan]), "macs": np.array([1e9, 2e9])},
        ),
        constants={"kl_scale": 0.25},
    )  # fmt: skip


def plain(scores: Scores) -> Any:
    """Everything that scores hold, as lists and numbers that can be compared."""

    def listed(values: Any) -> Any:
        return np.nan_to_num(values, nan=-99).tolist()

    made = scores.candidates
    return (
        json.loads(json.dumps(scores.origin, default=vars)),
        {name: (listed(one.importance), {k: listed(v) for k, v in one.components.items()})
         for name, one in scores.units.items()},
        [(one.stack, one.distance, listed(one.values), one.samples) for one in scores.distances],
        json.loads(json.dumps([*scores.orders, *scores.trees], default=vars)),
        made and (made.modules, made.entries, {k: listed(v) for k, v in made.columns.items()}),
        dict(scores.constants),
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    scores_file.save(path, full())
    found = scores_file.load(path)
    assert plain(found) == plain(full())
    scores_file.save(other, found)
    assert other.read_bytes() == path.read_bytes()


def test_another_program_can_read_it(tmp_path: Path) -> None:
    """With numpy and json alone, by the names of docs/formats.md."""
    scores_file.save(tmp_path / "a.npz", full())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        header = json.loads(stored["header"].tobytes())
        np.testing.assert_array_equal(stored["distances/encoder/bi_score"], VALUES)
        assert stored[f"units/{A}/importance"].tolist() == [0.5, 0.25, 3.0, -1.0]
        assert stored[f"units/{A}/md"].shape == (4, 3)
        assert np.isnan(stored["candidates/error"]).tolist() == [False, True]
        assert len(stored.files) == 1 + 2 + (2 + 3 + 1) + 2
    assert (header["format"], header["version"]) == ("composable.scores", "2")
    assert header["model"] == {"source": "a/model", "fingerprint": FINGERPRINT}
    assert header["texts"]["mean_tokens"] == {"encoder": 28 / 3}
    assert header["modules"][1] == {
        "name": A, "kind": "attention", "stack": "encoder", "units": 4, "macs_per_unit": 120.5,
    }  # fmt: skip
    assert header["candidates"]["entries"] == [0.25, {"rate": 0.5, "method": "ranked"}]


@pytest.mark.parametrize("name", ["arr_0", "result"])
def test_files_of_the_reference_program(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez_compressed(tmp_path / "memory.npz", **{name: np.nan_to_num(VALUES)})
    with caplog.at_level(logging.INFO, "composable"):
        found = scores_file.load(tmp_path / "memory.npz")
    np.testing.assert_array_equal(found.blocks("decoder").values, VALUES)
    assert "memory.npz: is of another program" in caplog.text
    assert "whether it is of this one cannot be checked" in caplog.text
    found.require_model("any", tmp_path)
    with pytest.raises(
        UserError, match=r'no importance of the units of "x" .they have those of none'
    ):
        found.importance("x")


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Write a file whose header and arrays somebody changed."""
    scores_file.save(path, full())
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, header=text, **arrays)


BREACHES: list[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    (lambda h, a: h.update(version="3"), "format 'composable.scores' '3', this program reads"),
    (lambda h, a: h.update(format="other"), "format 'other' '2'"),
    (lambda h, a: h.update(more=1), "has not the keys"),
    (lambda h, a: h["model"].pop("fingerprint"), "model: .* has not the keys"),
    (lambda h, a: h["model"].update(fingerprint=""), "fingerprint '' is no SHA-256"),
    (lambda h, a: h["texts"].update(sha256="x"), "texts, sha256 'x' is no SHA-256"),
    (lambda h, a: h["texts"].update(samples=0), "texts: no counts above 0"),
    (lambda h, a: h["texts"].update(mean_tokens={"encoder": 9}), "mean_tokens is not tokens by"),
    (lambda h, a: h["modules"][0].update(kind="head"), "module encoder.block.0: "),
    (lambda h, a: h["modules"].append(h["modules"][0]), "a module is listed twice"),
    (lambda h, a: h.update(modules=[]), "'encoder.block.0.attention' is no module of its header"),
    (lambda h, a: h["units"].append(h["units"][0]), "listed twice"),
    (lambda h, a: h["units"][0].update(components=["importance"]), "are no names"),
    (lambda h, a: a.pop(f"units/{A}/md"), f"the array units/{A}/md is missing"),
    (lambda h, a: a.update({f"units/{A}/md": np.ones((3, 4))}), r"not of shape \(4,\) or \(4, K\)"),
    (lambda h, a: a.update({f"units/{A}/importance": np.ones(5)}), r"not of shape \(4,\)"),
    (lambda h, a: a.update({f"units/{A}/importance": np.full(4, np.nan)}), "holds NaN or infinity"),
    (lambda h, a: a.update({f"units/{A}/importance": np.ones(4, "f4")}), "is no float64"),
    (lambda h, a: a.update(more=np.ones(1)), "its arrays are not those that its header names"),
    (lambda h, a: h["distances"].append(h["distances"][0]), "its arrays are not those"),
    (lambda h, a: h["distances"][0].update(samples=0), "distances of no samples"),
    (lambda h, a: a.update({"distances/encoder/bi_score": VALUES[:4]}),
     r"distances of shape \(4, 5\), of 5 layers \(5, 5\)"),
    (lambda h, a: a.update({"distances/encoder/bi_score": np.nan_to_num(VALUES)}),
     "distances where there is no block"),
    (lambda h, a: a.update({"distances/encoder/bi_score": VALUES * np.inf}), "infinite"),
    (lambda h, a: h["orders"][0].update(modules=["encoder.block.9"]), "'encoder.block.9' is no"),
    (lambda h, a: h["orders"][0].update(modules=["encoder.block.1", "encoder.block.0"]),
     "the order"),
    (lambda h, a: h["orders"][0].update(scores=[0.5]), "one finite number for each module"),
    (lambda h, a: h["trees"][0].update(root="pooler"), "a tree of 'pooler', which is in no module"),
    (lambda h, a: h["trees"][0].update(units=[-1]), "tree of encoder.block.0.attention: units"),
    (lambda h, a: h["candidates"].update(entries=[0.5]), "not one entry for each module"),
    (lambda h, a: h["candidates"].update(entries=[0.5, 2]), "rate 2 is not a number from 0 to 1"),
    (lambda h, a: h["candidates"].update(columns=["Error", "macs"]), "are no names"),
    (lambda h, a: a.update({"candidates/macs": np.array([1, np.inf])}), "columns that are not 2"),
    (lambda h, a: h.update(constants={"kl_scale": "1"}), "constants {'kl_scale': '1'} are no"),
    (lambda h, a: h.update(constants=[0.5]), "constants"),
    (lambda h, a: (h.update(units=[], distances=[], orders=[], trees=[], candidates=None),
                   a.clear()), "there are no scores in it"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), BREACHES, ids=lambda it: "" if callable(it) else it[:40]
)
def test_rules_of_the_format(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "x.npz"
    changed(path, change)
    with pytest.raises(FormatError, match=rf"x\.npz: no file of scores .*{message}.*make it again"):
        scores_file.load(path)


def test_constants_may_be_missing(tmp_path: Path) -> None:
    changed(tmp_path / "x.npz", lambda header, arrays: header.pop("constants"))
    assert scores_file.load(tmp_path / "x.npz").constants == {}


def test_what_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        scores_file.save(
            tmp_path / "x.npz", Scores(origin(), {A: UnitImportance(np.full(4, np.inf))})
        )
    assert not list(tmp_path.iterdir())


def test_version_1_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", format="composable.scores", version="1", arr_0=VALUES)
    with pytest.raises(
        FormatError, match=r"version 1 of the format, .* reads 2\); make it again with rank_imp"
    ):
        scores_file.load(tmp_path / "x.npz")


def test_damaged_files(tmp_path: Path) -> None:
    """A flipped bit anywhere is noticed, or changes nothing that is read."""
    path = tmp_path / "x.npz"
    scores_file.save(path, full())
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert plain(scores_file.load(path)) == plain(full())
        except FormatError:
            refused += 1
    assert refused > len(whole) / 61 / 2
    for content in (whole[:-40], b"", b"text", b"\x80\x09N."):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.npz: no file of scores \(no readable archive"):
            scores_file.load(path)
    np.savez(path, arr_0=np.array([{}], dtype=object))
    with pytest.raises(FormatError, match="an array of object, which is not read"):
        scores_file.load(path)
    for dtype in ("V8", "M8[s]", [("a", "f8")]):
        np.savez(path, arr_0=np.zeros(2, dtype))
        with pytest.raises(FormatError, match=r"no readable \.npz: an array of"):
            scores_file.load(path)
    for name in ("header.npy", "header"):  # no telling which of two is meant
        path.write_bytes(whole)
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(name, archive.read("header.npy"))
        with pytest.raises(FormatError, match=r"no readable \.npz: two arrays of one name"):
            scores_file.load(path)
    unclosed = b"\x93NUMPY\x01\x00" + (80).to_bytes(2, "little") + b"(" * 80
    for array in (b"no array", unclosed):  # numpy's error for the second is one of Python's parser
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.npy", array)
        with pytest.raises(FormatError, match=r"no readable \.npz"):
            scores_file.load(path)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return self.made.touch, ()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "torch.save", "old torch.save"])
def test_rankings_that_could_run_code(tmp_path: Path, protocol: Any) -> None:
    """As the program of OPTIN publishes them: a pickled list of (score, layer, index, kind)."""
    path, made = tmp_path / "head_ranking_body.pkl", tmp_path / "made"
    ranking = [(torch.tensor(-0.5), 0, 3, "head"), Bomb(made)]
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(ranking, protocol))
    else:
        is_zip = protocol == "torch.save"
        torch.save(ranking, path, _use_new_zipfile_serialization=is_zip)
    kind = "a pickle of torch.save" if protocol == "torch.save" else "a pickle of Python"
    message = (
        rf"body\.pkl: no scores but {kind}, as models and published rankings "
        r"\(head_ranking_body\.pkl\) are; it is not read, as reading a pickle can run code; "
        r"measure again with rank_importance\.py, method trajectory, output scores\.npz\.$"
    )
    with pytest.raises(FormatError, match=message):
        scores_file.load(path)
    assert not made.exists()


def test_archives_that_would_fill_the_memory(tmp_path: Path) -> None:
    """A compressed member, and a shape of more numbers than there are."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(1 << 27))
    with pytest.raises(FormatError, match=f"archive of .* bytes that says it holds {1 << 27}"):
        scores_file.load(path)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"shape": (10**6, 10**6), "fortran_order": False, "descr": "<f8"}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", huge.getvalue())
    with pytest.raises(FormatError, match=r"an array of shape \(1000000, 1000000\) in 128 bytes"):
        scores_file.load(path)


def test_scores_of_another_model(tmp_path: Path) -> None:
    full().require_model(FINGERPRINT, tmp_path)
    with pytest.raises(MismatchError, match=r"measured on another model .*abababababab, this one"):
        full().require_model("cd" * 32, tmp_path)
    with pytest.raises(UserError, match=r'units of "x" \(they have those of 3 modules\); measure'):
        full().importance("x")
    with pytest.raises(UserError, match=r"the scores \(of layer_distance\) hold no distances"):
        Scores(origin()).blocks()
