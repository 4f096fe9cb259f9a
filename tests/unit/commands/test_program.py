"""The command `composable`, the options that all commands share, and where default paths lie."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import composable
from composable.calibration.amount import TOKENS
from composable.commands import cli, options, program, rank_importance
from composable.commands.prune import METHODS as PRUNE_METHODS
from composable.methods import METHODS
from composable.ranking import RANKERS, trajectory
from tests.paths import ROOT

CONF = '[{"encoder.block.0.layer.1.DenseReluDense.wo": 0.5}]'


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        program.main.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def commands() -> dict[str, click.Command]:
    context = click.Context(program.main)
    found = {name: program.main.get_command(context, name) for name in program.COMMANDS}
    return {name: command for name, command in found.items() if command is not None}


def test_every_script_is_a_subcommand() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert set(commands()) == set(program.main.list_commands(click.Context(program.main)))
    assert set(commands()) == scripts


def test_options_are_few_and_explained() -> None:
    found = [each for command in commands().values() for each in command.params]
    flags = [each for each in found if isinstance(each, options.Option)]
    assert len(flags) + len(cli.GENERAL) <= 132
    for option in [*flags, *cli.GENERAL]:
        text = str(option.help).partition(" [default")[0]
        assert text[0].isupper() or text.partition(":")[0].isidentifier(), option.opts
        assert text.endswith((".", ")")), option.opts


def test_rankers_of_the_help_are_those_of_the_registry() -> None:
    names = [ranker.name for ranker in RANKERS]
    assert list(rank_importance.METHODS) == names
    few = [ranker.name for ranker in RANKERS if ranker.tokens != TOKENS]
    assert list(rank_importance.MASKING) == few
    (limit,) = (each for each in rank_importance.main.params if each.name == "limit")
    said = f"{TOKENS:,} tokens, or patches of images; {trajectory.TOKENS} with trajectory"
    assert said in str(getattr(limit, "help", ""))


def test_methods_of_the_help_are_those_of_the_registry() -> None:
    for kind, names in PRUNE_METHODS.items():
        assert set(names) == {method.name for method in METHODS if kind in method.kinds}


@pytest.mark.parametrize("name", ["prune_scheme_generator", "prune-scheme-generator"])
def test_default_paths_lie_in_the_workdir(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("a", "b", "c"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "conf.json").write_text(CONF)
    assert run(capsys, "--workdir", "a", name)[0] == 0
    assert run(capsys, name, "--workdir", "b", "-o", "here.json")[0] == 0
    monkeypatch.setenv("COMPOSABLE_WORKDIR", "c")
    code, out, err = run(capsys, name)
    assert (code, json.loads(out)["wrote"], err) == (0, "c/conf_prune.json", "")
    assert run(capsys, "--workdir", "a", name, "-o", "a/x.json")[0] == 0  # goes before the variable
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    made = {"a/conf_prune.json", "a/x.json", "here.json", "c/conf_prune.json"}
    assert found == {"a/conf.json", "b/conf.json", "c/conf.json", *made}


def test_messages_name_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "prune", "--attention", 0.5)
    assert code == 2
    assert "a rate belongs in config_generator.py; name a method here." in err
    assert err.endswith("(see composable prune --help)\n")
    code, _, err = run(capsys, "trim")
    assert (code, err) == (2, "Error: No such command 'trim'. (see composable --help)\n")


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert (code, out, err) == run(capsys, "--help")
    assert out.startswith("Usage: composable ")
    assert "..." not in out.partition("Commands:")[2]


def test_general_options(capsys: pytest.CaptureFixture[str]) -> None:
    version = f"composable {composable.__version__}\n"
    assert run(capsys, "--version") == (0, version, "")
    assert run(capsys, "prune", "--version") == (0, version, "")
    code, _, err = run(capsys, "-q", "prune", "-v")
    assert code == 2
    assert "-v shows more and -q shows less; give one of them" in err
    code, out, _ = run(capsys, "prune", "--help")
    assert code == 0
    assert out.index("Files:") < out.index("What to do:") < out.index("Machine:")
    assert out.index("Machine:") < out.index("General:") < out.index("--workdir DIR")


def test_quiet_before_and_after_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf.json").write_text(CONF)
    for args in (("-q", "prune_scheme_generator"), ("prune_scheme_generator", "-q")):
        monkeypatch.setenv("COMPOSABLE_PROGRESS", "1")
        assert run(capsys, *args)[0] == 0
        assert os.environ["COMPOSABLE_PROGRESS"] == "0"


def test_the_shell_completes_commands_and_options() -> None:
    program_text = "from composable.commands.program import main; main()"
    for words, wanted in (("composable pr", "prune"), ("composable prune --att", "--attention")):
        asked = {
            "_COMPOSABLE_COMPLETE": "bash_complete", "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }  # fmt: skip
        ended = subprocess.run(
            [sys.executable, "-c", program_text], env={**os.environ, **asked}, cwd=ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f"plain,{wanted}" in ended.stdout.splitlines(), ended.stderr
