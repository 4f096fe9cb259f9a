"""What all scripts share: options, errors as exit codes, the closing JSON report."""

import dataclasses
import functools
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from composable import files
from composable.commands import paths, signals
from composable.commands.paths import BOTH, CHECKPOINTS, DATA, READ, Use  # for the commands, too
from composable.commands.paths import WRITTEN as WRITTEN
from composable.commands.terminal import Formatter, one_line, printable
from composable.errors import ConfigError, UserError

log = logging.getLogger("composable")
Function = Callable[..., Any]
Decorator = Callable[[Function], Function]
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**32 - 1)


def together(*options: Any) -> Decorator:
    """Join decorators that add options into one; --help lists them in this order."""
    return lambda function: functools.reduce(lambda f, option: option(f), options[::-1], function)


def command() -> Callable[[Function], click.Command]:
    """Make a script's main function a command.

    The function returns the report (a dict), which is printed to stdout as one JSON object with
    `seconds` added. A `UserError` or an `OSError` becomes one line on stderr and exit code 1, a
    wrong command line exit code 2, Ctrl-C exit code 130, SIGTERM 143 and SIGHUP 129; `--debug`
    shows the traceback.
    """

    def decorate(function: Function) -> click.Command:
        @functools.wraps(function)
        def run(verbose: bool, quiet: bool, debug: bool, **options: Any) -> None:
            _set_up_logging(verbose, quiet)
            started = time.perf_counter()
            paths.check(click.get_current_context(), options)
            with files.reads_no_output():
                report = function(**options)
            if report is not None and int(os.environ.get("RANK", "0")) == 0:
                report["seconds"] = round(time.perf_counter() - started, 3)
                click.echo(printable(files.json_text(report)))

        declared = together(
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("-q", "--quiet", is_flag=True, help="Log errors only, no progress bars."),
            click.option("-v", "--verbose", is_flag=True, help="Show the libraries' remarks too."),
        )
        settings = {"help_option_names": ["-h", "--help"], "show_default": True}
        return click.command(cls=_Command, context_settings=settings)(declared(run))

    return decorate


class _Command(click.Command):
    """Options may have several values; what goes wrong becomes one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before every further value, which is the form that click itself takes."""
        options = [each for each in self.params if isinstance(each, click.Option)]
        flags = {flag for option in options if option.multiple for flag in option.opts}
        spread: list[str] = []
        current, fresh = "", False
        for arg in args:
            is_flag = arg.startswith("-") and not _is_number(arg)
            if is_flag:
                current = arg if arg in flags else ""
            elif current and not fresh:
                spread.append(current)
            fresh = is_flag
            spread.append(arg)
        return super().parse_args(ctx, spread)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; click itself would answer Ctrl-C with an empty line on stderr."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error

    def main(self, args: Any = None, *rest: Any, **more: Any) -> Any:  # type: ignore[override]
        """Run; in standalone mode (the default) end the process with the exit code."""
        parent: Any = super()
        if not more.pop("standalone_mode", True):
            return parent.main(args, *rest, standalone_mode=False, **more)
        with signals.stopping() as received:
            try:
                result = parent.main(args, *rest, standalone_mode=False, **more)
            except click.UsageError as error:
                name = error.ctx.command_path if error.ctx else self.name  # the script as called
                message, code = f"{error.format_message()} (see {name} --help)", 2
            except (click.Abort, KeyboardInterrupt):
                message, code = self._said(received)
            except (UserError, OSError, MemoryError, RuntimeError) as error:
                is_stopped = signals.were_behind(error, received)
                message, code = self._said(received) if is_stopped else (_message(error), 1)
                if "--debug" in (sys.argv if args is None else args):
                    click.echo(printable(traceback.format_exc()), err=True, nl=False)
            else:
                sys.exit(result if isinstance(result, int) else 0)  # --help returns 0
            is_other = int(os.environ.get("RANK", "0")) > 0  # of several processes one says so
            if not (received and is_other):
                click.echo("Error: " + one_line(message), err=True)
        sys.exit(code)

    def _said(self, received: list[int]) -> tuple[str, int]:
        resumes = any(each.name == "resume" for each in self.params)
        return signals.said(received, resumes)


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
        return "a process that prepares batches was ended, perhaps for memory; use fewer --workers."
    raise error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _set_up_logging(verbose: bool, quiet: bool) -> None:
    """Log to stderr; stdout is for the report alone."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(level)
    os.environ["COMPOSABLE_PROGRESS"] = "0" if quiet else "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if verbose else "error")


class _Bytes(click.ParamType):
    """A size such as 512M or 1.5G; K, M and G are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes; a `UserError` where it is no size, or not above 0."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)", value.strip().upper())
        powers = {"": 0, "K": 1, "M": 2, "G": 3}
        size = int(Fraction(match[1]) * 1024 ** powers[match[2]]) if match else 0
        if size < 1:
            flag = param.opts[0] if param else self.name
            raise UserError(
                f"{flag} {value}: expected a number of bytes above 0, which may end in K, M or G, "
                "such as 512M or 4G."
            )
        return size


