"""Files that appear whole or not at all, and the hashes of their content."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from composable.errors import FormatError, UserError


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
        return parse_json(Path(path).read_bytes())
    except FormatError as error:
        raise FormatError(f"{path}: {error}.") from error


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON: UTF-8, no key twice in one object, no NaN and no infinities.

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

    try:
        return json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a JSON file ({error})") from error


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
