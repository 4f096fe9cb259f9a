"""Tables of labelled texts: GLUE's columns, other files, missing splits; one line for mistakes."""

import gzip
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from composable.errors import FormatError, UserError
from composable.tasks import (
    labelled_texts,
    splits,
    tables,
    text_classification,
    text_similarity,
)
from composable.tasks.labelled_texts import CLASSES, SCORES
from composable.tasks.splits import Source
from tests.paths import SHARED

DATA = SHARED / "data"


def write(folder: Path, **contents: str | list[str]) -> Path:
    """Write files; `dev__tsv` is written as dev.tsv, cells of a list are set apart by tabs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = content if isinstance(content, str) else "\n".join(content) + "\n"
        path = folder / name.replace("__", ".")
        path.write_text(text.replace(" | ", "\t"), encoding="utf-8")
    return folder


def read(data: Any, split: str = "valid", limit: int | None = None, layouts: Any = CLASSES) -> Any:
    return labelled_texts.read(str(data), None, split, limit, layouts)


GLUE: dict[str, tuple[list[str], list[tuple[Any, ...]]]] = {
    "SST-2": (
        ["sentence | label", "a good film  | 1", "bad | 0"],
        [("a good film", None, "positive"), ("bad", None, "negative")],
    ),
    "MRPC": (
        ["\ufeffQuality | #1 ID | #2 ID | #1 String | #2 String", '1 | 7 | 8 | He "said | He did'],
        [('He "said', "He did", "equivalent")],
    ),
    "QNLI": (
        ["index | question | sentence | label", "0 | Who? | He. | not_entailment"],
        [("Who?", "He.", "not_entailment")],
    ),
    "QQP": (
        ["id | qid1 | qid2 | question1 | question2 | is_duplicate", "0 | 1 | 2 | Who? | Whom? | 0"],
        [("Who?", "Whom?", "not_duplicate")],
    ),
    "MNLI": (
        [
            "index | promptID | pairID | genre | sentence1 | sentence2 | label1 | gold_label",
            "0 | 1 | 1n | fiction | A dog. | An animal. | neutral | entailment",
        ],
        [("A dog.", "An animal.", "entailment")],
    ),
    "CoLA": (
        ["gj04 | 1 |  | The sailors rode.", "gj04 | 0 | * | The sailors rodes."],
        [("The sailors rode.", None, "acceptable"), ("The sailors rodes.", None, "unacceptable")],
    ),
    "RTE": (
        ["index | sentence1 | sentence2 | label", "0 | A. | B. | entailment"],
        [("A.", "B.", "entailment")],
    ),
}


@pytest.mark.parametrize("name", GLUE)
def test_columns_of_glue(name: str, tmp_path: Path) -> None:
    lines, expected = GLUE[name]
    file = "dev_matched__tsv" if name == "MNLI" else "dev__tsv"
    folder = write(tmp_path, train__tsv=lines, **{file: lines})
    for split in ("train", "valid", "test"):
        corpus = read(folder, split)
        others = corpus.others or [None] * len(corpus.texts)
        assert list(zip(corpus.texts, others, corpus.labels, strict=True)) == expected
        assert set(corpus.labels) <= set(corpus.classes)
    assert corpus.file == ("dev_matched.tsv" if name == "MNLI" else "dev.tsv")
    assert (corpus.name, corpus.split) == (str(folder), "test")


def test_scores_of_stsb(tmp_path: Path) -> None:
    head = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    line = "0 | g | f | 2012 | 1 | none | none | A man. | A boy. | 3.800"
    folder = write(tmp_path, dev__tsv=[head.replace(" ", " | "), line])
    corpus = read(folder, "test", layouts=SCORES)
    assert (corpus.texts, corpus.others, corpus.labels) == (["A man."], ["A boy."], ["3.800"])
    with pytest.raises(
        FormatError, match="no columns of labelled texts, or no labels in them; expected"
    ):
        read(folder, "test")


def test_csv_and_jsonl_are_read_alike(tmp_path: Path) -> None:
    texts = [("It's, well, good", "fine"), ("two\nlines", "broken")]
    csv = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in texts)
    lines = [json.dumps({"text": text, "label": label, "id": 7}) for text, label in texts]
    first = read(write(tmp_path / "a", test__csv=csv), "test")
    second = read(write(tmp_path / "b", test__jsonl="\n".join(lines)), "test")
    packed = tmp_path / "c" / "test.csv.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(csv.encode()))
    assert first.texts == second.texts == read(packed, "test").texts == [t for t, _ in texts]
    assert first.labels == ["fine", "broken"]
    assert first.sha256 == second.sha256 == read(packed, "test").sha256
    assert first.classes == ()


def test_other_labels_in_known_columns_are_kept(tmp_path: Path) -> None:
    """Whatever the limit is: what the labels mean must not depend on it."""
    lines = ["sentence | label", "one | 0", "two | 1", "three | 2"]
    assert read(write(tmp_path / "a", dev__tsv=lines), "test", 2).labels == ["0", "1"]
    pairs = ["index | sentence1 | sentence2 | label", "0 | A. | B. | 1", "1 | A. | C. | 0"]
    corpus = read(write(tmp_path / "b", dev__tsv=pairs), "test")
    assert (corpus.labels, corpus.classes) == (["1", "0"], ())


def test_a_test_file_without_labels_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As GLUE's: the development set stands in, and the corpus says so."""
    lines = ["sentence | label", "good | 1"]
    hidden = ["index | sentence", "0 | a secret"]
    folder = write(tmp_path, train__tsv=lines, dev__tsv=lines, test__tsv=hidden)
    with caplog.at_level(logging.WARNING, "composable"):
        corpus = read(folder, "test")
    assert (corpus.split, corpus.file, corpus.texts) == ("test", "dev.tsv", ["good"])
    assert "test.tsv: has no labels and is passed over." in caplog.text
    write(folder, test__tsv=["sentence | label", "a secret | -1"])
    assert read(folder, "test").file == "dev.tsv"


