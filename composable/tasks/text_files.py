"""Text files, plain or gzip: one encoding, lines as they are asked for, no more than a bound."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from composable.errors import FormatError
from composable.files import MOST_BYTES, open_input

MOST_LINES = 10_000_000  # of one file; short ones take fifty times their size in memory
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class _Bounded(io.RawIOBase):
    """A stream of which at most `MOST_BYTES` can be read."""

    def __init__(self, inner: Any, name: object):
        self._inner, self._name, self._read = inner, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._inner.readinto(buffer))
        self._read += count
        if self._read > MOST_BYTES:
            raise FormatError(
                f"{self._name}: has more than {MOST_BYTES:,} bytes"
                f"{' when decompressed' if isinstance(self._inner, gzip.GzipFile) else ''}, the "
                "most that is read of one file; give a part of it."
            )
        return count


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed where its name ends in .gz; `MOST_BYTES` of it can be read.

    Raises:
        FormatError: it is damaged, or has more bytes.
        OSError: it cannot be opened, or is a pipe or a device.
    """
    with open_input(path) as raw:
        inner: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            yield io.BufferedReader(_Bounded(inner, path), 2**16)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FormatError(f"{path}: cannot be read as text ({error}).") from error


def lines(path: Path) -> Iterator[str]:
    r"""Read a UTF-8 file line by line, each line with the end that it has in the file.

    Lines end with `\n`, `\r\n` or, in a file without any `\n`, with `\r`. A byte order mark at the
    start of the file is left out.

    Raises:
        FormatError: it is no UTF-8, has more than `MOST_LINES`, or as of `opened`.
    """
    for number, line in enumerate(_all_lines(path), 1):
        if number > MOST_LINES:
            raise FormatError(
                f"{path}: has more than {MOST_LINES:,} lines, the most that are read of one file; "
                "give a part of it."
            )
        yield line


def _all_lines(path: Path) -> Iterator[str]:
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            line = _decoded(path, number, raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b""))
            if number == 1 and not line.endswith("\n"):  # the whole file
                yield from (each[0] for each in re.finditer(r"[^\r]*\r|[^\r]+", line))
            else:
                yield line


def _decoded(path: Path, number: int, raw: bytes) -> str:
    if b"\0" in raw or (number == 1 and raw.startswith(_WIDE)):
        raise FormatError(
            f"{path}: cannot be read as text (line {number} looks like UTF-16, or is no text); "
            "save it as UTF-8."
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: cannot be read as text (line {number}: {error}); save it as UTF-8."
        ) from error


def read_text(path: Path) -> str:
    """Read a file as one text, exactly as its `lines` are."""
    return "".join(lines(path))


def parse_json(text: str) -> Any:
    """Parse JSON; NaN and infinities become None. Another text, or a key twice: a ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key occurs twice among {', '.join(key for key, _ in pairs)}")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=lambda _: None)
        if "\\ud" in text.lower():  # half a character is an error that is a ValueError
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValueError("lists or objects within each other, too many") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Parse JSON lines: number from 1, and value, of each that is not empty."""
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise FormatError(f"{path}: line {number} is not JSON ({error}).") from error
