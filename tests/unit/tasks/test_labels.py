"""Labels: which are the same class, which output each has, whatever split, limit and spelling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composable.errors import FormatError, MismatchError
from composable.models import checkpoint, export, pretrained
from composable.tasks.labels import class_ids, ordered, same
from composable.tasks.text_classification import TEXT_CLASSIFICATION
from composable.training import finetune
from composable.training.options import Options
from tests import tiny_tasks

WORDS = tiny_tasks.WORDS
NAMES = [WORDS[i + 3] for i in range(12)]
#: A class -> what a file calls it.
SPELLINGS: dict[str, Callable[[int], str]] = {
    "ints": str,
    "floats": lambda number: f"{number}.0",
    "LABEL_k": lambda number: f"LABEL_{number}",
    "zeros": lambda number: f"{number:02}",
    "numpy.savetxt": lambda number: f"{number:.18e}",
    "names": lambda number: NAMES[number],
}


def table(path: Path, *rows: tuple[str, str], columns: str = "text label") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in (columns.split(), *rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def outputs(data: Path, made: Any, split: str = "test", limit: int | None = None) -> list[int]:
    corpus = TEXT_CLASSIFICATION.read(str(data), None, split, limit)
    return [item["labels"] for item in TEXT_CLASSIFICATION.dataset(corpus, made).items]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_output_depends_on_no_split_and_no_limit(spelling: str, tmp_path: Path) -> None:
    """Twelve classes, of which each split has some; class k belongs to output k."""
    spell = SPELLINGS[spelling]
    have = {"train": [7, 2, 10, 1, 0, 3, 4, 5], "valid": [10, 11, 9], "test": [8, 6, 2]}
    for split, classes in have.items():
        table(tmp_path / f"{split}.tsv", *((WORDS[number], spell(number)) for number in classes))
    made = tiny_tasks.checkpoint("text_classification", labels=12)
    place = [sorted(NAMES).index(name) for name in NAMES] if spelling == "names" else range(12)
    for split, classes in have.items():
        for limit in (None, 2):
            expected = [place[number] for number in classes[:limit]]
            assert outputs(tmp_path, made, split, limit) == expected


def test_numbers_from_one_are_in_their_order(tmp_path: Path) -> None:
    """Stars: the third split alone would pass for the numbers of outputs."""
    stars = {"train": "1 2 3 4 5", "valid": "5.0 1.0", "test": "1 3"}
    for split, labels in stars.items():
        table(tmp_path / f"{split}.tsv", *(("a dog", label) for label in labels.split()))
    made = tiny_tasks.checkpoint("text_classification", labels=5)
    assert [outputs(tmp_path, made, split) for split in stars] == [[0, 1, 2, 3, 4], [4, 0], [0, 2]]


def test_two_of_three_classes_are_not_taken_for_those_of_sst2(tmp_path: Path) -> None:
    labels = {"train": "2 0 1", "valid": "0 1", "test": "1"}
    for split, classes in labels.items():
        rows = (("a dog", label) for label in classes.split())
        table(tmp_path / f"{split}.tsv", *rows, columns="sentence label")
    made = tiny_tasks.checkpoint("text_classification", labels=3)
    assert [outputs(tmp_path, made, split) for split in labels] == [[2, 0, 1], [0, 1], [1]]
    with pytest.raises(MismatchError, match=r"has the classes negative, positive \(2\) in all its"):
        outputs(tmp_path / "valid.tsv", made)  # nothing says whether they are
    corpus = TEXT_CLASSIFICATION.read(str(tmp_path), None, "train", None)
    made.info |= TEXT_CLASSIFICATION.learned(made, corpus)
    assert outputs(tmp_path / "valid.tsv", made) == [0, 1]


def test_a_trained_model_knows_its_classes(tmp_path: Path) -> None:
    """Names, in a folder whose splits differ; then files that have a few of them, or another."""
    for split, classes in {"train": [0, 5, 3, 9, 1, 2], "valid": [4, 0, 10, 11, 6, 7, 8]}.items():
        rows = [(WORDS[number], NAMES[number]) for number in classes]
        table(tmp_path / "data" / f"{split}.tsv", *rows)
    made = tiny_tasks.checkpoint("text_classification", labels=12)
    checkpoint.save(tmp_path / "dense.pth", made)
    options = Options(
        epochs=1, batch_size=8, lr=0.01, early_stop=0, device="cpu", checkpoint_dir=tmp_path / "c"
    )
    finetune.tune_model(
        checkpoint.load(tmp_path / "dense.pth"), tmp_path / "tuned.pth", tmp_path / "s.csv",
        options, "baseline", str(tmp_path / "data"), limit=4,
    )  # fmt: skip
    tuned = checkpoint.load(tmp_path / "tuned.pth")
    assert tuned.info["labels"] == sorted(NAMES)
    rows = [("a dog", NAMES[10]), ("a cat", NAMES[2].upper())]
    few = table(tmp_path / "few.tsv", *rows)
    assert outputs(few, tuned) == [sorted(NAMES).index(NAMES[10]), sorted(NAMES).index(NAMES[2])]
    other = table(tmp_path / "other.tsv", *rows, ("a man", "rodent"))
    message = r'other\.tsv: row 4: the class "rodent" is none of the model\'s, which are .*\(12\)'
    with pytest.raises(MismatchError, match=message):
        outputs(other, tuned)
    with pytest.raises(MismatchError, match="the model 0, 1, 2"):
        outputs(few, checkpoint.load(tmp_path / "dense.pth"))  # which does not know them
    export.write(tuned, tmp_path / "tuned.pth", tmp_path / "hf")
    again = pretrained.import_model(tmp_path / "hf", "again")
    assert again.info["labels"] == sorted(NAMES)


def test_which_labels_are_the_same() -> None:
    for label in ("3", "3.0", "03", "3.", "LABEL_3", "label_3", "+3", "3e+00", "30.E-1", "0.3e+1"):
        assert same(label) == "3"
    for label in ("3.5", "x3", "LABEL_x", "", "3e0", "3.5e+00", "1e+999", "٣", "1,000"):
        assert same(label) == label
    assert [same(label) for label in ("-1.0", "-0", "0", "000", "0.0")] == ["-1", *["0"] * 4]
    assert same("gru\u0308n") == same("gr\u00fcn") == "gr\u00fcn"  # as archives of a Mac have it
    labels = ["b", "10", "-1", "9", "2.5", "B", "9", "5e-01"]
    assert ordered(labels) == ("-1", "5e-01", "2.5", "9", "10", "B", "b")


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ("a A", "A a", [1, 0]),  # where case tells names apart, it counts
        ("True False", "false true", [1, 0]),
        ("3.0 LABEL_2", "2 3", [1, 0]),
        ("1", "1 star 2".split(), [0]),
        ("2", "zero one two", [2]),
        ("Crane", "Cardigan cardigan crane", [2]),
    ],
)
def test_names_that_are_spelled_otherwise(labels: str, names: Any, expected: list[int]) -> None:
    values = labels.split()
    names = names.split() if isinstance(names, str) else names
    found, _ = class_ids(values, ordered(values), names)
    assert [found[value] for value in values] == expected


@pytest.mark.parametrize("label", ["crane", "Crane", "CRANE"])
def test_a_name_of_two_outputs_is_none(label: str) -> None:
    """ImageNet has the bird and the machine, and models call both of them a crane."""
    message = f'"{label}" is the name of several of the model\'s, which are crane, cock, crane'
    with pytest.raises(MismatchError, match=message):
        class_ids([label], ["cock", label], ["crane", "cock", "crane"])
    assert class_ids(["cock"], ["cock", label], ["crane", "cock", "crane"]) == ({"cock": 1}, "name")


def test_numbers_are_not_counted_where_the_names_are_others() -> None:
    """Stars from 1 to 5: 0 is none of them, though an output has this number."""
    with pytest.raises(MismatchError, match='"0" is none of the model\'s'):
        class_ids(["0", "1"], ["0", "1"], ["1", "2", "3", "4", "5"])


#: As pandas, `json.dumps` or a person write it.
ABSENT = ["", "  ", "nan", "NaN", "null", "NULL", "None", "NA", "N/A", "<NA>"]


@pytest.mark.parametrize("cell", ABSENT)
def test_missing_cells_are_no_classes_and_no_words(cell: str, tmp_path: Path) -> None:
    rows = [("a dog", "0"), ("a cat", "1")]
    for column, row in (("label", ("a man", cell)), ("text", (cell, "1"))):
        path = table(tmp_path / "x.tsv", *rows, row)
        with pytest.raises(FormatError, match=rf"x\.tsv: row 4: the {column} is missing"):
            TEXT_CLASSIFICATION.read(str(path), None, "test", None)
        path = tmp_path / "x.csv"
        path.write_text("text,label\n" + "".join(f'"{a}","{b}"\n' for a, b in (*rows, row)))
        with pytest.raises(FormatError, match=rf"x\.csv: row 4: the {column} is missing"):
            TEXT_CLASSIFICATION.read(str(path), None, "test", None)
    assert len(TEXT_CLASSIFICATION.read(str(path), None, "test", 2).texts) == 2


def objects(path: Path, *records: str) -> str:
    path.write_text("\n".join(records) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": null, "label": 1}', "row 2: the text is missing"),
        ('{"text": NaN, "label": 1}', "row 2: the text is missing"),
        ('{"text": "", "label": 1}', "row 2: the text is missing"),
        ('{"label": 1}', "row 2: the text is missing"),
        ('{"text": "a", "label": null}', "row 2: the label is missing"),
        ('{"text": "a", "label": NaN}', "row 2: the label is missing"),
        ('{"text": "a", "label": "nan"}', "row 2: the label is missing"),
        ('{"text": "a"}', "row 2: the label is missing"),
        ('{"text": ["a"], "label": 1}', r"row 2: the text is \"\['a'\]\"; a text or a number"),
        ('{"text": "a", "label": [1, 0]}', r"row 2: the label is '\[1, 0\]'; a text or a number"),
        ('{"text": "a", "label": 0, "label": 1}', "line 2 is not JSON .a key occurs twice"),
        (r'{"text": "\ud800", "label": 1}', "line 2 is not JSON .*surrogates not allowed"),
        ('{"text": ' + "[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_records_without_a_text_or_a_label(record: str, message: str, tmp_path: Path) -> None:
    path = objects(tmp_path / "x.jsonl", '{"text": "x", "label": 0}', record)
    with pytest.raises(FormatError, match=message) as caught:
        TEXT_CLASSIFICATION.read(path, None, "test", None)
    assert len(str(caught.value)) < 400


def test_records_need_not_have_the_same_keys(tmp_path: Path) -> None:
    """JSON says what is a word: "None" is one; numbers are texts as they are written."""
    records: list[dict[str, Any]] = [
        {"text": "x", "label": 1, "note": None},
        {"label": 0.0, "text": "None"},
        {"id": 7, "text": 12, "label": "1"},
    ]
    corpus = TEXT_CLASSIFICATION.read(
        objects(tmp_path / "x.jsonl", *map(json.dumps, records)), None, "test", None
    )
    assert (corpus.texts, corpus.labels) == (["x", "None", "12"], ["1", "0", "1"])


def test_truth_values_are_numbers_where_numbers_are_expected(tmp_path: Path) -> None:
    rows = [("a\tb", "True"), ("c\td", "False")]
    path = table(tmp_path / "x.tsv", *rows, columns="question1 question2 is_duplicate")
    corpus = TEXT_CLASSIFICATION.read(str(path), None, "test", None)
    assert corpus.labels == ["duplicate", "not_duplicate"]


def test_rows_that_nobody_agreed_on_are_left_out(tmp_path: Path) -> None:
    """As the authors of SNLI ask for."""
    rows = [("a\tb", "neutral"), ("a\tc", "-"), ("a\td", "entailment")]
    path = table(tmp_path / "x.tsv", *rows, columns="sentence1 sentence2 gold_label")
    corpus = TEXT_CLASSIFICATION.read(str(path), None, "test", None)
    assert (corpus.labels, corpus.rows) == (["neutral", "entailment"], [2, 4])
    made = tiny_tasks.checkpoint("text_classification", labels=3)
    assert outputs(path, made) == [1, 0]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "x.tsv", ("a\t0", "1"), columns="text label label")
    with pytest.raises(FormatError, match='two columns are called "label"; rename one'):
        TEXT_CLASSIFICATION.read(str(path), None, "test", None)
