"""The metrics' formulas against scikit-learn and scipy, and SQuAD's against cases by its rules."""

import math

import numpy as np
import pytest
import torch

from composable.tasks import scores

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a dev requirement")
stats = pytest.importorskip("scipy.stats", reason="scipy is a dev requirement")


def draw(classes: int, seed: int, samples: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    is_right = generator.random(samples) < 0.6
    return np.where(is_right, labels, generator.integers(0, classes, samples)), labels


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_classes_against_scikit_learn(classes: int, seed: int) -> None:
    predicted, labels = draw(classes, seed)
    assert scores.accuracy(predicted, labels) == pytest.approx(
        sklearn.accuracy_score(labels, predicted), abs=1e-12
    )
    assert scores.matthews(predicted, labels) == pytest.approx(
        sklearn.matthews_corrcoef(labels, predicted), abs=1e-12
    )
    assert scores.macro_f1(predicted, labels) == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro"), abs=1e-12
    )
    for positive in range(classes):
        expected = sklearn.f1_score(labels == positive, predicted == positive)
        assert scores.f1(predicted, labels, positive) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_counts_classes_that_are_only_predicted() -> None:
    predicted, labels = [0, 2, 1], [0, 1, 1]
    expected = sklearn.f1_score(labels, predicted, average="macro", zero_division=0)
    assert scores.macro_f1(predicted, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "labels"), [([0, 0, 0], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([0, 0], [0, 0])]
)
def test_one_class_alone_has_no_correlation(predicted: list[int], labels: list[int]) -> None:
    assert scores.matthews(predicted, labels) == 0
    assert scores.pearson(predicted, labels) == 0
    assert scores.spearman(predicted, labels) == 0


def test_f1_of_an_absent_class_is_zero() -> None:
    assert scores.f1([0, 0], [0, 0]) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_correlations_against_scipy(seed: int, step: float) -> None:
    """With a step there are many equal values, as among the scores of STS-B."""
    generator = np.random.default_rng(seed)
    x = generator.random(300) * 5
    y = x + generator.normal(0, 2, 300)
    if step:
        x, y = np.round(x / step) * step, np.round(y / step) * step
    assert scores.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert scores.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_against_scikit_learn(k: int) -> None:
    generator = np.random.default_rng(k)
    logits, labels = generator.normal(size=(100, 7)), generator.integers(0, 7, 100)
    expected = sklearn.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
    assert scores.top_k(logits, labels, k) == pytest.approx(expected)


def test_top_1_of_equal_logits_is_what_argmax_says() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    assert scores.top_k(logits.numpy(), [0, 1], 1) == 1
    assert scores.top_k(logits.numpy(), [1, 2], 1) == 0
    assert scores.top_k(logits.numpy(), [1, 2], 2) == 1


def test_perplexity_and_bits() -> None:
    assert scores.perplexity(math.log(17)) == pytest.approx(17)
    assert math.isfinite(scores.perplexity(1e9))
    # 8 equally likely bytes, a token each: 3 bits
    assert scores.bits_per_byte(math.log(8), 10, 10) == pytest.approx(3)
    # the same in tokens of two bytes
    assert scores.bits_per_byte(math.log(64), 5, 10) == pytest.approx(3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a  man, an apple\tand the\n dog ", "man apple and dog"),
        ("Anthem", "anthem"),
        ("U.S.A.", "usa"),
        ("the-a", "thea"),  # punctuation goes first, so that no article is left
        ("a", ""),
        ("«a»", "« »"),  # only ASCII punctuation goes
    ],
)
def test_answers_are_normalised(text: str, expected: str) -> None:
    assert scores.normalised(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Normans", ["Normans"], 1, 1),
        ("Normans in France", ["the Normans", "France"], 0, 0.5),  # best: 1 of 3 and 1 of 1
        ("10th century", ["10th and 11th centuries", "in the 10th century"], 0, 0.8),
        ("red red blue", ["red blue blue"], 0, 2 / 3),  # each word counts as often as in both
        ("nothing", ["something"], 0, 0),
        ("", [""], 1, 1),
        ("a word", [""], 0, 0),
        ("", ["a word"], 0, 0),
    ],
)
def test_squad(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    assert scores.exact_match(prediction, answers) == exact
    assert scores.word_f1(prediction, answers) == pytest.approx(f1)


def test_versions_of_squad_differ_where_nothing_is_left_of_an_answer() -> None:
    """Version 1.1 finds no word in common, 2.0 takes it for no answer."""
    assert scores.exact_match("the", ["A"]) == 1
    assert scores.word_f1("the", ["A"], is_empty_right=False) == 0
    assert scores.word_f1("the", ["A"], is_empty_right=True) == 1


def test_per_cent() -> None:
    assert scores.per_cent([1, 0, 0.5, 0.5]) == 50
