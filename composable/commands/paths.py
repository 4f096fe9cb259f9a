"""What every path of a command line is for, and that no output is also an input."""

import errno
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Use:
    """What a command does with a path that it is given.

    Attributes:
        reads: the file, or files of the folder.
        writes: the same; a calibration, which is read if it exists, is both.
        inside: pattern of the files of a folder that are read, relative to it.
        is_folder: what is written is a folder, in which other outputs may lie.
        also: the path -> further ones that are written with it.
        default: all options of the command -> the path, where none is given.
    """

    reads: bool = False
    writes: bool = False
    inside: str = ""
    is_folder: bool = False
    also: Callable[[Path], tuple[Path, ...]] | None = None
    default: Callable[[Mapping[str, Any]], Any] | None = None


NO_PATH = Use()
#: What a training keeps until it is done: folders of its own, see `runs`.
CHECKPOINTS = Use(writes=True, is_folder=True, inside=r"[a-z]+-[0-9a-f]{16}/.+")
READ, WRITTEN, BOTH = Use(reads=True), Use(writes=True), Use(reads=True, writes=True)
#: Data are named after their splits, or as the package datasets saves them; models are not data.
_SPLIT = r"(train|val|valid|validation|dev|test)(_matched|_2016_flickr|-v[0-9.]+)?"
DATA = Use(
    reads=True,
    inside=rf"(?i)((wiki\.|ptb\.)?{_SPLIT}(\.[^/]+|/[^/]+/.+)|"
    r"(.*/)?(state|dataset_info|dataset_dict)\.json|.*\.arrow)(?<!\.pth)(?<!\.npy)",
)


class PathArgument(click.Argument):
    """A path, or several, without a flag."""

    def __init__(self, *args: Any, use: Use, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.use = use


@dataclass(frozen=True)
class _Named:
    """One path of a command line; `flag` is what the user calls it."""

    flag: str
    path: Path
    use: Use

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"


def check(context: click.Context, options: dict[str, Any], checkpoints: Path | None = None) -> None:
    """Fill in the paths that others stand for, and refuse what would destroy an input.

    Args:
        context: of the command.
        options: name -> value; those that were not given get the default of their `Use`.
        checkpoints: folder in which a training keeps its own.

    Raises:
        click.UsageError: an output is an input, or a file of a folder that is read, or two outputs
            are one file, whatever links lead there.
        OSError: an input is a device, a pipe, or a circle of links.
    """
    found = list(_named(context.command, options))
    if checkpoints is not None:
        found.append(_Named("the checkpoints", checkpoints, CHECKPOINTS))
    for each in found:
        _refuse_special(each)
    for one, other in itertools.permutations(found, 2):
        problem = _problem(one, other)
        if problem:
            raise click.UsageError(f"{other}: {problem}; name another file to write.", context)


def _named(command: click.Command, options: dict[str, Any]) -> Iterator[_Named]:
    for parameter in command.params:
        name, use = str(parameter.name), getattr(parameter, "use", NO_PATH)
        if use is NO_PATH:
            continue
        if options.get(name) in (None, ()) and use.default is not None:
            options[name] = use.default(options)
        value = options.get(name)
        word = str(parameter.metavar or name.upper()).strip("[].")
        flag = word if isinstance(parameter, PathArgument) else parameter.opts[0]
        for path in value if isinstance(value, tuple) else (value,) if value is not None else ():
            yield _Named(flag, Path(path), use)
            for made in use.also(Path(path)) if use.also is not None else ():
                yield _Named(flag, made, Use(writes=True))


def _problem(one: _Named, other: _Named) -> str:
    """Say why `other` must not be written, "" where it may."""
    if not other.use.writes:
        return ""
    if _same(one.path, other.path):
        return f"is the file of {one}" if one.use.reads else f"is written by {one}, too"
    place, folder = Path(os.path.realpath(other.path)), os.path.realpath(one.path)
    if not place.is_relative_to(folder):
        return ""
    if one.use.writes and not one.use.is_folder:
        return f"lies in {one}, which is a file"
    is_there = one.use.writes or one.path.is_dir()
    if is_there and re.fullmatch(one.use.inside, str(place.relative_to(folder))):
        # a new file is read there by the next command
        return f"is read as a part of {one}" if one.use.reads else f"would be removed with {one}"
    return ""


def _same(one: Path, other: Path) -> bool:
    """Tell whether two paths lead to one file, also one that does not exist yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)  # hard links, and file systems that ignore case
    except OSError:
        return False


def _refuse_special(named: _Named) -> None:
    """Refuse what can never be read, as it might make a command wait for ever, and odd names.

    Names that are no UTF-8 fit into no file of ours, and some libraries cannot open them.
    """
    try:
        f"{named.path} {Path(os.path.realpath(named.path)).name}".encode()
    except UnicodeEncodeError as error:
        problem = "the name is not UTF-8; rename it"
        raise click.UsageError(f"{named}: {problem}.", click.get_current_context()) from error
    try:
        mode = os.stat(named.path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
        return
    if named.use.reads and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is no ordinary file, which was expected", str(named.path))
