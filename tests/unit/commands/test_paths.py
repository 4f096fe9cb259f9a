"""No command overwrites what it reads: every pair of paths of every command, however spelled."""

import importlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from composable.commands.paths import NO_PATH, PathArgument
from composable.errors import UserError
from tests.paths import ROOT

#: Every script at the top has a command of its name.
COMMANDS = sorted(
    path.stem for path in ROOT.glob("*.py") if (ROOT / "composable/commands" / path.name).is_file()
)
#: What an input or output may be called, as somebody who reads docs/commands.md would say.
READS = {
    "baseline_finetuning": "model data",
    "block_level_finetuning": "model bundles data calibration",
    "compose_model": "model bundles config",
    "config_generator": "model scores",
    "download_model": "source",
    "evaluate": "model data",
    "export_model": "model",
    "model_level_finetuning": "model bundles config data",
    "plot_importance": "scores",
    "plot_loss": "csvs",
    "prune": "model config scores calibration data",
    "prune_scheme_generator": "source",
    "rank_importance": "model calibration data",
    "report": "directory",
}
WRITES = {
    "baseline_finetuning": "output stats",
    "block_level_finetuning": "output stats calibration",
    "compose_model": "output",
    "config_generator": "output",
    "download_model": "output",
    "evaluate": "output predictions",
    "export_model": "output",
    "model_level_finetuning": "output stats",
    "plot_importance": "output",
    "plot_loss": "output",
    "prune": "output test_model calibration",
    "prune_scheme_generator": "output",
    "rank_importance": "output calibration",
    "report": "",
}


def command(name: str) -> click.Command:
    found: click.Command = importlib.import_module(f"composable.commands.{name}").main
    return found


def paths_of(name: str) -> dict[str, Any]:
    params: list[Any] = command(name).params
    return {str(p.name): p for p in params if p.use is not NO_PATH}


