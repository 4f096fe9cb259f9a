"""The container of bundles and calibrations, opened and put together again by hand."""

from pathlib import Path

import numpy as np
import pytest

from composable.formats.container import Data, header_checksum


def as_npy(path: Path, payload: bytes) -> None:
    """Write bytes as numpy itself would, so that the array header is right."""
    np.save(path, np.frombuffer(payload, np.uint8))


def rewrite_header(path: Path, old: str, new: str) -> None:
    """Change the JSON header and make checksum, length and array header right again."""
    payload = np.load(path).tobytes()
    length = int.from_bytes(payload[:8], "little")
    text = payload[8 : 8 + length].decode().rstrip(" ")
    assert old in text
    header = text.replace(old, new, 1).encode()
    header += b" " * (-len(header) % 8)
    header = header[:29] + header_checksum(header) + header[93:]
    as_npy(path, len(header).to_bytes(8, "little") + header + payload[8 + length :])


def read_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all that is read from the data of files from now on."""
    sizes: list[int] = []
    read = Data.read

    def counted(self: Data, begin: int, end: int) -> np.ndarray:
        sizes.append(end - begin)
        return read(self, begin, end)

    monkeypatch.setattr(Data, "read", counted)
    return sizes
