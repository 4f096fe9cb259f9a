"""BLEU twice: by sacreBLEU, and as the thesis program measured it (torchtext)."""

import warnings
from collections.abc import Sequence
from typing import Any

from composable.errors import MismatchError
from composable.tasks.base import Score

RESAMPLES = 1000  # bootstrap samples of the sentences, sacreBLEU's default
MOST_RESAMPLED = 5000  # sentences


def sacrebleu_score(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Measure corpus BLEU with sacreBLEU's defaults (13a tokens, mixed case, one reference).

    Args:
        hypotheses: detokenised translations.
        references: one detokenised reference each, same order.

    Returns:
        BLEU from 0 to 100 with sacreBLEU's own signature, and sacreBLEU's bootstrap interval (up to
        `MOST_RESAMPLED` sentences: it holds all resamples in memory, 40 kB for each sentence).

    Raises:
        MismatchError: not one reference for each translation, or none at all.
    """
    import sacrebleu

    _check_pairs(hypotheses, references)
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    counts = {
        "matches": list(score.counts),
        "ngrams": list(score.totals),
        "hypothesis_tokens": int(score.sys_len),
        "reference_tokens": int(score.ref_len),
        "brevity_penalty": float(score.bp),
    }
    interval = None
    if len(hypotheses) <= MOST_RESAMPLED:  # by another object: the first one's signature would grow
        resampled = sacrebleu.BLEU().corpus_score(
            list(hypotheses), [list(references)], n_bootstrap=RESAMPLES
        )
        interval = float(resampled._ci)
    return Score("BLEU", float(score.score), str(metric.get_signature()), counts, interval)


def thesis_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Measure BLEU as the thesis program did; comparable with its figures, not with sacreBLEU.

    Tokens are what whitespace separates, so "Hund." and "Hund" differ; there is no smoothing:
    without a single matching 4-gram the score is 0.

    Arguments and errors are those of `sacrebleu_score`.

    Returns:
        100 times the result of torchtext's `bleu_score`.

    Source: torchtext 0.6.0, torchtext.data.metrics.bleu_score.
    """
    _check_pairs(hypotheses, references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchtext is old: its sources warn when compiled
        import torchtext
        from torchtext.data.metrics import bleu_score
    candidates = [line.split() for line in hypotheses]
    value = 100 * bleu_score(candidates, [[line.split()] for line in references])
    settings = "torchtext.bleu_score|nrefs:1|case:mixed|tok:whitespace|smooth:none"
    return Score("BLEU (thesis)", float(value), f"{settings}|version:{torchtext.__version__}")


def _check_pairs(hypotheses: Sequence[Any], references: Sequence[Any]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise MismatchError(
            f"BLEU: {len(hypotheses)} translations and {len(references)} references; one "
            "reference for each translation was expected, and at least one."
        )
