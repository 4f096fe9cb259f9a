"""Perplexity against a plain loop, windows, what a text file is taken for."""

import gzip
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from composable.errors import FormatError, UserError
from composable.tasks import language_modeling, samples
from composable.tasks.language_modeling import LANGUAGE_MODELING, read_stream
from tests import tiny_tasks
from tests.paths import SHARED

DATA = SHARED / "data"
SETTINGS = {"device": "cpu", "dtype": "float32"}


def read(path: Path, split: str = "test", limit: int | None = None) -> Any:
    return read_stream(str(path), None, split, limit)


@pytest.mark.parametrize("kind", ["", "opt"])
@pytest.mark.parametrize("window", [7, 16, 64])
def test_perplexity_against_a_loop(kind: str, window: int, tmp_path: Path) -> None:
    """Window by window, all logits, no padding; every token but the first is predicted."""
    made = tiny_tasks.checkpoint("language_modeling", kind=kind)
    path = tmp_path / "text.txt"
    path.write_text("\n".join("the old dog runs in the garden ." for _ in range(15)))
    ids = made.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    total, predicted, means = 0.0, 0, []
    for start in range(0, len(ids), window):
        part = torch.tensor([ids[start : start + window]])
        if part.numel() < 2:
            continue
        with torch.no_grad():
            odds = made.model(input_ids=part).logits.log_softmax(-1)
        losses = [-float(odds[0, i, part[0, i + 1]]) for i in range(part.numel() - 1)]
        total, predicted = total + sum(losses), predicted + len(losses)
        means.append(sum(losses) / len(losses))
    lines, report = LANGUAGE_MODELING.evaluate(made, read(path), SETTINGS | {"max_length": window})
    assert report["loss"] == pytest.approx(total / predicted, rel=1e-4)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(total / predicted), rel=1e-4)
    assert [float(line) for line in lines] == pytest.approx(means, rel=1e-4)
    assert report["predicted_tokens"] == predicted
    assert (report["tokens"], report["window"]) == (120, window)
    assert report["bytes"] == len(path.read_bytes())
    bits = total / predicted * 120 / report["bytes"] / math.log(2)
    assert report["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
    said = f"|tokens:120|predicted:{predicted}|window:{window}|stride:{window}|tokenizer:"
    assert said in report["perplexity"]["signature"]
    assert report["bits_per_byte"]["signature"].endswith(f"|bytes:{report['bytes']}")


def test_windows_and_labels(tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("language_modeling", max_length=4)
    (tmp_path / "x.txt").write_text("a the man woman dog cat child")
    data = LANGUAGE_MODELING.dataset(read(tmp_path / "x.txt"), made)
    assert data.lengths == [4, 3]
    batch = LANGUAGE_MODELING.collator(made)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7], [8, 9, 10, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, -100], [9, 10, -100, -100]]


