"""Bad input through every script: one line on stderr, exit 1 (2: usage), no file, no traceback."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from composable import files
from composable.errors import UserError
from composable.formats import config, stats_file
from composable.formats.bundle import open_bundle
from composable.models import checkpoint
from composable.models.hub import resolve_model
from composable.models.structure import Edit
from composable.reports.summary import read_evaluation
from composable.training import callbacks
from tests import tiny
from tests.end_to_end.conftest import Ended, Workshop, call, files_in, save_model
from tests.paths import ROOT

#: A command of every script that works: each case below changes one thing in it. {out} is the
#: folder in which nothing may be written; the evaluations that report.py reads lie there.
COMMANDS: dict[str, dict[str, str]] = {
    "download_model.py": {"-m": "{pretrained}", "-o": "{out}/model.pth"},
    "config_generator.py": {"-m": "{model}", "-o": "{out}/conf.json"},
    "prune_scheme_generator.py": {"-i": "{conf}", "-o": "{out}/conf_prune.json"},
    "prune.py": {
        "-m": "{model}", "-c": "{scheme}", "-o": "{out}/modules.npy", "--attention": "head_l1",
    },
    "compose_model.py": {
        "-m": "{model}", "-p": "{modules}", "-c": "{conf}", "-n": "0", "-o": "{out}/composed.pth",
    },
    "baseline_finetuning.py": {
        "-m": "{composed}", "-o": "{out}/baseline.pth", "--stats": "{out}/stats.csv",
        "--epochs": "1", "--limit": "8", "--workdir": "{out}",
    },
    "block_level_finetuning.py": {
        "-m": "{model}", "-p": "{modules}", "-o": "{out}/tuned.npy", "--stats": "{out}/stats.csv",
        "--epochs": "1", "--limit": "8", "--workdir": "{out}",
        "--solver": "grad",
    },
    "model_level_finetuning.py": {
        "-m": "{model}", "-p": "{modules}", "-c": "{conf}", "-n": "0", "-o": "{out}/tuned.pth",
        "--stats": "{out}/stats.csv", "--epochs": "1", "--limit": "8",
        "--workdir": "{out}",
    },
    "evaluate.py": {"-m": "{composed}", "-o": "{out}/eval.json", "--limit": "4"},
    "plot_loss.py": {"": "{stats}", "-o": "{out}/loss.png"},
    "report.py": {"-d": "{out}"},
}  # fmt: skip
TRAININGS = ("baseline_finetuning.py", "block_level_finetuning.py", "model_level_finetuning.py")
COMPOSING = ("compose_model.py", "model_level_finetuning.py")
ATTENTION = "encoder.block.0.layer.0.SelfAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.fixture(scope="module")
def places(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands in braces in the commands: good files, and all kinds of wrong ones."""
    folder = tmp_path_factory.mktemp("wrong")
    found: dict[str, Any] = {**vars(workshop), "nowhere": folder / "nowhere" / "file"}
    found["empty"] = folder / "empty"
    found["text"] = folder / "text"
    found["json"] = folder / "some.json"
    found["folder"] = folder / "folder"
    found["below_a_file"] = folder / "text" / "file"
    found["empty"].write_bytes(b"")
    found["text"].write_text("no such thing\n")
    found["json"].write_text('{"some": "thing"}')
    found["folder"].mkdir()
    found["other_conf"], found["deep"] = folder / "other_conf.json", folder / "deep.pth"
    save_model(found["deep"], workshop.corpus, num_layers=3)
    run = call("config_generator.py", "-m", found["deep"], "-o", found["other_conf"], cwd=folder)
    assert run.code == 0
    found["pretrained"] = folder / "pretrained"
    dense = checkpoint.load(workshop.model)
    dense.model.save_pretrained(found["pretrained"])
    dense.tokenizer.save_pretrained(found["pretrained"])
    found["evaluations"] = folder / "evaluations"
    found["evaluations"].mkdir()
    for name in ("dense", "pruned_0", "block_0", "model_0"):
        path = found["evaluations"] / f"eval_{name}.json"
        model = workshop.model if name == "dense" else workshop.composed
        run = call("evaluate.py", "-m", model, "-o", path, "--limit", 2, cwd=folder)
        assert run.code == 0
    return {name: str(path) for name, path in found.items()}


@pytest.fixture
def out(places: dict[str, str], tmp_path: Path) -> Path:
    shutil.copytree(places["evaluations"], tmp_path / "out")
    return tmp_path / "out"


