"""A zip archive with a seal, the SHA-256 of all its bytes: written, and read as it was verified."""

import hashlib
import io
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from composable import files
from composable.errors import FormatError
from composable.progress import bytes_of

SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + 64  # bytes
PIECE = 1 << 20  # bytes that are verified at once


def sealed(archive: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """Add the seal to a zip archive without comment.

    Yields:
        Pieces of the file: the archive with the length of a comment in its last two bytes, and as
        the comment "sha256:" and the SHA-256 (hex) of all bytes before the digits.
    """
    start = struct.pack("<H", SEAL_SIZE) + SEAL
    total = hashlib.sha256()
    end = len(archive) - 2
    for place in range(0, end, PIECE):
        piece = archive[place : min(place + PIECE, end)]
        total.update(piece)
        yield piece
    total.update(start)
    yield start
    yield total.hexdigest().encode()


@contextmanager
def open_sealed(path: Path, expected: str) -> Iterator[BinaryIO]:
    """Compare every byte of a file with its seal, and open it to read these bytes and no others.

    Yields:
        A binary file that reads from the disk what it is asked for, and compares it again, piece
        by piece, with what the seal was compared with. So a file that is overwritten meanwhile
        is noticed, and nobody needs a second copy of it in memory.

    Raises:
        FormatError: no such file, or not as it was written; also when a byte that is read from
            what was yielded is no longer what it was. `expected` says in messages what a file is.
        OSError: the file cannot be read.
    """
    with files.open_input(path) as file:
        verified = _Verified(path, file, *_verify(path, file, expected))
        try:
            yield verified
        except Exception:
            # whoever reads, such as torch, may say something else about an error of ours
            if verified.problem is not None:
                raise verified.problem from None
            raise


def check_sizes(file: BinaryIO, most: int = 0) -> None:
    """Refuse a zip archive that would become larger than its file, and than `most` bytes.

    Raises:
        FormatError: it would, or it is no archive.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            whole = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FormatError(f"no readable archive ({error})") from error
    file.seek(0)
    if whole > max(size, most):
        raise FormatError(f"an archive of {size} bytes that says it holds {whole}")


def _verify(path: Path, file: BinaryIO, expected: str) -> tuple[int, list[bytes]]:
    """Compare a file with its seal; return its size, and a digest of each of its pieces."""
    start = file.read(4)
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - SEAL_SIZE))
    end = file.read(SEAL_SIZE)
    file.seek(0)
    if start != b"PK\x03\x04":
        raise FormatError(
            f"{path}: not a model file of this tool (starts with {start!r}); {expected}"
        )
    if not end.startswith(SEAL):
        raise FormatError(
            f"{path}: its {size} bytes do not end as a model file does: it was cut off, or "
            "something was appended, or it holds pickled Python objects, which are never "
            f"executed; {expected}"
        )
    total, digests, left = hashlib.sha256(), [], size
    with bytes_of(f"check {path.name}", size) as stage:
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise _changed(path)
            total.update(piece[: max(0, left - 64)])
            digests.append(_digest(piece))
            left -= len(piece)
            stage.update(len(piece))
    if total.hexdigest().encode() != end[len(SEAL) :]:
        raise FormatError(f"{path}: checksum does not match, the file is damaged; make it again.")
    return size, digests


def _digest(piece: bytes) -> bytes:
    return hashlib.sha256(piece).digest()


def _changed(path: Path) -> FormatError:
    return FormatError(
        f"{path}: was overwritten while it was read; run the command again when it is complete."
    )


class _Verified(io.RawIOBase, BinaryIO):
    """What `open_sealed` yields; `problem` is why a read failed."""

    def __init__(self, path: Path, file: BinaryIO, size: int, digests: list[bytes]) -> None:
        self._path, self._file, self._size, self._digests = path, file, size, digests
        self._place = 0
        self._number, self._piece = -1, b""  # of the piece that was read last
        self.problem: FormatError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as of any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with verified bytes, as far as there are some."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._place < self._size:
            number, first = divmod(self._place, PIECE)
            part = memoryview(self._verified(number))[first : first + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._place += len(part)
        return done

    def _verified(self, number: int) -> bytes:
        """Read a piece, if it is not the one that was read last."""
        if number != self._number:
            self._file.seek(number * PIECE)
            piece = self._file.read(PIECE)
            if _digest(piece) != self._digests[number]:
                self.problem = _changed(self._path)
                raise self.problem
            self._number, self._piece = number, piece
        return self._piece
