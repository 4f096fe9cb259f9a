"""How a command declares its options: as fields of a frozen dataclass, which it gets filled in."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from composable.commands import paths
from composable.commands.paths import DATA, NO_PATH, READ, WRITTEN, Use

if TYPE_CHECKING:
    from composable.training.options import Options

#: Headings of --help, in this order; the general options come last.
FILES, WHAT, TRAINING, MACHINE = "Files", "What to do", "Training", "Machine"
GROUPS = (FILES, WHAT, TRAINING, MACHINE)
CHECKPOINTS = "checkpoints"  # folder within that of --workdir
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


class _Seed(click.IntRange):
    """A seed that torch and numpy take; its largest number is of no interest in --help."""

    def _describe_range(self) -> str:
        return ""


SEED = _Seed(0, 2**32 - 1)


def option(*flags: str, help: str, group: str = WHAT, default: Any = None, **settings: Any) -> Any:
    """Declare an option: the value of a field of a command's settings.

    Args:
        flags: as the command line spells it.
        help: a sentence. It ends with "[default: ...]" where `default` does not say it.
        group: heading of --help under which it stands.
        default: its value where it is not given; a tuple takes several values after one flag.
        settings: `only`, a pair of the name of another option and the values of it with which
            this one has an effect; all others are of `click.Option`.
    """
    many = {"multiple": True} if isinstance(default, tuple) else {}
    only = settings.pop("only", None)
    is_number = isinstance(settings.get("type"), click.IntRange | click.FloatRange)
    named = {"metavar": "X"} if is_number else {}
    words = {"help": help, "default": default, **many, **named, **settings}
    about = {"flags": flags, "group": group, "only": only, "settings": words}
    return dataclasses.field(default=default, metadata=about)


def path(*flags: str, use: Use, default: Any = None, help: str, **settings: Any) -> Any:
    """Declare an option that takes a path; `use` says whether it is read or written."""
    words = {"group": FILES, "type": PATH, "use": use, **settings}
    return option(*flags, help=help, default=default, **words)


def argument(name: str, use: Use, default: Any = None, **settings: Any) -> Any:
    """Declare a path that is given without a flag."""
    words = {"use": use, "type": PATH, "default": default, **settings}
    return dataclasses.field(default=default, metadata={"argument": name, "settings": words})


class Option(click.Option):
    """An option with a heading, perhaps a condition, and what is done with the path it takes."""

    def __init__(self, *args: Any, group: str, only: Any, use: Use = NO_PATH, **settings: Any):
        super().__init__(*args, **settings)
        self.group, self.only, self.use = group, only, use


def parameters(settings: type) -> list[click.Parameter]:
    """Make click's parameters of the fields of a dataclass, in the order of --help."""
    made: list[click.Parameter] = []
    for field in dataclasses.fields(settings):
        about = field.metadata
        if "argument" in about:
            words = dict(about["settings"])
            made.append(paths.PathArgument([field.name], **words))
        elif "flags" in about:
            shape = {"group": about["group"], "only": about["only"], **about["settings"]}
            made.append(Option([*about["flags"], field.name], **shape))
    order = {name: place for place, name in enumerate(GROUPS)}
    own = settings.__annotations__  # files of the command itself before those of all trainings

    def place(each: click.Parameter) -> tuple[int, bool]:
        group = getattr(each, "group", "")
        return order.get(group, -1), group == FILES and each.name not in own

    return sorted(made, key=place)


def given() -> dict[str, str]:
    """Name of every option that the command line gives a value -> its flag."""
    context = click.get_current_context()
    found = [each for each in context.command.params if isinstance(each, Option)]
    source, is_given = context.get_parameter_source, ParameterSource.COMMANDLINE
    return {str(it.name): it.opts[0] for it in found if source(str(it.name)) is is_given}


def refuse(names: Collection[str], why: str) -> None:
    """Refuse the first of some options that the command line gives: it would have no effect.

    Args:
        names: of fields of the settings.
        why: end of a sentence that begins with the flag.

    Raises:
        click.UsageError: one of them is given.
    """
    for name, flag in given().items():
        if name in names:
            raise click.UsageError(f"{flag} {why}; leave it out.", click.get_current_context())


def refuse_without_effect(values: Mapping[str, Any]) -> None:
    """Refuse options whose condition (`only`) the others do not meet."""
    params = {str(each.name): each for each in click.get_current_context().command.params}
    for name, param in params.items():
        condition = getattr(param, "only", None)
        if condition and values[condition[0]] not in condition[1]:
            other = params[condition[0]].opts[0]
            refuse([name], f"has no effect with {other} {values[condition[0]]}")