def run(
    script: str, changes: dict[str, str], places: dict[str, str], out: Path, *more: str
) -> Ended:
    """Call a script with its working command, in which options are changed; "" takes one out."""
    options = {name: value for name, value in {**COMMANDS[script], **changes}.items() if value}
    words = [word for pair in options.items() for word in pair if word]
    words = [word.format(**places, out=out) for word in words]
    return call(script, "-q", *words, *more, cwd=out.parent)


def assert_refused(found: Ended, out: Path, *needles: str, code: int = 1) -> None:
    assert (found.code, found.out) == (code, ""), found
    assert found.err.startswith("Error: ")
    assert found.err.count("\n") == 1, found.err
    assert found.err.endswith("\n")
    assert "Traceback" not in found.err
    assert [needle for needle in needles if needle not in found.err] == [], found.err
    assert made_in(out) == []


def made_in(out: Path) -> list[str]:
    """All files in the folder but the evaluations that report.py reads."""
    return [name for name in files_in(out) if not name.startswith("eval_")]


@pytest.mark.parametrize("script", COMMANDS)
def test_the_commands_work(script: str, places: dict[str, str], out: Path) -> None:
    """Else the cases below would be refused for another reason."""
    found = run(script, {}, places, out)
    assert (found.code, found.err if script != "report.py" else "") == (0, "")
    assert made_in(out) != []


# --- files ---------------------------------------------------------------------------------------

#: Options that name an input file, and what kind of file is expected.
READS = [
    ("download_model.py", "-m", "folder"),
    ("config_generator.py", "-m", "model"),
    ("prune_scheme_generator.py", "-i", "conf"),
    ("prune.py", "-m", "model"),
    ("prune.py", "-c", "scheme"),
    ("compose_model.py", "-m", "model"),
    ("compose_model.py", "-p", "bundle"),
    ("compose_model.py", "-c", "conf"),
    ("baseline_finetuning.py", "-m", "any model"),
    ("block_level_finetuning.py", "-m", "model"),
    ("block_level_finetuning.py", "-p", "bundle"),
    ("model_level_finetuning.py", "-m", "model"),
    ("model_level_finetuning.py", "-p", "bundle"),
    ("model_level_finetuning.py", "-c", "conf"),
    ("evaluate.py", "-m", "any model"),
    ("plot_loss.py", "", "csv"),
    ("report.py", "-d", "folder"),
]
#: What reads each kind of file, for the scripts that take one.
READERS: dict[str, Callable[[Path], Any]] = {
    "model": checkpoint.load,
    "bundle": lambda path: open_bundle(path).verify(),
    "conf": config.read_configurations,
    "scheme": config.read_scheme,
    "csv": stats_file.read_stats,
    "pretrained": lambda path: resolve_model(str(path)),
    "evaluation": lambda path: read_evaluation(path, None),
}
#: A path, and the kind of input for which it is right.
WRONG_FILES = {
    "nowhere": "", "folder": "", "below_a_file": "", "empty": "", "text": "", "json": "",
    "conf": "conf", "scheme": "scheme", "model": "model", "composed": "model",
    "modules": "bundle", "stats": "csv",
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_readers_refuse_other_files(kind: str, places: dict[str, str]) -> None:
    """Missing, a folder, of another kind: one line that names the file."""
    for wrong, right_for in WRONG_FILES.items():
        if right_for == kind:
            continue
        with pytest.raises((UserError, OSError)) as caught:
            READERS[kind](Path(places[wrong]))
        error = caught.value
        line = str(error.filename) if isinstance(error, OSError) else str(error)
        assert places[wrong] in line, wrong
        assert "\n" not in line, wrong


@pytest.mark.parametrize(("script", "option", "kind"), READS)
def test_wrong_file(script: str, option: str, kind: str, places: dict[str, str], out: Path) -> None:
    """What a reader refuses, or the system, ends every script with one line."""
    for wrong in ("text", "nowhere"):
        found = run(script, {option: f"{{{wrong}}}"}, places, out)
        assert_refused(found, out, places[wrong])
        if wrong == "nowhere" and script != "report.py":
            assert "o such f" in found.err
    if kind == "model":
        found = run(script, {option: "{composed}"}, places, out)
        assert_refused(found, out, places["composed"], "is a composed model", "download_model.py")


@pytest.mark.parametrize("script", ["compose_model.py", *TRAININGS[1:]])
def test_bundle_of_another_model(script: str, places: dict[str, str], out: Path) -> None:
    found = run(script, {"-m": "{other}"}, places, out)
    assert_refused(found, out, places["modules"], "made for another model")
    found = run(script, {}, places, out, "-p", places["modules"], "-p", places["text"])
    assert_refused(found, out, places["text"])


@pytest.mark.parametrize("script", COMPOSING)
def test_configuration_for_another_model(script: str, places: dict[str, str], out: Path) -> None:
    found = run(script, {"-c": "{other_conf}"}, places, out)
    assert_refused(found, out, places["other_conf"], "encoder.block.2.", "2 encoder and 2 decoder")


def test_pickles_are_not_executed(places: dict[str, str], out: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(out / "executed"),))

    path = out.parent / "pickled.pth"
    torch.save({"format": "composable.model", "evil": Evil()}, path)
    for script in ("config_generator.py", "evaluate.py", "baseline_finetuning.py"):
        assert_refused(run(script, {"-m": str(path)}, places, out), out, str(path))
        assert not (out / "executed").exists()