BYTES = _Bytes()


class Finite(click.FloatRange):
    """A finite number; click's own range lets NaN and infinity pass."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        """For --help; click writes "x<=None" where there is no bound."""
        return "" if self.min is self.max is None else super()._describe_range()


def path_option(
    *flags: str,
    use: Use,
    default: str | tuple[str, ...] | None = None,
    text: str,
    **settings: Any,
) -> Any:
    """Add an option that takes a path; `use` says whether it is read or written."""
    settings = {"type": PATH, "default": default, "help": text, **settings}
    return click.option(*flags, cls=paths.PathOption, use=use, **settings)


def path_argument(name: str, use: Use, **settings: Any) -> Any:
    """Add an argument that takes a path."""
    return click.argument(name, cls=paths.PathArgument, use=use, type=PATH, **settings)


def model_option(default: str, text: str = "Model file.") -> Any:
    """Add -m/--model."""
    return path_option("-m", "--model", use=READ, default=default, text=text)


def bundle_option(default: str) -> Decorator:
    """Add -p/--pruned, which may be given more than once."""
    text = "Bundle of variants; several meet in one model."
    flags = ("-p", "--pruned", "bundles")
    return path_option(*flags, use=READ, default=(default,), text=text, multiple=True)


def parse_numbers(text: str, flag: str) -> list[int]:
    """Read numbers of layers, separated by commas; each once, ascending."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise ConfigError(f"{flag} {text}: expected numbers of layers from 0, such as 3,4,5.")
    return sorted({int(part) for part in parts})


def given_options() -> dict[str, str]:
    """Name of every option that the command line gives a value -> its flag."""
    context = click.get_current_context()
    options = [each for each in context.command.params if isinstance(each, click.Option)]
    found = {str(option.name): option.opts[-1] for option in options}
    source, given = context.get_parameter_source, ParameterSource.COMMANDLINE
    return {name: flag for name, flag in found.items() if source(name) is given}