@pytest.mark.parametrize(
    ("there", "split", "expected"),
    [
        ("train valid test", "train", ["train:all"]),
        ("train valid test", "valid", ["valid:all"]),
        ("train valid test", "test", ["test:all", "valid:all"]),
        ("train valid", "test", ["valid:all"]),
        ("train test", "train", ["train:train"]),
        ("train test", "valid", ["train:valid"]),
        ("train", "test", ["train:valid"]),
        ("valid test", "train", ["valid:train"]),
        ("valid test", "valid", ["valid:valid"]),
        ("valid", "test", ["valid:all"]),
        ("test", "train", []),
        ("test", "valid", []),
        ("test", "test", ["test:all"]),
    ],
)
def test_what_stands_in_for_missing_splits(there: str, split: str, expected: list[str]) -> None:
    found = {name: Path(name) for name in there.split()}
    assert [f"{each.path}:{each.share}" for each in splits.sources(split, found)] == expected


def test_what_is_held_out(tmp_path: Path) -> None:
    folder = write(
        tmp_path, train__tsv=["text | label", *(f"text {i} | {i % 2}" for i in range(25))]
    )
    parts = {split: read(folder, split) for split in ("train", "valid", "test")}
    assert parts["valid"].texts == parts["test"].texts == ["text 0", "text 10", "text 20"]
    assert len(parts["train"].texts) == 22
    assert not set(parts["train"].texts) & set(parts["valid"].texts)
    assert parts["train"].file == "train.tsv[9of10]"
    assert parts["valid"].file == "train.tsv[1of10]"
    assert read(folder, "train", 3).texts == ["text 1", "text 2", "text 3"]
    assert Source(Path("a/b.csv"), "all").label == "b.csv"


def test_reviews_in_folders(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("test", 3)):
        for folder in ("neg", "pos", "unsup"):
            place = tmp_path / split / folder
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i:02}_7.txt").write_text(f"{folder} film {i}\n")
    corpus = read(tmp_path, "test", 4)
    assert corpus.texts == ["neg film 0", "pos film 0", "neg film 1", "pos film 1"]
    assert corpus.labels == ["negative", "positive"] * 2
    assert corpus.classes == ("negative", "positive")
    held = read(tmp_path, "valid")
    assert held.texts == ["neg film 0", "pos film 0", "neg film 10", "pos film 10"]
    assert held.file == "train[1of10]"
    assert len(read(tmp_path, "train").texts) == 36


