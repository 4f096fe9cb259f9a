"""evaluate.py and report.py on the models of all tasks: reports, options, files, usage errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import evaluate
import report
from composable import tasks
from composable.models import checkpoint
from tests import tiny, tiny_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file and a data folder for every task."""
    place = tmp_path_factory.mktemp("evaluate")
    for task in tiny_tasks.TASKS:
        tiny_tasks.data(task, place / task)
        checkpoint.save(place / f"{task}.pth", tiny_tasks.checkpoint(task))
    tiny.corpus(place / "translation", pairs=12)
    checkpoint.save(place / "translation.pth", tiny.checkpoint())
    return place


def run(command: Any, *arguments: Any) -> Result:
    return CliRunner().invoke(command, ["-q", *map(str, arguments)])


def evaluated(folder: Path, task: str, *arguments: Any) -> Any:
    files = ("-m", folder / f"{task}.pth", "--data", folder / task)
    result = run(evaluate.main, *files, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_reports_are_complete(folder: Path, task: str, tmp_path: Path) -> None:
    lines, written = tmp_path / "lines.txt", tmp_path / "eval.json"
    found = evaluated(folder, task, "-o", written, "--predictions", lines)
    it, loaded = tasks.by_name(task), checkpoint.load(folder / f"{task}.pth")
    assert (found["task"], found["main"]) == (task, it.main)
    assert found["fingerprint"] == loaded.fingerprint
    assert len(lines.read_text().splitlines()) == found["samples"]
    expected, quality = it.evaluate(
        loaded,
        it.read(str(folder / task), None, "test", None),
        {"device": "cpu", "dtype": "float32"},
    )
    assert lines.read_text().splitlines() == expected
    assert found[it.main] == quality[it.main]
    assert found["macs_per_token"] > 0
    length = it.length(loaded)
    is_decoder = task == "language_modeling"
    assert (found["source_length"], found["target_length"]) == (
        (0, length) if is_decoder else (length, 0)
    )
    assert "num_beams" not in found["settings"]
    assert set(found["versions"]) == {"composable", "torch", "transformers"}
    found.pop("seconds")
    assert json.loads(written.read_text()) == found


def test_translation_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.de", tmp_path / "new.de"
    found = evaluated(folder, "translation", "--predictions", old, "--length", 4)
    evaluated(folder, "translation", "--predictions", new)
    assert old.read_text() == new.read_text()
    assert (found["main"], found["settings"]["num_beams"]) == ("bleu", 1)
    assert (found["source_length"], found["target_length"]) == (4, 4)
    assert "sacrebleu" in found["versions"]


def test_options_of_a_task(folder: Path) -> None:
    found = evaluated(folder, "language_modeling", "--max-length", 16)
    assert found["window"] == found["settings"]["max_length"] == found["target_length"] == 16
    given = evaluated(folder, "language_modeling", "--length", 5)
    assert (given["source_length"], given["target_length"]) == (0, 5)
    found = evaluated(folder, "question_answering", "--split", "valid")
    assert found["data"]["file"] == "dev-v1.1.json"


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("text_classification", "--num-beams"),
        ("text_similarity", "--max-length"),
        ("question_answering", "--max-length"),
        ("language_modeling", "--num-beams"),
        ("image_classification", "--max-length"),
    ],
)
def test_options_of_other_tasks_are_usage_errors(folder: Path, task: str, option: str) -> None:
    result = run(evaluate.main, "-m", folder / f"{task}.pth", "--data", folder / task, option, 2)
    assert result.exit_code == 2
    assert f"Error: {option} has no effect on {task}, the task of this model" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_data_of_translation_is_not_taken(folder: Path, task: str) -> None:
    for data in ("embedded", "multi30k"):
        result = run(evaluate.main, "-m", folder / f"{task}.pth", "--data", data)
        assert result.exit_code == 1
        assert f"data {data}: no such file or folder; expected a " in result.stderr
    result = run(evaluate.main, "-m", folder / f"{task}.pth")
    assert "no data: the model file names none, and neither data nor " in result.stderr
    assert result.stderr.count("\n") == 1


# ---- report.py


def test_tables_show_the_main_score(folder: Path, tmp_path: Path) -> None:
    """Of two stages that differ in nothing: the columns are there, the numbers are equal."""
    for task in tiny_tasks.TASKS:
        out = tmp_path / task
        out.mkdir()
        for name in ("dense", "pruned_0", "block_0", "model_0"):
            evaluated(folder, task, "-o", out / f"eval_{name}.json")
        result = run(report.main, "-d", out)
        assert result.exit_code == 0, result.output
        dense = json.loads((out / "eval_dense.json").read_text())
        main = dense[dense["main"]]
        head, _, first, second = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in (out / "report.md").read_text().splitlines()
            if line.startswith("|")
        ]
        assert head[1] == f"{main['name']} dense"
        assert first[1] == second[2] == second[4] == f"{main['value']:.2f}"
        row = json.loads(result.stdout)["rows"][1]
        assert row[f"{dense['main']}_model"] == main["value"]
        text = (out / "report.md").read_text()
        assert f"{dense['samples']} samples of" in text
        assert "beam" not in text
        assert f"{dense['source_length'] + dense['target_length']} tokens;" in text


def test_evaluations_of_two_tasks_are_not_compared(folder: Path, tmp_path: Path) -> None:
    evaluated(folder, "text_similarity", "-o", tmp_path / "eval_dense.json")
    evaluated(folder, "text_classification", "-o", tmp_path / "eval_pruned_0.json")
    result = run(report.main, "-d", tmp_path)
    assert result.exit_code == 1
    assert "the score is accuracy, eval_dense.json has spearman; evaluate both alike" in (
        result.stderr
    )
