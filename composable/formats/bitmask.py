"""Masks as bits, as bundles and model files hold them."""

import math
from collections.abc import Sequence

import numpy as np

from composable.errors import FormatError


def pack(mask: np.ndarray) -> np.ndarray:
    """Pack booleans of any shape into (ceil(values / 8),) uint8.

    They come row-major, the first in the highest bit, zero padded.
    """
    return np.packbits(mask)


def unpack(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Undo `pack`: turn 1-D uint8 into booleans of `shape`.

    Raises:
        FormatError: too few or too many bytes, or bits that belong to no value.
    """
    count = math.prod(shape)
    if packed.shape != (-(-count // 8),):
        raise FormatError(f"a mask of shape {packed.shape} for {count} values")
    bits = np.unpackbits(packed).view(bool)
    if bits[count:].any():
        raise FormatError(f"a mask has bits after its {count} values")
    return bits[:count].reshape(shape)
