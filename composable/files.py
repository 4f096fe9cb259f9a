"""Files that appear whole or not at all, and the hashes of their content."""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from composable.errors import FormatError, UserError

log = logging.getLogger("composable")
MOST_DEEP = 100  # lists and objects within each other
MOST_BYTES = 2**30  # that are read of one file
TEMPORARY = ".composable.tmp"  # how the name of a file ends while it is written
LONGEST_NAME = 255  # bytes, on the usual file systems
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Outputs that are still to be written, see `reads_no_output`.
_awaited: ContextVar[list[Path]] = ContextVar("awaited outputs")


@contextmanager
def reads_no_output() -> Iterator[None]:
    """Let `open_input` refuse what `check_writable` was given, until that is written.

    So no input is lost, whatever named it: a model file, too, says where its data are.
    """
    before = _awaited.set([])
    try:
        yield
    finally:
        _awaited.reset(before)


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
    with _naming(path):
        target = _target_of(path)
        made, file = _open_temporary(target)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                made.replace(target)  # while it is locked: see `remove_leftovers`
            _awaited.get([])[:] = [one for one in _awaited.get([]) if one != target]
            sync_folder(target.parent)
        finally:
            made.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Do for a folder what `atomic_write` does for a file; errors as of `check_folder`."""
    path = Path(path)
    check_folder(path)
    target = Path(os.path.realpath(path))
    made = _beside(target)
    made.mkdir()
    descriptor = os.open(made, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield made
        with _naming(path):
            if target.is_dir():
                target.rmdir()
            made.replace(target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """Name a temporary file or folder that is later renamed to `path`; no longer than allowed."""
    ending = f".{secrets.token_hex(4)}{TEMPORARY}"
    name = path.name.encode(errors="ignore")  # bytes of a name that is no UTF-8 are left out
    start = name[: LONGEST_NAME - 1 - len(ending)].decode(errors="ignore")
    return path.with_name(f".{start}{ending}")


def _open_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """Make a temporary file beside `target`, locked for as long as it is open."""
    while True:
        made = _beside(target)
        file = made.open("xb")
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if made.exists():  # else another run took it for a leftover before it was locked
            return made, file
        file.close()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed runs left in `folder`.

    A run holds a lock on what it writes, which ends with the process.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):  # held by a run, or of another user
            is_folder = path.is_dir()
            flags = os.O_RDONLY if is_folder else os.O_RDWR  # NFS locks what can be written
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_folder:
                    shutil.rmtree(path)
                else:
                    path.unlink()
                log.info("%s: removed, a run that was killed had left it.", path)
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where its file system can do so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the output in an error that names no file, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(TEMPORARY):
            error.filename = str(path)
        raise


@contextmanager
def os_errors(path: Path | str) -> Iterator[None]:
    """Turn what libraries in Rust raise where the system failed into an OSError that names `path`.

    safetensors and tokenizers raise errors of their own, with "(os error 28)" at their end.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def check_folder(path: Path) -> None:
    """Fail now where `path` could not be made at the end; folders above it are made.

    Raises:
        UserError: something is in the folder, or it is a file.
        OSError: it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; name a folder that does not, or is empty.")
    _try_writing(path)


def check_writable(*paths: Path | None) -> None:
    """Fail now, before hours of work, where one of `paths` could not be written at the end.

    Leftovers of killed runs beside them are removed, see `remove_leftovers`.

    Raises:
        OSError: a folder is missing and cannot be made, is read-only, or a target is a folder.
        UserError: one path is named for two outputs, or is what stdout or stderr are sent to.
    """
    seen: set[str] = set()
    for path in paths:
        if path is None:
            continue
        if os.path.realpath(path) in seen:
            raise UserError(f"{path}: is named for two outputs; give each a name of its own.")
        seen.add(os.path.realpath(path))
        with _naming(path):
            _awaited.get([]).append(_target_of(path))
        _try_writing(path)


def _try_writing(path: Path) -> None:
    """Make the temporary file that the output would be written to, and remove it."""
    target = Path(os.path.realpath(path))
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made, file = _open_temporary(target)
        file.close()
        made.unlink(missing_ok=True)
        remove_leftovers(target.parent)


def _target_of(path: Path) -> Path:
    """Follow links, which stay; refuse what a rename would destroy: folders, devices, pipes, logs.

    A log is what this process prints to, as /dev/stdout leads there: a rename would take it away.
    """
    target = Path(os.path.realpath(path))
    try:
        status = target.stat()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return target
    except OSError as error:  # a file where a folder should be, a link to itself, a long name
        error.filename = str(path)
        raise
    require_ordinary(status, path)
    for printed in (1, 2):  # stdout and stderr
        with suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(printed)):
                problem = "report and log are printed there; name another file to write"
                raise UserError(f"{path}: {problem}.")
    return target


def require_ordinary(status: os.stat_result, path: Path) -> None:
    """Raise OSError for a folder, a device or a pipe."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file was expected", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is no ordinary file, which was expected", str(path))


def open_input(path: Path) -> BinaryIO:
    """Open an ordinary file to read; a pipe or device, which may never end, is refused at once.

    Raises:
        OSError: the file cannot be read, or is none.
        UserError: it is to be written, see `reads_no_output`.
    """
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(opened)
        require_ordinary(status, path)
        _require_input(status, path)
        return open(opened, "rb")
    except BaseException:
        os.close(opened)
        raise


def _require_input(status: os.stat_result, path: Path) -> None:
    for output in _awaited.get([]):
        with suppress(OSError):  # not there yet
            if os.path.samestat(status, output.stat()):
                problem = "is to be written and is also read; name another file to write"
                raise UserError(f"{path}: {problem}.")


def read_bytes(path: Path, limit: int = MOST_BYTES) -> bytes:
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
    """Write `value` as `json_text` with a final newline, whole or not at all."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Return `value` as indented strict JSON; a `UserError` where it has NaN or an infinity."""
    try:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"a number of the report is not finite ({error}).") from error


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

    def no_constant(name: str) -> Any:
        raise FormatError(f"{name} is not a number that JSON knows; write a finite one")

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            no_constant(digits)
        return value

    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=unique_keys,
            parse_constant=no_constant,
            parse_float=finite,
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        said = str(error).partition(";")[0]  # of Python's limits, without how to lift them
        raise FormatError(f"not a JSON file ({said})") from error
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; a key twice is a FormatError."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise FormatError(f'key "{key}" occurs twice in one object; keep one of them')
        seen[key] = value
    return seen


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