# --- what the files say --------------------------------------------------------------------------

#: What only the model, the methods or the bundle can refuse; the rest is in test_config.py.
BAD_FOR_THE_MODEL = [
    ('[{"Encoder": 0}]', '"Encoder"'),
    ('[{"encoder.block.0": 1, "encoder.block.1": 1}]', "all 2 encoder layers"),
    (f'[{{"{ATTENTION}": {{"rate": 0.5, "method": "star"}}}}]', 'unknown method "star"; known: l1'),
    (f'[{{"{ATTENTION}": 0.125}}]', f'"{ATTENTION}" at rate 0.125 (has 0.'),
    (f'[{{"{WI}": {{"rate": 0.3, "method": "head_l1"}}}}]', "head_l1"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FOR_THE_MODEL)
def test_configuration_that_does_not_fit_the_model(
    text: str, message: str, places: dict[str, str], out: Path
) -> None:
    path = out.parent / "bad.json"
    path.write_text(text)
    found = run("compose_model.py", {"-c": str(path)}, places, out)
    assert_refused(found, out, message)


BAD_SCHEMES = [
    ('{"encoder.block.9.layer.0.SelfAttention": [0.5]}', "encoder.block.9.layer.0.SelfAttention"),
    (f'{{"{ATTENTION}": [{{"rate": 0.5, "method": "star"}}]}}', 'unknown method "star"'),
    (f'{{"{ATTENTION}": [{{"rate": 0.5, "method": "l1"}}]}}', "l1 does not prune"),
    (f'{{"{WI}": [{{"rate": 0.5, "method": "head_l1"}}]}}', "head_l1 does not prune"),
]


@pytest.mark.parametrize(("text", "message"), BAD_SCHEMES)
def test_bad_scheme(text: str, message: str, places: dict[str, str], out: Path) -> None:
    path = out.parent / "bad.json"
    path.write_text(text)
    found = run("prune.py", {"-c": str(path), "-p": "{out}/test.pth"}, places, out)
    assert_refused(found, out, message)


def test_a_test_model_keeps_a_layer(places: dict[str, str], out: Path) -> None:
    """Each layer may go in a configuration of its own, all of them at once cannot."""
    path = out.parent / "scheme.json"
    path.write_text('{"encoder.block.0": [1], "encoder.block.1": [1]}')
    changes = {"-c": str(path), "-p": "{out}/test.pth", "--attention": ""}
    found = run("prune.py", changes, places, out)
    assert found.report["variants"] == 2
    assert checkpoint.load(out / "test.pth").structure == (Edit("encoder.block.0", "remove"),)


# --- the command line ----------------------------------------------------------------------------

#: Options that scripts share are declared once, in options.py; one script stands for all of them.
BAD_OPTIONS: list[tuple[str, dict[str, str], tuple[str, ...], int]] = [
    *((s, {"-n": "3"}, ("no configuration 3", "0 to 2"), 1) for s in COMPOSING),
    ("compose_model.py", {"-n": "-1"}, ("-1 is not in the range",), 2),
    ("compose_model.py", {"-n": "0.5"}, ("'0.5'",), 2),
    ("prune.py", {"--linear": "star"}, ("'star'", "l1, wanda", "alps"), 2),
    ("prune.py", {"--attention": "l1"}, ("'l1'", "head_gram, "), 2),
    ("prune.py", {"--ffn": "0.5"}, ("a rate belongs in config_generator.py",), 2),
    ("prune.py", {"--ffn": "exchange"}, ("--ffn has no effect: no ffn has a rate",), 2),
    ("plot_loss.py", {"-o": "{out}/loss.pdf"}, ("loss.pdf", ".png"), 2),
    ("evaluate.py", {"--split": "train"}, ("'train'",), 2),
    ("evaluate.py", {"--num-beams": "0"}, ("0 is not in the range",), 2),
    *(
        ("baseline_finetuning.py", {option: value}, (message,), 2)
        for option, value, message in (
            ("--limit", "0", "0 is not in the range"),
            ("--limit", "few", "'few'"),
            ("--dtype", "int8", "'int8'"),
            ("--epochs", "0", "0 is not in the range"),
            ("--batch-size", "0", "0 is not in the range"),
            ("--lr", "0", "0.0 is not in the range"),
            ("--lr", "nan", "nan"),
            ("--lr", "inf", "inf"),
            ("--seed", "x", "'x'"),
            ("--seed", "-1", "-1"),
            ("--seed", str(2**32), str(2**32)),
        )
    ),
    *(
        (
            "block_level_finetuning.py",
            {"--epochs": "", "--solver": "ls", "--ridge": value}, (message,), 2,
        )
        for value, message in (("-0.1", "-0.1 is not in the range"), ("nan", "nan"), ("inf", "inf"))
    ),
    *(
        (
            "block_level_finetuning.py", {"--epochs": "", "--solver": solver, option: value},
            (f"{option} has no effect with --solver {solver}; leave it out.",), 2,
        )
        for solver, option, value in (
            ("grad", "--ridge", "0.01"), ("grad", "--calibration", "c.npy"),
            ("grad", "--memory-budget", "1G"), ("ls", "--epochs", "2"), ("ls", "--lr", "0.1"),
            ("ls", "--batch-size", "8"), ("ls", "--seed", "1"), ("ls", "--dtype", "float32"),
        )
    ),
    *(
        (script, {option: value}, (message,), 1)
        for script in (*TRAININGS, "evaluate.py")
        for option, value, message in (
            ("--device", "cuda", "no CUDA device"),
            ("--data", "{nowhere}", "{nowhere}"),
            ("--data", "{folder}", "{folder}"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("script", "changes", "needles", "code"), BAD_OPTIONS)
def test_bad_option(
    script: str,
    changes: dict[str, str],
    needles: tuple[str, ...],
    code: int,
    places: dict[str, str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU, on machines with one, too
    found = run(script, changes, places, out)
    assert_refused(found, out, *(needle.format(**places) for needle in needles), code=code)


def test_index_range_of_one_configuration(places: dict[str, str], out: Path) -> None:
    path = out.parent / "one.json"
    path.write_text("[{}]")
    found = run("compose_model.py", {"-c": str(path), "-n": "1"}, places, out)
    assert_refused(found, out, "no configuration 1", "0 only")


def test_option_without_value(places: dict[str, str], out: Path) -> None:
    options = [("prune.py", "--ffn"), ("compose_model.py", "-p"), ("compose_model.py", "-n")]
    for script, option in options:
        assert_refused(run(script, {}, places, out, option), out, option, code=2)


@pytest.mark.parametrize("script", COMMANDS)
def test_unknown_option(script: str, places: dict[str, str], out: Path) -> None:
    assert_refused(run(script, {"--nonsense": "3"}, places, out), out, "--nonsense", code=2)


def test_superfluous_words(places: dict[str, str], out: Path) -> None:
    for script in COMMANDS:
        if script != "plot_loss.py":
            found = call(script, "superfluous", cwd=out)
            assert_refused(found, out, "superfluous", code=2)


# --- outputs -------------------------------------------------------------------------------------

WRITES = [
    *((script, "-o") for script, options in COMMANDS.items() if "-o" in options),
    ("prune.py", "-p"),
    *((script, "--stats") for script in TRAININGS),
    ("evaluate.py", "--predictions"),
]


@pytest.mark.parametrize(("script", "option"), WRITES)
def test_unwritable_output(
    script: str, option: str, places: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, and a file below a file (a read-only folder would not stop root).

    It is found before a model is read, so before hours of work.
    """

    def work(*_: Any) -> None:
        raise AssertionError("the work began before the outputs were checked")

    monkeypatch.setattr(checkpoint, "load", work)
    taken = out.parent / "taken.png"  # plot_loss.py wants this ending
    taken.mkdir()
    for path, named in ((taken, taken), (Path(places["text"], "x.png"), places["text"])):
        assert_refused(run(script, {option: str(path)}, places, out), out, str(named))
    assert list(taken.iterdir()) == []
    assert Path(places["text"]).read_text() == "no such thing\n"


@pytest.mark.parametrize("script", TRAININGS)
def test_unwritable_checkpoints(script: str, places: dict[str, str], out: Path) -> None:
    found = run(script, {"--workdir": "{below_a_file}"}, places, out)
    assert_refused(found, out, places["text"])


def test_an_older_output_stays(places: dict[str, str], out: Path) -> None:
    for script in COMMANDS.keys() - {"report.py"}:
        output = Path(COMMANDS[script]["-o"].format(out=out))
        output.write_text("older")
        wrong = next(option for option in COMMANDS[script] if option in ("-m", "-i", ""))
        found = run(script, {wrong: "{text}"}, places, out)
        assert (found.code, found.err.count("\n")) == (1, 1)
        assert made_in(out) == [output.name]
        assert output.read_text() == "older"
        output.unlink()


def test_report_where_it_cannot_be_written(places: dict[str, str], out: Path) -> None:
    (out / "report.md").mkdir()
    assert_refused(run("report.py", {}, places, out), out, str(out / "report.md"))
    (out / "report.md").rmdir()
    (out / "report.md").write_text("older")
    (out / "eval_model_0.json").write_text("no such thing\n")
    found = call("report.py", "-q", "-d", out, cwd=out)
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert made_in(out) == ["report.md"]
    assert (out / "report.md").read_text() == "older"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write fails in its middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


#: Largest file, and the output that is larger; none where the tokenizer's files are larger already.
FULL_DISKS = [
    ("download_model.py", 100_000, "model.pth"),
    ("config_generator.py", 100, ""),
    ("prune_scheme_generator.py", 100, "conf_prune.json"),
    ("prune.py", 10_000, "modules.npy"),
    ("compose_model.py", 10_000, "composed.pth"),
    ("evaluate.py", 100, ""),
    ("plot_loss.py", 5_000, "loss.png"),
    ("report.py", 100, "quality.png"),
]


@pytest.mark.parametrize(("script", "size", "name"), FULL_DISKS)
def test_full_disk(script: str, size: int, name: str, places: dict[str, str], out: Path) -> None:
    with largest_file(size):
        found = run(script, {}, places, out)
    assert_refused(found, out, name, "File too large")


@pytest.mark.parametrize(
    ("script", "size", "name"),
    [("baseline_finetuning.py", 145_000, "baseline.pth"),
     ("model_level_finetuning.py", 145_000, "tuned.pth")],
)  # fmt: skip
def test_full_disk_at_the_end_of_a_training(
    script: str, size: int, name: str, places: dict[str, str], out: Path
) -> None:
    """The checkpoints fit and the model does not: the same command goes on from the last one."""
    with largest_file(size):
        found = run(script, {}, places, out)
    assert (found.code, found.out, found.err.count("\n")) == (1, "", 1)
    assert f"{name}: File too large" in found.err
    left = [path for path in made_in(out) if not path.startswith("checkpoints/")]
    assert left == ["stats.csv"]  # complete rows, as after every epoch
    again = run(script, {}, places, out)
    assert again.report["resumed_from_epoch"] == 1
    resumed = (out / name).read_bytes()
    shutil.rmtree(out)
    assert run(script, {}, places, out).report["resumed_from_epoch"] is None
    assert (out / name).read_bytes() == resumed


@pytest.mark.parametrize("script", TRAININGS)
def test_full_disk_in_a_checkpoint(script: str, places: dict[str, str], out: Path) -> None:
    with largest_file(100_000):
        found = run(script, {}, places, out)
    assert (found.code, found.out) == (1, "")
    assert found.err.count("\n") == 1
    assert str(out / "checkpoints") in found.err


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "split"),
    [*((script, split) for script in TRAININGS for split in ("train", "val")),
     ("evaluate.py", "test")],
)  # fmt: skip
def test_bad_corpus(script: str, split: str, places: dict[str, str], out: Path) -> None:
    """What is refused is in test_translation.py; each script reads the splits that it needs."""
    folder = tiny.corpus(out.parent / "data", pairs=8)
    (folder / f"{split}.de").write_text("ein mann .\n")
    found = run(script, {"--data": str(folder)}, places, out)
    assert_refused(found, out, str(folder), f"{split}.en has 8 lines and {split}.de has 1")


@pytest.mark.parametrize("script", [*TRAININGS, "evaluate.py"])
def test_data_folder_of_the_model_is_gone(script: str, places: dict[str, str], out: Path) -> None:
    """The folder comes from the model file, not from the command line."""
    moved = checkpoint.load(Path(COMMANDS[script]["-m"].format(**places)))
    moved.info["data"] = str(out / "gone")
    checkpoint.save(out.parent / "moved.pth", moved)
    found = run(script, {"-m": str(out.parent / "moved.pth")}, places, out)
    assert_refused(found, out, str(out / "gone"))


@pytest.mark.parametrize("script", [*TRAININGS, "evaluate.py"])
def test_data_of_the_model_are_not_overwritten(
    script: str, places: dict[str, str], out: Path
) -> None:
    """Nothing on the command line says that the output is also read."""
    data = tiny.corpus(out.parent / "own", pairs=8)
    own = checkpoint.load(Path(COMMANDS[script]["-m"].format(**places)))
    own.info["data"] = str(data)
    checkpoint.save(out.parent / "own.pth", own)
    file = data / ("test.de" if script == "evaluate.py" else "val.de")
    before = file.read_bytes()
    changed = {"-m": str(out.parent / "own.pth"), "-o": str(file)}
    assert_refused(run(script, changed, places, out), out, f"{file}: is to be written and is also")
    assert file.read_bytes() == before


# --- tracebacks, and processes -------------------------------------------------------------------


def test_verbose_shows_the_traceback(places: dict[str, str], out: Path) -> None:
    found = run("compose_model.py", {"-m": "{text}"}, places, out, "--verbose")
    assert (found.code, found.out) == (2, "")
    options = ("-v", "-m", places["text"], "-o", out / "composed.pth")
    found = call("compose_model.py", *options, cwd=out.parent)
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith("Traceback (most recent call last):\n")
    assert found.err.splitlines()[-1].startswith("Error: ")
    assert found.err.count("Error: ") >= 2
    assert made_in(out) == []


def test_ctrl_c(places: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "check_writable", lambda *_: signal.raise_signal(signal.SIGINT))
    found = run("compose_model.py", {}, places, out)
    assert_refused(found, out, "interrupted", code=130)


@pytest.mark.parametrize("script", TRAININGS)
def test_ctrl_c_in_a_training(
    script: str, places: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the second of three epochs: the same command goes on, to the same bytes."""
    changes, name = {"--epochs": "3"}, Path(COMMANDS[script]["-o"]).name
    assert run(script, changes, places, out).report["resumed_from_epoch"] is None
    expected = (out / name).read_bytes()
    shutil.rmtree(out)
    original = callbacks.Stats.on_epoch_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        original(self, args, state, control, **more)
        if round(state.epoch) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Stats, "on_epoch_end", interrupt)
        found = run(script, changes, places, out)
    assert (found.code, found.out, found.err.count("\n")) == (130, "", 1)
    assert "run the same command again" in found.err
    assert not (out / name).exists()
    assert run(script, changes, places, out).report["resumed_from_epoch"] == 1
    assert (out / name).read_bytes() == expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory(
    error: Exception, places: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(files, "check_writable", fail)
    found = run("baseline_finetuning.py", {}, places, out)
    assert_refused(found, out, "out of memory", "smaller batches")


def test_our_own_mistakes_keep_their_traceback(
    places: dict[str, str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(files, "check_writable", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("compose_model.py", {}, places, out)


@pytest.mark.parametrize(
    ("script", "changes", "code", "needle"),
    [
        ("compose_model.py", {"-n": "7"}, 1, "no configuration 7"),
        ("prune_scheme_generator.py", {"-x": "1"}, 2, "(see prune_scheme_generator.py --help)"),
    ],
)
def test_exit_codes_of_processes(
    script: str, changes: dict[str, str], code: int, needle: str, places: dict[str, str], out: Path
) -> None:
    options = {**COMMANDS[script], **changes}
    words = [word.format(**places, out=out) for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_refused(Ended(done.returncode, done.stdout, done.stderr), out, needle, code=code)
