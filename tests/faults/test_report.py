"""The page of the fault trials: counted right, and never written from a part of a run."""

from pathlib import Path

import pytest

from tests.end_to_end.forked import Ended
from tests.faults import report
from tests.faults.runner import OUTCOMES, Trial, judge


def test_a_part_of_a_run_is_no_report(tmp_path: Path) -> None:
    some = [Trial("model.pth", "random damage", {}, "refused")] * 250
    assert "conf.json: random damage" in report.missing(some)
    assert "model.pth: random damage" not in report.missing(some)
    assert not report.write(some, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_rows_count_outcomes() -> None:
    made = [Trial(".gguf", "crafted content", {}, outcome) for outcome in OUTCOMES[:3]]
    assert "| .gguf | 3 | 1 | 1 | 1 | 0 | 0 | 0 | of 160: 8 tracebacks |" in report.text(made)


@pytest.mark.parametrize(
    ("code", "err", "found", "outcome"),
    [
        (1, "log\nError: x is y; do z.\n", "a", "refused"),
        (2, "Error: no such option (see --help)\n", "a", "refused"),
        (1, "something else\n", "a", "traceback"),
        (1, "Error: \x1b[31mred\n", "a", "traceback"),
        (1, f"Error: {'x' * 2000}\n", "a", "traceback"),
        (1, 'Traceback (most recent call last):\n  File "a"\nKeyError: 1\n', "a", "traceback"),
        (1, "Error: out of memory; use smaller batches\n", "a", "hang"),
        (0, "", "a", "survived"),
        (0, "", "b", "another result"),
        (-9, "", "a", "hang"),
        (-14, "", "a", "hang"),
        (-11, "", "a", "traceback"),
    ],
)
def test_how_a_process_ended(code: int, err: str, found: str, outcome: str) -> None:
    assert judge(Ended(code, "", err), found, "a", is_other_sound=False)[0] == outcome


def test_another_sound_file_is_another_file() -> None:
    assert judge(Ended(0, "", ""), "b", "a", is_other_sound=True)[0] == "another file"
