"""Random damages of bytes: what disks, networks and interrupted copies do to a file."""

import random
from collections.abc import Callable

Bytes = bytearray
Draw = random.Random


def _range(data: Bytes, draw: Draw, largest: int = 4096) -> slice:
    length = 1 + int(min(largest, len(data)) ** draw.random())
    start = draw.randrange(max(1, len(data) - length + 1))
    return slice(start, start + length)


def flip(data: Bytes, draw: Draw) -> Bytes:
    """Flip one bit."""
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    return data


def flip_early(data: Bytes, draw: Draw) -> Bytes:
    """Flip one bit of the first 256 bytes, where headers are."""
    place = draw.randrange(min(256, len(data)))
    data[place] ^= 1 << draw.randrange(8)
    return data


def truncate(data: Bytes, draw: Draw) -> Bytes:
    """Cut the end off, now and then all."""
    return data[: draw.choice((0, draw.randrange(len(data)), len(data) - 1))]


def extend(data: Bytes, draw: Draw) -> Bytes:
    """Append bytes, of its own or of chance."""
    return data + draw.choice((draw.randbytes(1 + draw.randrange(64)), data[_range(data, draw)]))


def zero(data: Bytes, draw: Draw) -> Bytes:
    """Zero a range, as a block that was never written."""
    where = _range(data, draw)
    data[where] = bytes(len(data[where]))
    return data


def noise(data: Bytes, draw: Draw) -> Bytes:
    """Put bytes of chance over a range."""
    where = _range(data, draw)
    data[where] = draw.randbytes(len(data[where]))
    return data


def swap(data: Bytes, draw: Draw) -> Bytes:
    """Let two ranges change places."""
    length = 1 + int(min(1024, len(data) // 2) ** draw.random())
    first, second = sorted(draw.randrange(max(1, len(data) - length)) for _ in range(2))
    one, two = slice(first, first + length), slice(second, second + length)
    data[one], data[two] = data[two], data[one]
    return data


def duplicate(data: Bytes, draw: Draw) -> Bytes:
    """Write a range twice."""
    where = _range(data, draw)
    return data[: where.stop] + data[where] + data[where.stop :]


def delete(data: Bytes, draw: Draw) -> Bytes:
    """Leave a range out."""
    where = _range(data, draw)
    return data[: where.start] + data[where.stop :]


DAMAGES: tuple[Callable[[Bytes, Draw], Bytes], ...] = (
    flip, flip_early, truncate, extend, zero, noise, swap, duplicate, delete,
)  # fmt: skip


def damaged(data: bytes, seed: int) -> bytes:
    """Damage once, by the number `seed`; never returns equal bytes."""
    draw = random.Random(seed)
    how = DAMAGES[seed % len(DAMAGES)]
    for _ in range(50):
        changed = bytes(how(bytearray(data), draw)) if data else b"\n"
        if changed != data:
            return changed
    return data + b"\0"
