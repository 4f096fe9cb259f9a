"""The few errors that a user can cause; the command line turns each into one line on stderr."""

from collections.abc import Iterable
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
