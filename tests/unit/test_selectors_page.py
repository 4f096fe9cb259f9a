"""The page of selectors: rows of several files, verdicts, what was to be reached."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import selectors_page, train_permuted
from benchmarks.selectors_page import acceptance, merge, permuted_section, table_of, verdict

DENSE = {"name": "accuracy", "value": 94.0, "signature": "a|b", "loss": 0.2}
FACTS = {
    "cpu": "Some CPU", "cores": 2, "memory_gb": 8, "gpu": None, "versions": {"torch": "2.6"},
    "commit": None, "is_changed": None, "date": "2026-01-01",
}  # fmt: skip


def row(selector: str, allocation: str, corrector: str, score: float, **more: Any) -> Any:
    about = {"size": 0.7, "seed": 0, "rank_seconds": 2.0, **more}
    return {"selector": selector, "allocation": allocation, "corrector": corrector, "score": score,
            **about}  # fmt: skip


ROWS = [
    row("trajectory", "global", "none", 93.0),
    row("trajectory", "global", "tuned", 93.5),
    row("trajectory", "global", "ls", 93.25),
    row("l1", "global", "none", 80.0),
    row("l1", "uniform", "none", 85.0),
    row("l1", "uniform", "tuned", 84.0),
    row("l1", "uniform", "ls", 90.0),
    *(row("random", "uniform", "none", 60.0 + seed, seed=seed) for seed in (1, 2, 3)),
]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    parts = [ROWS[:3], ROWS[3:], []]
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, part in zip(paths, parts, strict=True):
        found = {"name": "permuted", "facts": FACTS, "rows": part, "seconds": 30.0}
        path.write_text(json.dumps(found | ({"dense": DENSE} if part else {})))
    return paths


def test_rows_of_one_model_come_together(files: list[Path]) -> None:
    found, facts, seconds = merge(files)
    assert [*found] == ["permuted"]
    assert (len(found["permuted"].rows), facts, seconds) == (len(ROWS), [FACTS], 60.0)


def test_seeds_are_averaged_and_what_is_missing_stays_empty(files: list[Path]) -> None:
    table = table_of(merge(files)[0]["permuted"])
    assert table.header[2:5] == ["70% pruned", "70% tuned masks", "70% refitted"]
    assert ["`random`", "uniform", "62.00", "", "", "2"] in table.rows
    assert ["`l1`", "global", "80.00", "", "", "2"] in table.rows


def test_tuned_masks_are_judged_where_all_was_measured(files: list[Path]) -> None:
    found = merge(files)[0]["permuted"]
    assert "the best of the three in 1 of 2 cases, by 0.25 at most" in verdict(found)
    found.dense["name"] = "perplexity"  # where less is better
    assert "the best of the three in 1 of 2 cases, by 1.00 at most" in verdict(found)


def test_what_was_to_be_reached_is_against_the_better_l1(files: list[Path]) -> None:
    table = acceptance(merge(files)[0]["permuted"])
    assert table.rows == [["70%", "93.00", "1.00", "1.5", "85.00", "8.00", "5"]]


def test_a_page_is_made_of_whatever_there_is(files: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = [*map(str, files), "-o", str(tmp_path / "out"), "--page", str(page)]
    done = CliRunner().invoke(selectors_page.main, words, catch_exceptions=False)
    assert done.exit_code == 0
    text = page.read_text()
    assert "<!-- benchmark permuted -->" in text
    assert "benchmark selectors" not in text
    assert (tmp_path / "benchmark_permuted.png").read_bytes().startswith(b"\x89PNG")
    assert permuted_section(merge(files)[0]).figures["ran"][0]["method"] == "ranked"


def test_a_window_is_permuted_and_nothing_else() -> None:
    words = train_permuted.words_of("A man in a red hat is running.\n")
    assert words == ["a", "man", "in", "a", "red", "hat", "is", "running"]
    draw, places = random.Random(0), set()
    for _ in range(200):
        changed = train_permuted.permuted(words, draw)
        other = [i for i, pair in enumerate(zip(words, changed, strict=True)) if len({*pair}) > 1]
        assert sorted(changed) == sorted(words)
        assert len(other) >= 2
        assert other[-1] - other[0] < train_permuted.WINDOW
        places.update(other)
    assert places == set(range(len(words)))


def test_examples_are_of_both_classes() -> None:
    captions = ["One two three four.", *(f"a b c d e{i}." for i in range(9))]
    tested = train_permuted.examples(captions, seed=0, trains=False)
    assert sorted(label for _, label in tested) == 5 * ["original"] + 5 * ["permuted"]
    trained = train_permuted.examples(captions, seed=0, trains=True)
    assert len(trained) == 9  # a caption as long as the window is left out
    assert trained == train_permuted.examples(captions, seed=0, trains=True)
    originals = {" ".join(train_permuted.words_of(caption)) for caption in captions}
    assert all((text in originals) == (label == "original") for text, label in tested + trained)