def is_number(text: Any) -> bool:
    """Tell whether a word of a command line is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


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


class _Bytes(click.ParamType):
    """A size such as 512M or 1.5G; K, M and G are powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)", value.strip().upper())
        powers = {"": 0, "K": 1, "M": 2, "G": 3}
        size = int(Fraction(match[1]) * 1024 ** powers[match[2]]) if match else 0
        if size < 1:
            self.fail(
                f"{value!r} is no number of bytes above 0, which may end in K, M or G, such as "
                "512M or 4G.",
                param,
                ctx,
            )
        return size


class _Device(click.ParamType):
    """Where to compute; whether the machine has it is found when torch is there."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value, re.ASCII):
            self.fail(f"{value!r} is not auto, cpu, cuda or cuda:N.", param, ctx)
        return str(value)


class Registered(click.ParamType):
    """A name of a registry that is imported only for names which --help does not list."""

    name = "name"

    def __init__(self, listed: Collection[str], registry: Callable[[], Collection[str]]) -> None:
        self.listed, self.registry = listed, registry

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        if value not in self.listed and value not in (known := self.registry()):
            self.fail(f"{value!r} is not one of {', '.join(known)}.", param, ctx)
        return str(value)


class _Layers(click.ParamType):
    """Numbers of layers, separated by commas: each once, ascending."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            self.fail(f"{value!r} is no list of numbers from 0, such as 3,4,5.", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class _Picture(click.Path):
    """A path that ends in .png."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not str(value).lower().endswith(".png"):
            self.fail(f"{str(value)!r}: pictures are PNG files; end the name in .png.", param, ctx)
        return super().convert(value, param, ctx)


BYTES, DEVICE, LAYERS, PNG = _Bytes(), _Device(), _Layers(), _Picture(path_type=Path)
RATE, SIZE = Finite(0, 1), Finite(0, 1, min_open=True)


def model(default: str, help: str = "The dense model, a model file.") -> Any:
    """Declare -m/--model."""
    return path("-m", "--model", use=READ, default=Path(default), help=help)


def output(default: str | None, help: str, **settings: Any) -> Any:
    """Declare -o/--output."""
    place = None if default is None else Path(default)
    return path("-o", "--output", default=place, help=help, **{"use": WRITTEN, **settings})


def bundles(default: str) -> Any:
    """Declare -p/--pruned, which takes several."""
    text = "Bundles of variants; a configuration may take its variants from several."
    return path("-p", "--pruned", use=READ, default=(Path(default),), help=text)


def config() -> Any:
    """Declare -c/--config, of a file of configurations."""
    text = "The file of configurations."
    return path("-c", "--config", use=READ, default=Path("conf.json"), help=text)


def index() -> Any:
    """Declare -n/--index."""
    text = "Which of the configurations is composed, counted from 0."
    return option("-n", "--index", help=text, default=0, type=click.IntRange(min=0))


def stats(default: str, **settings: Any) -> Any:
    """Declare --stats."""
    text = "The losses of every epoch, a CSV file, which plot_loss.py draws."
    words = {"use": WRITTEN, **settings}
    return path("--stats", default=Path(default), help=text, **words)


def data(help: str = "") -> Any:
    """Declare --data; `help` says more of it."""
    text = "Folder or file with the data of the model's task; for translation also the words "
    end = "[default: what the model file names; for translation else multi30k]"
    words = f'{text}"embedded" and "multi30k". {help} {end}'
    return path("--data", use=DATA, type=str, help=" ".join(words.split()))


def limit(help: str) -> Any:
    """Declare --limit."""
    return option("--limit", help=help, type=COUNT, group=FILES, metavar="N")


def calibration(**settings: Any) -> Any:
    """Declare --calibration."""
    text = "Statistics of the modules' inputs; read if the file exists, else measured and written."
    default = Path("calibration.npy")
    return path("--calibration", use=paths.BOTH, default=default, help=text, **settings)


#: How much of a calibration set is read where nothing is said.
ENOUGH = "until every stack has 65,536 tokens, or patches of images"
UNTIL_ENOUGH = f"[default: {ENOUGH}]"
CALIBRATED = f"Measure the first N training samples only (lines, of a text). {UNTIL_ENOUGH}"
HELD_OUT = (
    "Measure the first N training samples only (lines, of a text), and for held-out errors a "
    f"quarter as many of the validation split. {UNTIL_ENOUGH}"
)
LIMITED = "Read the first N samples of each split only (lines, of a text)."
MEASURED = "Its training split is measured, where --calibration does not exist yet."


def memory_budget(**settings: Any) -> Any:
    """Declare --memory-budget."""
    text = "Memory for statistics and recorded inputs; what does not fit takes more passes."
    words: dict[str, Any] = {"type": BYTES, "group": MACHINE, **settings}
    return option("--memory-budget", help=text, default="2G", **words)


def gqa(default: str | None = "per-group", help: str = "", **settings: Any) -> Any:
    """Declare --gqa; `help` says more of it."""
    text = (
        "Where several query heads share a key/value head: the same number of heads leaves every "
        f"group, or whole groups leave with their key/value head. {help}"
    )
    choice = click.Choice(["per-group", "whole-groups"])
    return option("--gqa", help=text.strip(), default=default, type=choice, **settings)


def stack(help: str) -> Any:
    """Declare --stack."""
    return option("--stack", help=help, type=click.Choice(["encoder", "decoder"]))


def protect(help: str) -> Any:
    """Declare --protect."""
    shown: dict[str, Any] = {"metavar": "I,J..", "multiple": False, "show_default": False}
    return option("--protect", help=help, type=LAYERS, default=(), **shown)


def seed(help: str, group: str = WHAT, **settings: Any) -> Any:
    """Declare --seed."""
    return option("--seed", help=help, default=42, type=SEED, group=group, **settings)


def device() -> Any:
    """Declare --device."""
    text = "Where to compute: auto (a GPU, if there is one), cpu, cuda or cuda:N."
    return option("--device", help=text, default="auto", type=DEVICE, group=MACHINE)


def dtype(trains: bool, **settings: Any) -> Any:
    """Declare --dtype, of a command that trains or not."""
    where = "on a GPU or CPU" if trains else "on a GPU"
    text = (
        "Number type of matrix products (autocast); files keep theirs. auto: bfloat16 "
        f"{where} that computes in it, else float32."
    )
    choice = click.Choice(["auto", "float32", "bfloat16", "float16"])
    return option("--dtype", help=text, default="auto", type=choice, group=MACHINE, **settings)


def epochs(default: int | None, help: str = "", **settings: Any) -> Any:
    """Declare --epochs; `help` says more of it."""
    text = f"Passes over the training data at most{help}"
    return option("--epochs", help=text, default=default, type=COUNT, group=TRAINING, **settings)


def batch_size(help: str, **settings: Any) -> Any:
    """Declare --batch-size."""
    text = f"Samples of an optimizer step, over all processes. {help}"
    return option("--batch-size", help=text, type=COUNT, group=TRAINING, **settings)


def lr(help: str, **settings: Any) -> Any:
    """Declare --lr."""
    positive = Finite(min=0, min_open=True)
    return option("--lr", help=help, type=positive, group=TRAINING, **settings)


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Options of a training of a whole model."""

    data: str | None = data()
    limit: int | None = limit(LIMITED)
    epochs: int = epochs(
        4, "; training ends earlier after 2 epochs without a lower validation loss."
    )
    steps: int = option(
        "--steps",
        help="End after so many optimizer steps; the learning rate falls to 0 over them. 0: "
        "--epochs says when.",
        default=0,
        type=click.IntRange(min=0),
        group=TRAINING,
    )
    batch_size: int | None = batch_size("[default: 64, or 8 windows of a language model]")
    lr: float | None = lr("Peak learning rate, relative to the size of each matrix.", default=2e-3)
    seed: int = seed("Seed of the order of samples and of dropout.", TRAINING)
    save_steps: int | None = option(
        "--save-steps",
        help="Also write a checkpoint after every so many steps within an epoch; 0: only at the "
        "ends of epochs. [default: about every 10 minutes; of several processes 0]",
        type=click.IntRange(min=0),
        group=TRAINING,
    )
    device: str = device()
    dtype: str = dtype(trains=True)
    workdir: Path = Path()


def training_of(settings: Any) -> "Options":
    """Make the settings of a training of those fields that have the names of its own."""
    from composable.training.options import EARLY_STOP, Options

    names = {field.name for field in dataclasses.fields(Options)}
    own = {name: value for name, value in vars(settings).items() if name in names}
    folder = settings.workdir / CHECKPOINTS
    return Options(**own, early_stop=EARLY_STOP, checkpoint_dir=folder).resolved()
