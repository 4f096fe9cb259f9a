"""Files that appear whole or not at all, and the hashes of their content."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from composable.errors import FormatError, UserError

MOST_DEEP = 100  # lists and objects within each other


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends well.

    Args:
        path: the target; its folder is made when it is absent.

    Yields:
        A binary file. On any error it is removed and an older file at `path` stays as it was.

    Raises:
        OSError: the folder cannot be written, the disk is full, `path` is a folder.
    """
    path = Path(path)
    _refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.resolve()  # a link stays one, what it leads to is written
    made = _beside(target)
    try:
        with made.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        made.replace(target)
    except OSError as error:
        # A failed write names no file; the user wants to know which output was meant.
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Do for a folder what `atomic_write` does for a file; UserError as of `check_folder`."""
    check_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = _beside(path)
    made.mkdir()
    try:
        yield made
        if path.is_dir():
            path.rmdir()
        made.replace(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Name a temporary file or folder that is later renamed to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def check_folder(path: Path) -> None:
    """Raise UserError where something is in the folder, or it is a file."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; name a folder that does not, or is empty.")


def check_writable(*paths: Path | None) -> None:
    """Fail now, before hours of work, where one of `paths` could not be written at the end.

    Raises:
        OSError: a folder is missing and cannot be made, is read-only, or a target is a folder.
        UserError: one path is named for two outputs.
    """
    seen: set[Path] = set()
    for path in paths:
        if path is None:
            continue
        if path.resolve() in seen:
            raise UserError(f"{path}: is named for two outputs; give each a name of its own.")
        seen.add(path.resolve())
        _refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _refuse_special(path: Path) -> None:
    """Refuse what a rename would destroy: folders, devices, pipes."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file was expected", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no ordinary file, which was expected", str(path))


def open_input(path: Path) -> BinaryIO:
    """Open an ordinary file to read; a pipe or device, which may never end, is refused at once.

    Raises:
        OSError: the file cannot be read, or is none.
    """
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(opened).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, a file was expected", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is no ordinary file, which was expected", str(path))
        return open(opened, "rb")
    except BaseException:
        os.close(opened)
        raise


def read_bytes(path: Path, limit: int = 1 << 30) -> bytes:
    """Read an ordinary file as a whole, once.

    Raises:
        FormatError: it has more than `limit` bytes.
        OSError: as of `open_input`.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise FormatError(f"{path}: has {size} bytes, at most {limit} were expected.")
    return content


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file of strict JSON, see `parse_json`, whose error gets the name of the file."""
    try:
        return parse_json(read_bytes(path))
    except FormatError as error:
        raise FormatError(f"{path}: {error}.") from error


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON: UTF-8, no key twice in one object, no NaN and no infinities.

    Lists and objects lie at most 100 deep within each other.

    The message of its FormatError is a part of a sentence.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise FormatError(f'key "{key}" occurs twice in one object; keep one of them')
            seen[key] = value
        return seen

    def no_constant(name: str) -> Any:
        raise FormatError(f"{name} is not a number that JSON knows; write a finite one")

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            no_constant(digits)
        return value

    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_float=finite,
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a JSON file ({error})") from error
    return value


def _check_depth(value: Any) -> None:
    """Raise ValueError for JSON that is too deep, or text that is no Unicode, for later code."""
    level = [value]
    for _ in range(MOST_DEEP):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not one.isascii():
                one.encode()
        if not below:
            return
        level = below
    raise ValueError(f"lists or objects within each other, more than {MOST_DEEP} deep")


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def assets(name: str) -> Path:
    """Find a folder of assets/, beside the package or in it; FormatError if it is in neither."""
    here = Path(__file__).resolve().parent
    clone, installed = here.parent / "assets" / name, here / "assets" / name
    if not (clone.is_dir() or installed.is_dir()):
        problem = f"is not in this installation (looked for {clone}); use a clone"
        raise FormatError(f"assets/{name} {problem}.")
    return clone if clone.is_dir() else installed