def test_a_single_last_token_is_left_out(tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("language_modeling", max_length=3)
    (tmp_path / "x.txt").write_text("a the man woman")
    assert LANGUAGE_MODELING.dataset(read(tmp_path / "x.txt"), made).lengths == [3]
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(FormatError, match=r"x\.txt has less than 2 tokens"):
        LANGUAGE_MODELING.dataset(read(tmp_path / "x.txt"), made)


def test_no_special_tokens_are_added(tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("language_modeling")
    made.tokenizer = tiny_tasks.tokenizer(pairs=True)  # it would add <cls> and <sep>
    (tmp_path / "x.txt").write_text("a the man")
    assert LANGUAGE_MODELING.dataset(read(tmp_path / "x.txt"), made).items[0][
        "input_ids"
    ].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("content", "limit", "expected"),
    [
        (b" = A = \n \n b\r\nc\n", None, " = A = \n \n b\r\nc\n"),
        (b" = A = \n \n b\r\nc\n", 3, " = A = \n \n b\r\n"),
        (b"a\nb", None, "a\nb"),
        (b"a\nb", 2, "a\nb"),
        (b"a\nb", 9, "a\nb"),
        ("\ufeffä\n".encode(), None, "ä\n"),
    ],
)
def test_the_text_is_the_files_own(
    content: bytes, limit: int | None, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    corpus = read(tmp_path / "x.txt", limit=limit)
    assert corpus.text == expected
    assert corpus.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(content))
    assert read(tmp_path / "x.txt.gz", limit=limit).text == expected


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    ],
)
def test_names_of_files(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(f"{name}\n")
    for split, name in zip(("train", "valid", "test"), names, strict=True):
        corpus = read(tmp_path, split)
        assert (corpus.text, corpus.file, corpus.split) == (f"{name}\n", name, split)


def test_what_stands_in_for_missing_splits(tmp_path: Path) -> None:
    """As of WikiText-2 without its training text, and of Penn Treebank's valid alone."""
    lines = [f"line {i}\n" for i in range(20)]
    (tmp_path / "valid.txt").write_text("".join(lines))
    train, valid, test = (read(tmp_path, split) for split in ("train", "valid", "test"))
    assert train.text == "".join(lines[:18])
    assert valid.text == "".join(lines[18:])
    assert test.text == "".join(lines)
    assert [each.file for each in (train, valid, test)] == [
        "valid.txt[:90%]",
        "valid.txt[90%:]",
        "valid.txt",
    ]
    (tmp_path / "test.txt").write_text("other\n")
    assert read(tmp_path, "test").file == "test.txt"
    assert read(tmp_path, "train", 2).text == "".join(lines[:2])


@pytest.mark.parametrize(
    ("files", "split", "error", "message"),
    [
        ({}, "test", UserError, "no test split; expected a text file .* wiki.train.tokens"),
        ({"test.txt": "x"}, "train", UserError, "no train split"),
        ({"test.txt": " \n"}, "test", FormatError, r"test\.txt: no text for test"),
        ({"valid.txt": "x\n"}, "train", FormatError, r"valid\.txt: no text for train"),
    ],
)
def test_refused_with_one_line(
    files: dict[str, str], split: str, error: type[UserError], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message) as caught:
        read(tmp_path, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [1, 65])
def test_windows_have_to_fit_the_model(window: int, tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("language_modeling")
    (tmp_path / "x.txt").write_text("a the man")
    with pytest.raises(
        UserError, match=rf"window {window}: expected 2 or more, and at most the 64 positions"
    ):
        LANGUAGE_MODELING.evaluate(
            made, read(tmp_path / "x.txt"), SETTINGS | {"max_length": window}
        )


def test_logits_of_a_batch_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 64, room for 20 logits rows: 2 windows of 8 go together."""
    made = tiny_tasks.checkpoint("language_modeling", max_length=8)
    (tmp_path / "x.txt").write_text("the man " * 24)
    monkeypatch.setitem(language_modeling.LOGITS, "cpu", 20 * 64)
    met: list[int] = []
    hook = made.model.register_forward_pre_hook(
        lambda _, args, kwargs: met.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    LANGUAGE_MODELING.evaluate(made, read(tmp_path / "x.txt"), SETTINGS)
    hook.remove()
    assert met == [2, 2, 2]


@pytest.mark.parametrize(
    ("name", "split", "file", "lines", "words"),
    [
        ("wikitext-2", "test", "test.txt.gz", 4358, 241211),
        ("wikitext-2", "train", "valid.txt.gz[:90%]", 3384, None),
        ("wikitext-2", "valid", "valid.txt.gz[90%:]", 376, None),
        ("ptb", "test", "valid.txt.gz", None, None),
    ],
)
def test_real_files(name: str, split: str, file: str, lines: int | None, words: int | None) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} is not here")
    corpus = read(DATA / name, split)
    assert corpus.file == file
    if lines:
        assert corpus.text.count("\n") == lines
    if words:
        assert len(corpus.text.split()) == words
    if name == "ptb":
        parts = [read(DATA / name, each).text for each in ("train", "valid")]
        assert "".join(parts) == corpus.text


def test_sorting_keeps_windows_in_order(tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("language_modeling", max_length=4)
    (tmp_path / "x.txt").write_text("a the man woman dog cat child")
    data = LANGUAGE_MODELING.dataset(read(tmp_path / "x.txt"), made, is_sorted=True)
    assert data.lengths == [4, 3]
    assert samples.positions(made) == 64
