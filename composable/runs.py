"""Folders of unfinished runs: locked, their content sealed, abandoned ones listed."""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from composable import files
from composable.errors import FormatError, UserError

log = logging.getLogger("composable")
LOCK, SEAL = "lock", "seal.json"
FORMAT, VERSION = "composable.seal", 1
NAME = re.compile("[a-z]+-[0-9a-f]{16}")  # of a run's folder
_held: set[int] = set()  # descriptors of locks; forked processes must not keep a dead run's lock


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class RunFolder:
    """The folder of one run, locked until `release` or the end of the process.

    Args:
        path: the folder; it is made when it is absent.
        is_main: of several processes one holds the lock; the others pass False.

    Raises:
        UserError: an equal run is at work there.
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, is_main: bool = True):
        self.path, self._descriptor, self._process = path, -1, os.getpid()
        path.mkdir(parents=True, exist_ok=True)
        if is_main:
            self._lock()
            files.remove_leftovers(path)
            self._list_others()

    def clear(self) -> None:
        """Remove what earlier runs left."""
        for entry in self.path.iterdir():
            if entry.name != LOCK:
                remove(entry)

    def release(self, remove: bool = False) -> None:
        """Let other runs in; `remove` what this one would have gone on from."""
        if self._descriptor < 0 or self._process != os.getpid():
            return
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.release()

    def _lock(self) -> None:
        path = self.path / LOCK
        while self._descriptor < 0:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                files.require_ordinary(os.fstat(descriptor), path)
                if not _is_free(descriptor, tries=5):
                    raise UserError(
                        f"{self.path}: {_holder(descriptor)} is at work on the same; wait until it "
                        "has ended, stop it, or choose another checkpoint_dir."
                    )
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        self._descriptor = descriptor
                        _held.add(descriptor)
            finally:
                if self._descriptor < 0:  # refused, or removed by a run that ended just now
                    os.close(descriptor)
                    self.path.mkdir(parents=True, exist_ok=True)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        note = {"process": os.getpid(), "machine": socket.gethostname(), "since": started}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(note).encode(), 0)

    def _list_others(self) -> None:
        """Say which other runs left something here that nobody works on."""
        found = []
        for path in sorted(self.path.parent.iterdir()):
            if path != self.path and NAME.fullmatch(path.name) and _is_abandoned(path):
                size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
                found.append(f"{path.name} ({size / 1e6:.1f} MB)")
        if found:
            log.info(
                "%s: keeps what unfinished runs of other inputs or options would go on from: %s; "
                "delete the folders that you do not need.",
                *(self.path.parent, ", ".join(found)),
            )


def _is_free(descriptor: int, tries: int = 1) -> bool:
    """Lock an open file, or tell that another process has; where locks are unknown all is free."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1 * (left > 0))  # a run that lists abandoned ones holds it for a moment
        except OSError:  # of a file system without locks
            return True
        else:
            return True
    return False


def _is_abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return folder.is_dir()
    except OSError:
        return False
    try:
        return _is_free(descriptor)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """Who wrote a lock file."""
    try:
        note = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {note['process']} on {note['machine']} (since {note['since']})"
    except (ValueError, KeyError, TypeError):  # it is about to write
        return "another run"


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Put everything in a folder on the disk, and last its digests: it is whole from now on."""
    entries = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.name] = [path.stat().st_size, digest]
    content = {"format": FORMAT, "version": VERSION, "of": _place(folder), "files": entries}
    files.write_json(folder / SEAL, content)
    files.sync_folder(folder.parent)


def check_seal(folder: Path, only: Sequence[str] = ()) -> None:
    """Read the files of a sealed folder and compare them with the seal.

    The seal also names the folder and the one around it, so that what lies there was made there.

    Args:
        folder: what `seal` was given.
        only: files to read; by default all. Names are compared in any case.

    Raises:
        FormatError: the folder was cut off, or something in it is changed, missing, a link or too
            many; the message is a part of a sentence.
    """
    try:
        content = files.parse_json(_read_plain(folder / SEAL))
    except FileNotFoundError as error:
        raise FormatError("was cut off while being written") from error
    except (FormatError, OSError) as error:
        raise FormatError(f"is damaged ({SEAL} is not readable)") from error
    expected = {"format": FORMAT, "version": VERSION, "of": _place(folder)}
    entries = content.get("files") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or content != {**expected, "files": entries}:
        raise FormatError(f"is damaged ({SEAL} is another's)")
    if folder.is_symlink():
        raise FormatError("is damaged (a link)")
    odd = {path.name for path in folder.iterdir()} ^ {SEAL, *entries}
    if odd:
        raise FormatError(f"is damaged ({min(odd)} is missing, or is not of it)")
    for name, entry in entries.items():
        if (name in only or not only) and entry != _size_and_digest(folder / name):
            raise FormatError(f"is damaged ({name} was changed)")


def _size_and_digest(path: Path) -> list[int | str] | None:
    try:
        with os.fdopen(_open_plain(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return [size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None


def _read_plain(path: Path) -> bytes:
    with os.fdopen(_open_plain(path), "rb") as file:
        return file.read()


def _open_plain(path: Path) -> int:
    """Open a file that is no link; a pipe does not make it wait."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def write_sealed(path: Path, content: bytes) -> None:
    """Write one file with its digest in front, over the content and its place."""
    files.write_bytes(path, _digest(path, content) + content)


def read_sealed(path: Path) -> bytes:
    """Read what `write_sealed` wrote.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is damaged; the message is a part of a sentence.
    """
    try:
        content = _read_plain(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"is damaged ({error.strerror})") from error
    size = hashlib.sha256().digest_size
    if content[:size] != _digest(path, content[size:]):
        raise FormatError("is damaged")
    return content[size:]


def _digest(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(_place(path).encode() + b"\0" + content).digest()


def _place(path: Path) -> str:
    """Where something lies within the folder of all runs."""
    return f"{path.parent.name}/{path.name}"
