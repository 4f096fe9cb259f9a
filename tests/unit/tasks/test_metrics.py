"""BLEU against values by hand, sacreBLEU's command line and torchtext's own documentation."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

from composable.errors import MismatchError
from composable.tasks import metrics
from composable.tasks.base import Score
from tests.paths import ROOT

# 5 words each, the last one differs: 4/5 words, 3/4 pairs, 2/3 triples, 1/2 quadruples.
HYPOTHESIS, REFERENCE = "ein hund rennt im gras", "ein hund rennt im schnee"
BY_HAND = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25

HYPOTHESES = [
    "Ein Hund rennt über die grüne Wiese.",
    "Zwei Männer sitzen auf einer Bank, im Park.",
    "Eine Frau liest.",
]
REFERENCES = [
    "Ein brauner Hund rennt über die Wiese.",
    "Zwei Männer sitzen auf einer Bank im Park.",
    "Eine alte Frau liest ein Buch.",
]


def test_sacrebleu_by_hand() -> None:
    score = metrics.sacrebleu_score([HYPOTHESIS], [REFERENCE])
    assert score.value == pytest.approx(BY_HAND, abs=1e-9)
    assert score.counts["matches"] == [4, 3, 2, 1]
    assert score.counts["ngrams"] == [5, 4, 3, 2]


def test_thesis_bleu_by_hand() -> None:
    score = metrics.thesis_bleu([HYPOTHESIS], [REFERENCE])
    assert score.value == pytest.approx(BY_HAND, abs=1e-4)  # torchtext computes in float32


@pytest.mark.parametrize("measure", [metrics.sacrebleu_score, metrics.thesis_bleu])
def test_short_translations_are_punished(measure) -> None:
    """Two words less than the reference: every n-gram matches, the brevity penalty stays."""
    score = measure(["a b c d e f"], ["a b c d e f g h"])
    assert score.value == pytest.approx(100 * math.exp(1 - 8 / 6), abs=1e-4)


def test_order_of_the_pairs_is_hypothesis_first() -> None:
    assert metrics.sacrebleu_score(["a b c d e f"], ["a b c d e f g h"]).value < 75
    assert metrics.sacrebleu_score(["a b c d e f g h"], ["a b c d e f"]).value < 75
    assert (
        metrics.sacrebleu_score(["a b c d e f"], ["a b c d e f g h"]).counts["hypothesis_tokens"]
        == 6
    )


def test_sacrebleu_equals_its_command_line(tmp_path: Path) -> None:
    (tmp_path / "hypotheses").write_text("\n".join(HYPOTHESES) + "\n", encoding="utf-8")
    (tmp_path / "references").write_text("\n".join(REFERENCES) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "hypotheses", "-w", "10"]
    answer = subprocess.run(
        [*command, "-m", "bleu"], cwd=tmp_path, capture_output=True, check=True, text=True
    )
    shown = json.loads(answer.stdout)
    score = metrics.sacrebleu_score(HYPOTHESES, REFERENCES)
    assert score.value == pytest.approx(shown["score"], abs=1e-9)
    assert score.signature == shown["signature"]
    assert score.name == shown["name"]


def test_the_interval_is_that_of_sacrebleus_command(tmp_path: Path) -> None:
    """The command resamples, too; the score and its signature stay those without it."""
    (tmp_path / "references").write_text("\n".join(REFERENCES) + "\n", encoding="utf-8")
    (tmp_path / "hypotheses").write_text("\n".join(HYPOTHESES) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "hypotheses", "-m", "bleu"]
    answer = subprocess.run(
        [*command, "--confidence", "-w", "4"], cwd=tmp_path, capture_output=True, check=True
    )
    score = metrics.sacrebleu_score(HYPOTHESES, REFERENCES)
    assert json.loads(answer.stdout)["confidence_var"] == pytest.approx(score.interval, abs=1e-4)
    assert score.to_json()["interval_95"] == pytest.approx(score.interval, abs=1e-4)
    assert "bs:" not in score.signature


def test_corpora_too_large_for_resampling_have_no_interval(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "MOST_RESAMPLED", len(HYPOTHESES) - 1)
    score = metrics.sacrebleu_score(HYPOTHESES, REFERENCES)
    assert score.interval is None
    assert "interval_95" not in score.to_json()


def test_signatures_name_versions() -> None:
    assert metrics.sacrebleu_score(["a"], ["a"]).signature == (
        f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    assert "tok:whitespace" in metrics.thesis_bleu(["a"], ["a"]).signature
    assert metrics.thesis_bleu(["a"], ["a"]).signature.endswith("version:0.6.0")


def test_the_two_scores_differ_in_tokens() -> None:
    """Only sacreBLEU splits the full stop off: here one token less matches for the thesis."""
    lines, references = ["ein hund rennt im gras."], ["ein hund rennt im gras ."]
    assert metrics.sacrebleu_score(lines, references).value == pytest.approx(100)
    assert metrics.thesis_bleu(lines, references).value < 100


@pytest.mark.parametrize("hypothesis", ["", "   ", "ganz anders"])
def test_nothing_in_common_is_zero(hypothesis: str) -> None:
    assert metrics.thesis_bleu([hypothesis], [REFERENCE]).value == 0.0
    assert metrics.sacrebleu_score([hypothesis], [REFERENCE]).value == 0.0


@pytest.mark.parametrize("measure", [metrics.sacrebleu_score, metrics.thesis_bleu])
@pytest.mark.parametrize(("lines", "references"), [(["a"], ["a", "b"]), ([], [])])
def test_counts_must_agree(measure, lines: list[str], references: list[str]) -> None:
    with pytest.raises(
        MismatchError, match=f"{len(lines)} translations and {len(references)} references"
    ):
        measure(lines, references)


def test_torchtext_is_imported_quietly(tmp_path: Path) -> None:
    """Sources are compiled anew here, with all warnings on: nothing may reach the user."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = "from composable.tasks.metrics import thesis_bleu; thesis_bleu(['a'], ['a'])"
    answer = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    assert "torchtext" not in answer.stderr
    assert answer.stdout == ""


def test_score_as_json() -> None:
    assert Score("BLEU", 12.345678, "sig").to_json() == {
        "name": "BLEU",
        "value": 12.3457,
        "signature": "sig",
    }
    assert Score("BLEU", 1.0, "s", {"n": 2}).to_json()["counts"] == {"n": 2}
    assert str(Score("BLEU", 12.3456, "sig")) == "BLEU = 12.35 (sig)"
