"""What a file says cannot act on the terminal, fake other lines, or flood it."""

import json
import logging
from dataclasses import dataclass

import pytest

from composable.commands import cli, options
from composable.commands.terminal import Formatter, one_line, printable
from composable.errors import UserError

EVIL = "\x1b[2J\x9b31mname\r\x07\u202e\x00"


def test_control_characters_are_written_as_json_does() -> None:
    assert printable("plain é 你好\nnext") == "plain é 你好\nnext"
    assert printable(EVIL) == r"\u001b[2J\u009b31mname\r\u0007\u202e\u0000"
    assert json.loads(printable(json.dumps({EVIL: "\ud800"}, ensure_ascii=False))) == {
        EVIL: "\ud800"
    }


@pytest.mark.parametrize("text", ["x" * 10**6, "x " * 10**6, "a/" * 10**5 + ": what to do."])
def test_messages_are_short(text: str) -> None:
    shown = one_line(f"conf.json: {text} and the end")
    assert len(shown) <= 1000
    assert shown.startswith("conf.json: ")
    assert shown.endswith(" and the end")


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str = options.option("--name", help="A name.")


@cli.command(Settings)
def fails(settings: Settings) -> dict[str, object]:
    """Fail with a name that a file might have."""
    name = settings.name
    logging.getLogger("composable").warning("reading %s", name)
    if name.endswith("!"):
        return {"read": name}
    raise UserError(f"{name}: is not\nwhat it should be.")


@pytest.mark.parametrize("debug", [[], ["--verbose"]])
def test_the_last_line_of_a_command(debug: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fails.main(["--name", f"{EVIL}\nError: none", *debug])
    assert caught.value.code == 1
    *before, last, end = capsys.readouterr().err.split("\n")
    assert end == ""
    assert last.startswith("Error: ")
    assert last.endswith("Error: none: is not what it should be.")
    assert bool(before) == bool(debug)
    assert all(line.isprintable() for line in [*before, last])


def test_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fails.main([f"--{EVIL}", "x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fails.main(["--name", f"{EVIL}!"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert json.loads(out)["read"] == f"{EVIL}!"
    assert out.replace("\n", "").isprintable()


def test_log_lines() -> None:
    def shown(message: str, *args: object) -> str:
        record = logging.LogRecord("composable", logging.INFO, "", 0, message, args, None)
        return Formatter("%(message)s").format(record)

    assert shown("%s: read %d", f"{EVIL}\nfake", 3).count("\n") == 0
    assert shown("%s", "a table\nof two lines") == "a table\nof two lines"
    assert shown("%s", EVIL).isprintable()
    assert len(shown("%s", "x" * 10**5)) == 10**5
    assert len(shown("at %s", "x" * 10**5)) < 300
