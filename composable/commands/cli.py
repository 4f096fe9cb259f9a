"""What all commands share: settings in, a JSON report out, errors as one line and an exit code."""

import functools
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

import composable
from composable import files
from composable.commands import options, paths, signals
from composable.commands.terminal import Formatter, one_line, printable
from composable.errors import UserError

log = logging.getLogger("composable")
Main = Callable[[Any], dict[str, Any] | None]


def command(settings: type) -> Callable[[Main], click.Command]:
    """Make a function of one argument a command.

    The function gets a frozen dataclass, whose fields `options` declares, and returns the report,
    which is printed to stdout as one JSON object with `seconds` added. A method `check` of the
    dataclass may refuse values that contradict each other. A `UserError` or an `OSError` becomes
    one line on stderr and exit code 1, a wrong command line exit code 2, Ctrl-C exit code 130,
    SIGTERM 143 and SIGHUP 129; `--verbose` shows the traceback.
    """

    def decorate(function: Main) -> click.Command:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            started = time.perf_counter()
            try:
                made = _settings(settings, values)
                with files.reads_no_output():
                    report = function(made)
            except click.UsageError as error:  # of what only the files told
                error.ctx = error.ctx or click.get_current_context()
                raise
            if report is not None and int(os.environ.get("RANK", "0")) == 0:
                report["seconds"] = round(time.perf_counter() - started, 3)
                click.echo(printable(files.json_text(report)))

        name = function.__module__.rpartition(".")[2]
        made = Command(name, callback=run, help=function.__doc__, context_settings=CONTEXT)
        made.params = options.parameters(settings)
        return made

    return decorate


def _settings(kind: type, values: dict[str, Any]) -> Any:
    """Fill in the settings of a command; wrong values are usage errors."""
    context = click.get_current_context()
    _set_up_logging()
    workdir = Path(context.meta.get(WORKDIR, ""))
    for name, value in values.items():
        if context.get_parameter_source(name) is ParameterSource.DEFAULT:
            values[name] = _within(workdir, value)
    trains = "workdir" in kind.__dataclass_fields__  # type: ignore[attr-defined]
    paths.check(context, values, workdir / options.CHECKPOINTS if trains else None)
    options.refuse_without_effect(values)
    values |= {"workdir": workdir} if trains else {}
    made = kind(**values)
    try:
        getattr(made, "check", lambda: None)()
    except UserError as error:
        raise click.UsageError(str(error).rstrip("."), context) from error
    return made


def _within(workdir: Path, value: Any) -> Any:
    """Put default paths into the folder that --workdir names."""
    if isinstance(value, tuple):
        return tuple(_within(workdir, one) for one in value)
    return workdir / value if isinstance(value, Path) else value


CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True}
CONTEXT["max_content_width"] = 100
WORKDIR, VERBOSE, QUIET = "composable.workdir", "composable.verbose", "composable.quiet"


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Remember a general option, which may be given to the program or to its command."""
    name = f"composable.{parameter.name}"
    source = context.get_parameter_source(str(parameter.name))
    if value and (source is ParameterSource.COMMANDLINE or name not in context.meta):
        context.meta[name] = value


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"composable {composable.__version__}")
        context.exit()


#: Options of the program, and so of every command.
GENERAL = (
    click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Log errors only, and show no progress bars.",
    ),
    click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Also show what the libraries log, and the traceback of an error.",
    ),
    click.Option(
        ["--workdir"],
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        expose_value=False,
        callback=_keep,
        envvar="COMPOSABLE_WORKDIR",
        help="Folder in which all default paths lie, such as model/dense.pth and checkpoints. "
        "Paths that are given stay as they are. [default: the current folder; also the variable "
        "COMPOSABLE_WORKDIR]",
    ),
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version and exit.",
    ),
)


class Program(click.Command):
    """A command with the general options, whose errors become one line and an exit code."""

    @property
    def program(self) -> str:
        """Return the name of its script."""
        return f"{self.name}.py"

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Add the general options, as click itself adds --help."""
        own = super().get_params(ctx)
        return [*own[: len(self.params)], *GENERAL, *own[len(self.params) :]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List options by their headings."""
        by_group: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                by_group.setdefault(getattr(parameter, "group", "General"), []).append(record)
        for group, records in by_group.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; click itself would answer Ctrl-C with an empty line on stderr."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error

    def main(self, args: Any = None, *rest: Any, **more: Any) -> Any:  # type: ignore[override]
        """Run; in standalone mode (the default) end the process with the exit code."""
        parent: Any = super()
        more.setdefault("prog_name", self.program)  # what messages call it, however it was started
        if not more.pop("standalone_mode", True):
            return parent.main(args, *rest, standalone_mode=False, **more)
        received: list[int] = []
        try:
            with signals.stopping(received):
                _leave(self._end_of(parent, args, rest, more, received), received)
        except KeyboardInterrupt:  # as this began, or ended
            _leave(self._said(received), received)

    def _end_of(
        self, parent: Any, args: Any, rest: Any, more: Any, received: list[int]
    ) -> tuple[str, int]:
        """Run; return the message, where there is one, and the exit code."""
        try:
            result = parent.main(args, *rest, standalone_mode=False, **more)
        except click.UsageError as error:
            name = error.ctx.command_path if error.ctx else self.program
            return f"{error.format_message()} (see {name} --help)", 2
        except (click.Abort, KeyboardInterrupt):
            return self._said(received)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            is_stopped = signals.were_behind(error, received)
            ended = self._said(received) if is_stopped else (_message(error), 1)
            if log.isEnabledFor(logging.DEBUG):
                click.echo(printable(traceback.format_exc()), err=True, nl=False)
            return ended
        return "", result if isinstance(result, int) else 0  # --help returns 0

    def _said(self, received: list[int]) -> tuple[str, int]:
        return signals.said(received, any(each.name == "epochs" for each in self.params))


class Command(Program):
    """One command; options may have several values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before every further value, which is the form that click itself takes."""
        listed = [each for each in self.params if isinstance(each, click.Option)]
        flags = {flag for each in listed if each.multiple for flag in each.opts}
        spread: list[str] = []
        current, fresh = "", False
        for arg in args:
            is_flag = arg.startswith("-") and not options.is_number(arg)
            if is_flag:
                current = arg if arg in flags else ""
            elif current and not fresh:
                spread.append(current)
            fresh = is_flag
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _leave(ended: tuple[str, int], received: list[int]) -> NoReturn:
    """Say the one line, where there is one, and end the process."""
    message, code = ended
    is_other = int(os.environ.get("RANK", "0")) > 0  # of several processes one says so
    if message and not (received and is_other):
        click.echo("Error: " + one_line(message), err=True)
    sys.exit(code)


def _message(error: Exception) -> str:
    """Say what went wrong and what to do; raise again what no user can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        said = error.strerror or error
        return f"{name}{said}; check the path, its permissions and the space left."
    # torch, which is not imported here, has two errors of its own: for a full GPU, a full machine
    is_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if is_torch or isinstance(error, MemoryError):
        return "out of memory; use smaller batches (see --help) or a smaller model."
    if signals.WORKER in str(error):
        return "a process that prepares batches was ended, perhaps for memory; run this again."
    raise error


def _set_up_logging() -> None:
    """Log to stderr; stdout is for the report alone."""
    context = click.get_current_context()
    verbose, quiet = context.meta.get(VERBOSE), context.meta.get(QUIET)
    if verbose and quiet:
        raise click.UsageError("-v shows more and -q shows less; give one of them.", context)
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(level)
    os.environ["COMPOSABLE_PROGRESS"] = "0" if quiet else "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if verbose else "error")
