"""The container of bundles and calibrations, opened and put together again by hand."""

import re
from pathlib import Path

import numpy as np

from composable.formats.container import header_checksum


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


def mapped_kilobytes(path: Path) -> int:
    """Resident memory of the file's mapping, from the kernel."""
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = [re.search(r"(?m)^Rss:\s+(\d+)", block) for block in blocks if str(path) in block]
    assert sizes, "the file is not memory-mapped"
    return sum(int(size[1]) for size in sizes if size)
