"""The few errors that a user can cause; the command line turns each into one line on stderr."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Bad input: the message says what, the value met, what was expected, and what to do."""


class ConfigError(UserError):
    """conf.json or conf_prune.json is at fault."""


class FormatError(UserError):
    """A bundle, model or data file is not what it should be, or is damaged."""


class MismatchError(UserError):
    """Two inputs do not belong together: another model, another configuration."""


class NoDataError(UserError):
    """Data are needed, and nothing says where they are."""


class ShapeError(UserError):
    """A tensor or module does not have the shape that an operation needs."""


def find_named(table: Iterable[T], name: str, what: str) -> T:
    """Find the entry of a table that has a name.

    Args:
        table: entries with an attribute `name`.
        name: as the user wrote it.
        what: an entry is called in the message ("task").

    Raises:
        UserError: there is none; the message lists the known names.
    """
    entries: Iterable[Any] = table
    known: dict[str, T] = {entry.name: entry for entry in entries}
    if name not in known:
        raise UserError(f'unknown {what} "{name}"; known are {", ".join(known)}.')
    return known[name]


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn whatever a library raises over a file into one line.

    Args:
        what: went wrong, with the file or folder.

    Raises:
        UserError: with the library's words in brackets.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # the Rust part of tokenizers panics with an exception that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({shortened(said_by(error))}).") from error


def said_by(error: BaseException) -> str:
    """Return an error's message on one line; with its class where it says little."""
    text = " ".join(str(error).split()).rstrip(".")
    text = re.sub(r"^(Class v|V)alidation error for (validator|field) '\w+': \w+: ", "", text)
    return text if " " in text else f"{type(error).__name__}: {text}"


def shortened(text: str, most: int = 300) -> str:
    """Cut a text that is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def listed(names: Sequence[str], most: int = 3) -> str:
    """Name the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