configuration_options = together(
    path_option("-c", "--config", use=READ, default="conf.json", text="File of configurations."),
    click.option("-n", "--index", default=0, help="Which configuration, from 0."),
)
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
#: What is read and where it runs.
data_options = together(
    path_option(
        "--data",
        use=DATA,
        type=str,
        text="Folder or file with the data of the model's task; for translation also "
        '"embedded" or "multi30k".  [default: what the model file says; for translation else '
        "multi30k]",
    ),
    click.option(
        "--limit", type=COUNT, help="Read so many samples (lines of a text) of each split only."
    ),
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Of autocast, not of files. auto: bfloat16 on a GPU that has it, and in trainings on "
        "a CPU that has it, else float32.",
    ),
)
offset_option = click.option(
    "--reference-offset",
    is_flag=True,
    help="Choose a block of N layers by the scores of N + 1, as short-transformers does.",
)
gqa_option = click.option(
    "--gqa",
    type=click.Choice(["per-group", "whole-groups"]),
    default="per-group",
    help="Where several query heads read one key/value head: equally many leave every group, or "
    "whole groups leave with their key/value head.",
)
#: Which distances count.
choice_options = together(
    click.option(
        "--stack",
        type=click.Choice(["encoder", "decoder"]),
        help="Whose layers, where a model has both.",
    ),
    click.option("--distance", help="Of the scores.  [default: the first of the file]"),
    offset_option,
)
#: How much of a calibration set is read where nothing is said.
UNTIL_ENOUGH = "until every stack has 65,536 tokens, or patches of images"
#: The statistics of the modules' inputs: where they are, of which texts.
calibration_options = together(
    path_option(
        "--calibration",
        use=BOTH,
        default="calibration.npy",
        text="Statistics of the inputs; read if it exists, else measured and written.",
    ),
    path_option(
        "--calibration-data",
        use=DATA,
        type=str,
        text="As --data: whose training samples are measured.  [default: as for --data]",
    ),
    click.option(
        "--calibration-samples",
        type=COUNT,
        help="How many of the training samples are measured (lines of a text).  "
        f"[default: {UNTIL_ENOUGH}]",
    ),
    click.option(
        "--held-out-samples",
        type=COUNT,
        help="How many of the validation samples are measured.  [default: a quarter of "
        "--calibration-samples, or until there are 16,384 tokens]",
    ),
    click.option(
        "--memory-budget",
        type=BYTES,
        default="2G",
        help="Memory for statistics and cached inputs; more modules than fit take more passes.",
    ),
)
_whole_model_options = (
    click.option(
        "--steps",
        type=click.IntRange(min=0),
        default=0,
        help="End after so many optimizer steps, with the whole schedule laid out over them; "
        "0: --epochs says when.",
    ),
    click.option(
        "--compile",
        is_flag=True,
        help="Compile the model (torch.compile); takes minutes at the start, so it is worth it "
        "for long trainings on a GPU only.",
    ),
)


def training_options(
    epochs: int | None, lr: float | None, early_stop: int, is_whole_model: bool = False
) -> Decorator:
    """Add the options of a training, with this script's defaults; they arrive as `training`.

    Args:
        epochs: default, as the next two.
        lr: peak learning rate.
        early_stop: patience in epochs.
        is_whole_model: adds `--steps` and `--compile`.
    """
    declared = together(
        click.option("--epochs", type=COUNT, default=epochs, help="At most."),
        click.option(
            "--batch-size",
            type=COUNT,
            help="Samples per step, over all processes.  [default: the task's, 64 or, for windows "
            "of text, 8; for hybrid a quarter]",
        ),
        click.option(
            "--lr",
            type=Finite(min=0, min_open=True),
            default=lr,
            help="Peak learning rate, relative to the size of each matrix.",
        ),
        click.option(
            "--early-stop",
            type=click.IntRange(min=0),
            default=early_stop,
            help="Epochs without improvement before it stops; 0: never.",
        ),
        click.option("--seed", type=SEED, default=42, help="Of sampling and dropout."),
        click.option("--resume/--no-resume", default=True, help="Continue an interrupted run."),
        path_option(
            "--checkpoint-dir",
            use=CHECKPOINTS,
            default="checkpoints",
            text="Where an unfinished run keeps its checkpoints.",
        ),
        click.option(
            "--save-steps",
            type=click.IntRange(min=0),
            help="Write a checkpoint after every so many steps of an epoch, too; 0: at the ends of "
            "epochs only.  [default: about every 10 minutes; of several processes 0]",
        ),
        click.option(
            "--report-to",
            type=click.Choice(["none", "tensorboard", "wandb"]),
            default="none",
            help="Where live curves go.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            default=0,
            help="Processes that prepare batches; worth it beside a GPU.",
        ),
        *(_whole_model_options if is_whole_model else ()),
        data_options,
    )

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def collect(**options: Any) -> Any:
            from composable.training.options import Options

            names = {field.name for field in dataclasses.fields(Options)} & set(options)
            training = Options(**{name: options.pop(name) for name in names}).resolved()
            shared = {"device": training.device, "dtype": training.dtype}
            return function(training=training, **shared, **options)

        return declared(collect)

    return decorate
