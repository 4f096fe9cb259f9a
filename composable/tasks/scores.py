"""The formulas of the metrics: accuracy, F1, Matthews, correlations, perplexity, SQuAD, top-k."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: The largest loss of which the exponential is a number.
HIGHEST = 700.0


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions that are the label, from 0 to 1."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted: ArrayLike, labels: ArrayLike, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of one class, from 0 to 1; class ids are (samples,).

    It is 2 TP / (2 TP + FP + FN), or 0 where the class is neither there nor predicted.
    """
    said, true = np.asarray(predicted) == positive, np.asarray(labels) == positive
    both, either = int((said & true).sum()), int(said.sum() + true.sum())
    return 2 * both / either if either else 0.0


def macro_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `f1` over all classes that are there or are predicted, each with the same weight."""
    classes = np.union1d(np.asarray(predicted), np.asarray(labels))
    return float(np.mean([f1(predicted, labels, int(each)) for each in classes]))


def matthews(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of any number of classes, from -1 to 1.

    With s samples of which c are right, p_k predicted and t_k true ones of class k:
    (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)); 0 where one class takes all.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
    coefficient".
    """
    said, true = np.asarray(predicted), np.asarray(labels)
    classes, total = np.union1d(said, true), len(true)
    counts = [(int((said == each).sum()), int((true == each).sum())) for each in classes]
    above = int((said == true).sum()) * total - sum(p * t for p, t in counts)
    below = math.prod(total**2 - sum(count[i] ** 2 for count in counts) for i in (0, 1))
    return above / math.sqrt(below) if below else 0.0


def pearson(first: ArrayLike, second: ArrayLike) -> float:
    """Linear correlation, from -1 to 1; 0 where one side is constant."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (first, second))
    x, y = x - x.mean(), y - y.mean()
    below = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / below if below else 0.0


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Correlation of the ranks, from -1 to 1; equal values share the mean of their ranks."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def perplexity(loss: float) -> float:
    """Exponential of the mean loss in nats, which is cut off at `HIGHEST`."""
    return math.exp(min(loss, HIGHEST))


def bits_per_byte(loss: float, tokens: int, count: int) -> float:
    """Bits for a byte of text, were the mean loss in nats that of every token.

    Of the whole text there are so many `tokens`, also those that nothing predicts, and `count`
    bytes.
    """
    return loss * tokens / count / math.log(2)


def top_k(logits: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Share of samples with the label, (samples,), among the k highest logits, from 0 to 1.

    Of equal logits, (samples, classes), that of the lower class counts as higher.
    """
    scores, true = np.asarray(logits), np.asarray(labels)[:, None]
    own = np.take_along_axis(scores, true, 1)
    is_before = np.arange(scores.shape[1]) < true
    higher = ((scores > own) | ((scores == own) & is_before)).sum(1)
    return float(np.mean(higher < k))


def normalised(answer: str) -> str:
    """Lower an answer's case, take out ASCII punctuation and articles, even out its white space.

    Source: evaluate-v1.1.py and evaluate-v2.0.py of SQuAD, normalize_answer.
    """
    kept = "".join(each for each in answer.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where a prediction is one of the answers, after `normalised`; else 0."""
    return float(any(normalised(prediction) == normalised(answer) for answer in answers))


def word_f1(prediction: str, answers: Sequence[str], is_empty_right: bool = True) -> float:
    """Harmonic mean of precision and recall of words, against the best of the answers.

    Args:
        prediction: the text.
        answers: at least one; [""] where there is none.
        is_empty_right: whether nothing is right where nothing is wanted: yes in version 2.0 of
            SQuAD, no in 1.1, where it can happen to answers that consist of an article.

    Source: evaluate-v1.1.py, f1_score; evaluate-v2.0.py, compute_f1.
    """
    return max(_shared_words(prediction, answer, is_empty_right) for answer in answers)


def _shared_words(prediction: str, answer: str, is_empty_right: bool) -> float:
    said, wanted = (normalised(text).split() for text in (prediction, answer))
    if is_empty_right and not (said and wanted):
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def per_cent(values: Sequence[Any]) -> float:
    """Return 100 times the mean."""
    return 100 * math.fsum(values) / len(values)
