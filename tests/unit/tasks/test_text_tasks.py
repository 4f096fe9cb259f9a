"""Text classification and similarity: labels to outputs, pairs, scores against scikit-learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from composable.errors import FormatError, MismatchError
from composable.tasks.labels import class_ids, class_names, ordered
from composable.tasks.text_classification import TEXT_CLASSIFICATION
from composable.tasks.text_similarity import TEXT_SIMILARITY
from tests import tiny_tasks

SETTINGS = {"device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(
    ("labels", "classes", "names", "expected", "how"),
    [
        ("negative positive", "negative positive", "NEGATIVE POSITIVE", (0, 1), "name"),
        ("negative positive", "negative positive", "POSITIVE NEGATIVE", (1, 0), "name"),
        ("negative positive", "negative positive", "LABEL_0 LABEL_1", (0, 1), "order"),
        ("negative positive", "negative positive", "positive neutral negative", (2, 0), "name"),
        ("b c", "", "a b c", (1, 2), "name"),
        ("0 2", "", "x y z", (0, 2), "number"),
        ("good bad", "", "0 1", (1, 0), "alphabet"),
        ("1 2", "", "1 2 3", (0, 1), "name"),  # stars: 1 is the name of the first output
    ],
)
def test_labels_and_outputs(
    labels: str, classes: str, names: str, expected: tuple[int, ...], how: str
) -> None:
    values, documented = labels.split(), tuple(classes.split())
    found, by = class_ids(values, documented or ordered(values), names.split(), documented)
    assert (tuple(found[value] for value in values), by) == (expected, how)


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        ("good bad", "", "0 1 2"),
        ("negative positive", "negative positive", "contradiction entailment"),
        ("good bad", "", "POSITIVE NEGATIVE"),
        ("0 2", "", "x y"),
        ("a b c", "a b c", "0 1"),  # names of the data are no numbers of the model
    ],
)
def test_labels_that_fit_no_output(labels: str, classes: str, names: str) -> None:
    values, documented = labels.split(), tuple(classes.split())
    known = documented or ordered(values)
    message = (
        r"the data has the classes .* in all its splits, the model .* \([23]\); the same names"
        if names[0] == "0"
        else r"the data: the class \".*\" is none of the model's, which are .* \(2\); correct it"
    )
    with pytest.raises(MismatchError, match=message):
        class_ids(values, known, names.split(), documented)


def test_names_of_outputs() -> None:
    assert class_names(tiny_tasks.checkpoint("text_classification", labels=3)) == ["0", "1", "2"]
    named = tiny_tasks.checkpoint("text_classification")
    named.info["labels"] = ["no", "yes"]
    assert class_names(named) == ["no", "yes"]


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines).replace(" | ", "\t") + "\n")
    return str(path)


def test_pairs_have_token_types_and_are_cut(tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("text_classification", max_length=12)
    long = " ".join(["dog"] * 20)
    path = write(tmp_path / "x.tsv", "text1 | text2 | label", f"the man | {long} | 1", "a | b | 0")
    corpus = TEXT_CLASSIFICATION.read(path, None, "test", None)
    first, second = TEXT_CLASSIFICATION.dataset(corpus, made).items
    assert len(first["input_ids"]) == 12
    assert first["token_type_ids"].tolist() == [0] * 4 + [1] * 8
    assert second["input_ids"].tolist() == [2, 4, 3, 1, 3]
    assert [first["labels"], second["labels"]] == [1, 0]


def test_texts_without_a_token_are_refused(tmp_path: Path) -> None:
    """A tokenizer may leave out what it does not know, and add nothing."""
    made = tiny_tasks.checkpoint("text_classification")
    path = write(tmp_path / "x.tsv", "text | label", "the man | 1", "\u200b | 0")
    corpus = TEXT_CLASSIFICATION.read(path, None, "test", None)
    made.tokenizer = tiny_tasks.tokenizer(pairs=False)
    made.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(FormatError, match=r"x\.tsv: row 3: the text has no token for this model"):
        TEXT_CLASSIFICATION.dataset(corpus, made)


def balance(made: Any, texts: list[str]) -> None:
    """Take the mean of its logits from a random classifier, or it gives one answer to all."""
    with torch.no_grad():
        rows = [torch.tensor([made.tokenizer(text)["input_ids"]]) for text in texts]
        mean = torch.cat([made.model(input_ids=row).logits for row in rows]).mean(0)
        made.model.classifier.bias -= mean


def evaluate(task: Any, made: Any, path: str) -> Any:
    return task.evaluate(made, task.read(path, None, "test", None), SETTINGS)


@pytest.mark.parametrize("labels", [2, 3])
def test_scores_against_scikit_learn(labels: int, tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a dev requirement")
    words = tiny_tasks.WORDS
    texts = [f"{words[i]} {words[i // 2 + 3]}" for i in range(len(words))]
    true = [i % labels for i in range(len(texts))]
    rows = [f"{text} | {label}" for text, label in zip(texts, true, strict=True)]
    made = tiny_tasks.checkpoint("text_classification", seed=2, labels=labels)
    balance(made, texts)
    lines, report = evaluate(
        TEXT_CLASSIFICATION, made, write(tmp_path / "x.tsv", "text | label", *rows)
    )
    with torch.no_grad():
        predicted = [
            int(made.model(input_ids=torch.tensor([made.tokenizer(text)["input_ids"]])).logits.argmax())
            for text in texts
        ]  # fmt: skip
    assert lines == [str(each) for each in predicted]
    assert len(set(predicted)) > 1
    average = "binary" if labels == 2 else "macro"
    expected = {
        "accuracy": metrics.accuracy_score(true, predicted),
        "f1": metrics.f1_score(true, predicted, average=average),
        "matthews": metrics.matthews_corrcoef(true, predicted),
    }
    for key, value in expected.items():
        assert report[key]["value"] == pytest.approx(100 * value, abs=1e-4)
    assert f"|average:{average}" in report["f1"]["signature"]
    assert "|classes_by:name|" in report["accuracy"]["signature"]


def test_a_model_that_counts_its_classes_the_other_way_round(tmp_path: Path) -> None:
    """By names: the same answers and scores as those of the model with swapped outputs."""
    folder = tiny_tasks.data("text_classification", tmp_path)
    made = tiny_tasks.checkpoint("text_classification", labels=2)
    made.info["labels"] = ["negative", "positive"]
    balance(made, TEXT_CLASSIFICATION.read(str(folder), None, "test", None).texts)
    lines, report = evaluate(TEXT_CLASSIFICATION, made, str(folder))
    with torch.no_grad():
        head = made.model.classifier
        head.weight.copy_(head.weight.flip(0))
        head.bias.copy_(head.bias.flip(0))
    made.info["labels"] = ["POSITIVE", "NEGATIVE"]
    other, swapped = evaluate(TEXT_CLASSIFICATION, made, str(folder))
    assert [line.lower() for line in other] == lines
    assert set(lines) == {"negative", "positive"}
    for key in ("accuracy", "f1", "matthews", "loss"):
        value = swapped[key] if key == "loss" else swapped[key]["value"]
        assert value == pytest.approx(report[key] if key == "loss" else report[key]["value"])
    assert "positive:POSITIVE" in swapped["f1"]["signature"]


def test_correlations_against_scipy(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is a dev requirement")
    folder = tiny_tasks.data("text_similarity", tmp_path, 80)
    made = tiny_tasks.checkpoint("text_similarity")
    lines, report = evaluate(TEXT_SIMILARITY, made, str(folder))
    corpus = TEXT_SIMILARITY.read(str(folder), None, "test", None)
    wanted = [float(label) for label in corpus.labels]
    outputs = []
    for first, second in zip(corpus.texts, corpus.others or [], strict=True):
        encoded = made.tokenizer(first, second, return_tensors="pt")
        with torch.no_grad():
            outputs.append(float(made.model(**encoded).logits))
    assert [float(line) for line in lines] == pytest.approx(outputs, abs=1e-3)
    spearman, pearson = stats.spearmanr(outputs, wanted), stats.pearsonr(outputs, wanted)
    assert report["spearman"]["value"] == pytest.approx(100 * spearman.statistic, abs=0.01)
    assert report["pearson"]["value"] == pytest.approx(100 * pearson.statistic, abs=0.01)
    errors = [(a - b) ** 2 for a, b in zip(outputs, wanted, strict=True)]
    assert report["loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("high", r"x\.tsv: row 3: the score is 'high'; a finite number"),
        ("inf", r"x\.tsv: row 3: the score is 'inf'; a finite number"),
        ("1_0", r"x\.tsv: row 3: the score is '1_0'; a finite number"),
        ("\u0661", r"x\.tsv: row 3: the score is '.'; a finite number"),  # a digit of Arabic
        ("nan", r"x\.tsv: row 3: the score is missing"),
        ("", r"x\.tsv: row 3: the score is missing"),
    ],
)
def test_scores_must_be_numbers(score: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "text1 | text2 | score", "a | b | 1.5", f"a | b | {score}")
    with pytest.raises(FormatError, match=message):
        TEXT_SIMILARITY.read(path, None, "test", None)


def test_similarity_needs_one_output(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "text1 | text2 | score", "a | b | 1.5")
    corpus = TEXT_SIMILARITY.read(path, None, "test", None)
    with pytest.raises(MismatchError, match="the model has 2 outputs"):
        TEXT_SIMILARITY.dataset(corpus, tiny_tasks.checkpoint("text_classification"))
