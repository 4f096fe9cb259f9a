"""The file of scores, scores.npz: read and write."""

import io
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable.errors import ConfigError, FormatError
from composable.files import atomic_write
from composable.formats import scores_header
from composable.formats.scores import FORMAT, BlockDistances, Scores
from composable.formats.scores_header import Arrays

log = logging.getLogger("composable")


def save(path: Path, scores: Scores) -> None:
    """Write a file of scores, whole or not at all; equal scores, equal bytes.

    Raises:
        FormatError: what was to be written breaks a rule of the format.
        OSError: it cannot be written.
    """
    arrays = {
        name: np.ascontiguousarray(values, dtype="<f8")
        for name, values in scores_header.arrays_of(scores).items()
    }
    text = scores_header.build(scores)
    scores_header.parse(text, arrays)  # what could not be read again must not be written
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, header=np.frombuffer(text, np.uint8), **arrays)


def load(path: Path) -> Scores:
    """Read a file of scores, also one that short-transformers wrote (`arr_0` or `result` alone).

    Raises:
        FormatError: another file, one of another version, or damaged.
        OSError: it cannot be read.
    """
    try:
        arrays = _read(path)
        if "header" in arrays:
            header = arrays.pop("header")
            return scores_header.parse(header.astype(np.uint8, casting="no").tobytes(), arrays)
        if "format" in arrays:
            met = f"version {str(arrays['version'])[:20]} of the format"
            raise FormatError(f"{met}, this program reads {FORMAT.version}")
        found = _of_another_program(arrays)
    except (FormatError, ConfigError, TypeError, KeyError) as error:
        raise FormatError(f"{path}: no file of scores ({error}); {FORMAT.remedy}.") from error
    log.warning(
        "%s: is of another program and does not say of which model; whether it is of this one "
        "cannot be checked.",
        path,
    )
    return found


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of an .npz; the checksums of the archive are compared.

    Raises:
        FormatError: it is no .npz of plain arrays, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(content), allow_pickle=False
            )
            for name, content in contents.items()
        }
    except (
        *(ValueError, EOFError, KeyError, RuntimeError, MemoryError, SyntaxError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise FormatError(f"no readable .npz: {error}") from error


def _of_another_program(arrays: Arrays) -> Scores:
    found = arrays["result"] if "result" in arrays else arrays["arr_0"]
    if found.ndim == 2 and len(found) == found.shape[1]:  # it has 0 where there is no block
        rows, columns = np.indices(found.shape)
        found = np.where(rows + columns < len(found), found, np.nan)
    return Scores(distances=[BlockDistances("", "", scores_header.matrix(found, len(found)))])
