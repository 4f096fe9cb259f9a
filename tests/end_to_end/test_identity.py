"""What is reused and what is not: data by whatever path, measured or read, seen in another way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from tests import tiny
from tests.end_to_end.conftest import call, files_in


def ok(folder: Path, script: str, *args: Any) -> dict[str, Any]:
    ended = call(script, *args, cwd=folder)
    assert ended.code == 0, ended.err
    report: dict[str, Any] = json.loads(ended.out)
    return report


def chain(folder: Path, spelled: list[str]) -> dict[str, bytes]:
    """Run all commands that read data, each with the next spelling of its path; their outputs."""
    folder.mkdir()
    made = tiny.checkpoint()
    checkpoint.save(folder / "model.pth", made)
    ways = iter(spelled * 9)
    tuned, few = ("--epochs", 1, "--device", "cpu"), ("--limit", 2, "--max-length", 4)
    measured = ("--data", next(ways))
    ok(folder, "rank_importance.py", "-m", "model.pth", "--method", "stat", *measured)
    given = ("--scores", "scores.npz", "--sizes", 0.7)
    ok(folder, "config_generator.py", "-m", "model.pth", *given)
    ok(folder, "prune_scheme_generator.py")
    for test in ("measured.pth", "read.pth"):
        measured = ("--data", next(ways))
        ok(folder, "prune.py", "-m", "model.pth", "-p", test, "--calibration", "c.npy", *measured)
    read = (folder / "read.pth").read_bytes()
    assert (folder / "measured.pth").read_bytes() == read
    refit = ("block_level_finetuning.py", "-m", "model.pth", "--solver", "ls")
    ok(folder, *refit, "--data", next(ways))
    whole = ("model_level_finetuning.py", "-m", "model.pth", "-n", 0, "-o", "tuned.pth", *tuned)
    ok(folder, *whole, "--data", next(ways))
    ok(folder, "evaluate.py", "-m", "tuned.pth", "--data", next(ways), "-o", "scores.json", *few)
    kept = [name for name in files_in(folder) if not name.endswith((".csv", ".png"))]
    found = {name: (folder / name).read_bytes() for name in kept}
    report = json.loads(found.pop("scores.json"))
    for key in ("sentences_per_second", "seconds"):
        report.pop(key, None)
    return found | {"scores.json": json.dumps(report).encode()}


def test_the_spelling_of_a_path_changes_no_byte(tmp_path: Path) -> None:
    data = tiny.corpus(tmp_path / "data", pairs=16)
    (tmp_path / "link").symlink_to(data, target_is_directory=True)
    first = chain(tmp_path / "first", [str(data)])
    spelled = ["../data", "../first/../data/", f"{tmp_path}/./data", "../link", "../link/"]
    assert sorted(first) == sorted(second := chain(tmp_path / "second", spelled))
    assert [name for name in first if first[name] != second[name]] == []


def added_token(made: Checkpoint) -> None:
    made.tokenizer.add_tokens(["runs in"])


def other_template(made: Checkpoint) -> None:
    made.tokenizer.chat_template = "{{ messages }}"


#: What may differ between two model files of the same weights, and the word for it.
CHANGES: dict[str, tuple[str, Callable[[Checkpoint], Any]]] = {
    "token": ("tokenizer", added_token),
    "template": ("tokenizer", other_template),
    "prefix": ("prefix", lambda made: made.info.update(prefix="the dog ")),
    "length": ("max_length", lambda made: made.info.update(max_length=5)),
}


@pytest.fixture(scope="module")
def made_by_one_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is made with one model file, and further model files of the same weights."""
    folder = tmp_path_factory.mktemp("identity")
    tiny.corpus(folder / "data")
    for name, change in {
        "model": lambda _: None,
        **{k: v for k, (_, v) in CHANGES.items()},
    }.items():
        made = tiny.checkpoint()
        change(made)
        checkpoint.save(folder / f"{name}.pth", made)
    data = ("--data", "data")
    ok(folder, "rank_importance.py", "-m", "model.pth", "--method", "stat", *data)
    given = ("--scores", "scores.npz", "--sizes", 0.7)
    ok(folder, "config_generator.py", "-m", "model.pth", *given)
    ok(folder, "prune_scheme_generator.py")
    ok(folder, "prune.py", "-m", "model.pth", *data)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_composed_across_a_change(name: str, made_by_one_model: Path) -> None:
    """The weights, and so the fingerprint, are the same; the texts would not be."""
    folder, model = made_by_one_model, f"{name}.pth"
    before = {it: (folder / it).read_bytes() for it in ("conf.json", "modules.npy")}
    tuned = ("block_level_finetuning.py", "-m", model, "--data", "data", "--epochs", 1)
    scored = (
        "--scores", "scores.npz", "--attention", "ranked", "--ffn", "ranked", "-o", "x.npy",
    )  # fmt: skip
    commands = {
        "modules.npy": [("compose_model.py", "-m", model, "-p", "modules.npy"), tuned],
        "scores.npz": [
            ("config_generator.py", "-m", model, "--scores", "scores.npz", "--sizes", 0.7),
            ("prune.py", "-m", model, *scored),
        ],
    }
    for file, some in commands.items():
        for script, *args in some:
            ended = call(script, *args, cwd=folder)
            assert ended.code == 1, (script, ended.out)
            said = f"Error: {file}: made with another {CHANGES[name][0]} than that of this model; "
            assert ended.err.startswith(said), (script, ended.err)
    assert {it: (folder / it).read_bytes() for it in before} == before
    calibrated = call("prune.py", "-m", model, "--data", "data", "-o", "x.npy", cwd=folder)
    if name in ("template", "length"):  # of no influence on what this model sees
        assert calibrated.code == 0, calibrated.err
    else:
        assert "measured on other texts, or on texts that were tokenised" in calibrated.err


def test_a_tokenizer_stays_as_it_was_read(tmp_path: Path) -> None:
    """Not as it was used last: truncated by a training, padded by an earlier program."""
    made = tiny.checkpoint()
    inner: PreTrainedTokenizerFast = made.tokenizer
    inner.backend_tokenizer.enable_padding(length=7)
    checkpoint.save(tmp_path / "model.pth", made)
    before = checkpoint.load(tmp_path / "model.pth").stored_tokenizer
    assert json.loads(before["tokenizer.json"].numpy().tobytes())["padding"]["strategy"]
    tiny.corpus(tmp_path / "data")
    args = ("-m", "model.pth", "-o", "tuned.pth", "--data", "data", "--epochs", 1)
    ok(tmp_path, "baseline_finetuning.py", *args, "--device", "cpu")
    after = checkpoint.load(tmp_path / "tuned.pth").stored_tokenizer
    assert before.keys() == after.keys()
    assert [name for name in before if not before[name].equal(after[name])] == []