class Saved:
    """What `datasets.load_from_disk` gives."""

    column_names = ("sentence", "label", "idx")

    def __init__(self, labels: list[int]):
        self.cells = {"sentence": ["x", "y"], "label": labels, "idx": [0, 1]}
        self.features = {"label": SimpleNamespace(names=["unacceptable", "acceptable"])}

    def __getitem__(self, name: str) -> list[Any]:
        return self.cells[name]


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / split, state__json="{}")
    labels = {"train": [1, 0], "validation": [0, 1], "test": [-1, -1]}
    package = SimpleNamespace(load_from_disk=lambda path: Saved(labels[Path(path).name]))
    monkeypatch.setitem(sys.modules, "datasets", package)
    corpus = read(tmp_path, "test")
    assert (corpus.file, corpus.labels) == ("validation", ["unacceptable", "acceptable"])
    assert read(tmp_path, "train").labels == ["acceptable", "unacceptable"]
    assert read(tmp_path / "train", "test").labels == ["acceptable", "unacceptable"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="saved by the package datasets, which is not installed"):
        read(tmp_path)


def test_few_broken_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"text {i} | 1" for i in range(200)]
    folder = write(tmp_path, dev__tsv=["text | label", *rows, "cut off"])
    with caplog.at_level(logging.WARNING, "composable"):
        assert len(read(folder, "test").texts) == 200
    assert "1 of 201 rows are broken and left out" in caplog.text


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        ({}, UserError, "no valid split; expected a file .* named train, valid"),
        ({"dev__txt": "x"}, UserError, "no valid split"),
        ({"dev__tsv": ["text | label"]}, FormatError, "no rows"),
        ({"dev__tsv": ["word | class", "a | b"]}, FormatError, "no columns of labelled texts"),
        ({"dev__tsv": ["text | label", "a"]}, FormatError, "1 of 1 rows do not have the 2 cells"),
        ({"dev__csv": 'text,label\n"a,b\n'}, FormatError, "not a CSV file"),
        ({"dev__jsonl": "{\n"}, FormatError, "line 1 is not JSON"),
        ({"dev__jsonl": "[1]\n"}, FormatError, r"line 1 is '\[1\]'; expected an object"),
    ],
)
def test_refused_with_one_line(
    contents: dict[str, Any], error: type[UserError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        read(write(tmp_path / "x", **contents))
    assert "\n" not in str(caught.value)


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data nowhere: no such file or folder; expected a file"):
        read("nowhere")
    with pytest.raises(UserError, match="no data: the model file names none, and neither data"):
        labelled_texts.read(None, None, "test", None, CLASSES)
    (tmp_path / "x.tsv").write_bytes(b"\xff\n")
    with pytest.raises(FormatError, match=r"x\.tsv: cannot be read as text"):
        read(tmp_path / "x.tsv", "test")
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\n" * 99)[:-12] + b"x" * 12)
    with pytest.raises(FormatError, match=r"x\.tsv\.gz: cannot be read as text"):
        read(tmp_path / "x.tsv.gz", "test")
    write(tmp_path, **{"x__txt": "x"})
    with pytest.raises(FormatError, match=r"unknown kind of table; expected \.tsv"):
        tables.open_table(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("task", "name", "counts", "first"),
    [
        (
            text_classification.TEXT_CLASSIFICATION, "sst2", (60614, 6735),
            ("the expressive power of the camera", None, "positive"),
        ),
        (
            text_similarity.TEXT_SIMILARITY, "stsb", (5749, 1500),
            ("A man with a hard hat is dancing.", "A man wearing a hard hat is dancing.", "5.000"),
        ),
    ],
)  # fmt: skip
def test_real_files(task: Any, name: str, counts: tuple[int, int], first: tuple[Any, ...]) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} is not here")
    train, valid, test = (
        task.read(str(DATA / name), None, split, None) for split in ("train", "valid", "test")
    )
    assert (len(train.texts), len(valid.texts)) == counts
    assert (valid.sha256, valid.file) == (test.sha256, test.file)
    assert test.file == "dev.tsv.gz"
    assert (test.texts[0], test.others[0] if test.others else None, test.labels[0]) == first