def run(name: str, given: dict[str, Path]) -> None:
    """Call a command with paths alone; it must not begin to work."""
    args: list[str] = []
    for key, path in given.items():
        parameter = paths_of(name)[key]
        flags = [] if isinstance(parameter, PathArgument) else parameter.opts[:1]
        args = [*args, *flags, str(path)] if flags else [str(path), *args]
    command(name).main(args, prog_name=f"{name}.py", standalone_mode=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_says_what_it_is_for(name: str) -> None:
    found = paths_of(name)
    assert {key for key, p in found.items() if p.use.reads} == set(READS[name].split())
    assert {key for key, p in found.items() if p.use.writes} == set(WRITES[name].split())
    others = [p.name for p in command(name).params if isinstance(p.type, click.Path)]
    assert set(others) <= found.keys()


SPELLINGS: dict[str, Callable[[Path, Path], Any]] = {
    "the same": lambda file, other: None,
    "a symbolic link": lambda file, other: other.symlink_to(file.name),
    "a hard link": lambda file, other: os.link(file, other),
    "through a folder": lambda file, other: None,
    "a link that leads nowhere yet": lambda file, other: None,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_is_no_other_path(
    name: str, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("absent.png")
    reads, writes = READS[name].split(), WRITES[name].split()
    tried = 0
    for one, other in itertools.permutations(sorted({*reads, *writes}), 2):
        if other not in writes:
            continue
        file = tmp_path / f"{tried}.png"
        again = tmp_path / f"again{tried}.png"
        if spelling == "a link that leads nowhere yet":
            file, again = tmp_path / "link", tmp_path / "absent.png"
        else:
            file.write_bytes(b"content")
            SPELLINGS[spelling](file, again)
            if spelling == "the same":
                again = file
            if spelling == "through a folder":
                again = Path("folder/..") / file.name
        with pytest.raises(click.UsageError, match="name another file to write") as caught:
            run(name, {one: file, other: again})
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        if spelling != "a link that leads nowhere yet":
            assert file.read_bytes() == b"content"
        tried += 1
    assert tried >= 1 or not writes


def test_outputs_that_are_named_after_others(tmp_path: Path) -> None:
    """The table of variants, and pictures and reports without an option of their own."""
    table = tmp_path / "s_variants.csv"
    with pytest.raises(click.UsageError, match=r"--stats .*s_variants\.csv: is the file of -m"):
        run("block_level_finetuning", {"model": table, "stats": tmp_path / "s.csv"})
    with pytest.raises(click.UsageError, match=r"s_variants\.csv: is written by -o"):
        run("block_level_finetuning", {"output": table, "stats": tmp_path / "s.csv"})
    with pytest.raises(click.UsageError, match=r"-o .*x\.png: is the file of SCORES .*x\.png"):
        run("plot_importance", {"scores": tmp_path / "x.png"})


@pytest.mark.parametrize(
    ("name", "source", "output", "files"),
    [
        ("baseline_finetuning", "data", "stats", "train.en val.de test_2016_flickr.en dev.tsv"),
        ("block_level_finetuning", "data", "output", "train/cat/0.png validation_matched.jsonl"),
        ("prune", "data", "output", "wiki.train.tokens train-v2.0.json state.json"),
        ("evaluate", "data", "predictions", "test/data-00000-of-00001.arrow ptb.test.txt"),
        ("download_model", "source", "output", "config.json model.safetensors tokenizer.json"),
    ],
)
def test_no_output_is_a_file_of_a_folder_that_is_read(
    name: str, source: str, output: str, files: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for file in files.split():
        path = tmp_path / "folder" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
        for folder in (tmp_path / "folder", tmp_path / "link"):
            with pytest.raises(click.UsageError, match="is read as a part of"):
                run(name, {source: folder, output: path})
        assert path.read_bytes() == b"content"
        path.unlink()  # the same command must not be refused only when it runs again
        with pytest.raises(click.UsageError, match="is read as a part of"):
            run(name, {source: tmp_path / "folder", output: path})


def test_no_output_lies_in_another(tmp_path: Path) -> None:
    """It would be noticed at the end of a training, when a folder is where a file should be."""
    model = tmp_path / "new" / "m.pth"
    with pytest.raises(click.UsageError, match=r"s: lies in -o .*m\.pth, which is a file"):
        run("baseline_finetuning", {"output": model, "stats": model / "s"})
    assert not model.parent.exists()


def test_no_output_is_removed_with_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in the folder of --workdir, here the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    output = tmp_path / "checkpoints" / "baseline-0123456789abcdef" / "m.pth"
    with pytest.raises(click.UsageError, match=r"would be removed with the checkpoints"):
        run("baseline_finetuning", {"output": output})
    with pytest.raises(FileNotFoundError):  # the model: it began to work
        run("baseline_finetuning", {"output": tmp_path / "checkpoints" / "m.pth"})


@pytest.mark.parametrize("name", COMMANDS)
def test_names_that_are_no_utf8(name: str, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a\xff.png")
    (tmp_path / "link.png").symlink_to(odd)
    for key in {*READS[name].split(), *WRITES[name].split()}:
        for path in (odd, tmp_path / "link.png"):
            with pytest.raises(click.UsageError, match=r": the name is not UTF-8; rename it"):
                run(name, {key: path})


def test_folders_that_are_beside_a_model_or_data_are_not_in_them(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "taken.json").write_text("older")
    with pytest.raises(UserError, match=r"config\.json"):  # it began to work
        run("download_model", {"source": tmp_path / "hf", "output": tmp_path / "taken.json"})


def test_outputs_beside_data_stay_possible(tmp_path: Path) -> None:
    """A folder of data may be the folder in which one works."""
    (tmp_path / "train.tsv").write_text("text\tlabel\n")
    names = "stats_baseline.csv test.pth conf.json report.md test_report.json dev/report.json"
    (tmp_path / "dev").mkdir()
    for file in names.split():
        (tmp_path / file).write_bytes(b"older")
        given = {"data": tmp_path, "stats": tmp_path / file, "model": tmp_path / "absent"}
        with pytest.raises(FileNotFoundError):  # the model: it began to work
            run("baseline_finetuning", given)


@pytest.mark.parametrize("name", COMMANDS)
def test_pipes_devices_and_circles_of_links(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for key in READS[name].split():
        for path, problem in (
            (tmp_path / "pipe", "is no ordinary file"),
            (Path("/dev/zero"), "is no ordinary file"),
            (tmp_path / "circle", "Too many levels"),
        ):
            with pytest.raises(OSError, match=problem):
                run(name, {key: path})
