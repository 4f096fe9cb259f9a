"""Multi30K task 1: which files it has, where they are public, how to tell that one is whole."""

import gzip
import hashlib
import http.client
import io
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from composable import files
from composable.errors import FormatError, UserError
from composable.progress import Stage
from composable.tasks.text_files import opened

TIMEOUT_SECONDS = 30
#: More than any of the files has, packed or not.
MOST_FETCHED = 2**24
URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"

# file name -> (lines, SHA-256 of the decompressed bytes)
MULTI30K: dict[str, tuple[int, str]] = {
    "train.en": (29000, "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
    "train.de": (29000, "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
    "val.en": (1014, "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
    "val.de": (1014, "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
    "test_2016_flickr.en": (
        1000,
        "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    ),
    "test_2016_flickr.de": (
        1000,
        "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    ),
}


def fault(name: str, content: bytes) -> str | None:
    """Say what is wrong with the decompressed bytes of a Multi30K file; None: as published."""
    lines, digest = MULTI30K[name]
    found = content.count(b"\n")
    if found != lines:
        return f"{found} lines, {lines} were expected"
    actual = hashlib.sha256(content).hexdigest()
    if actual != digest:
        return f"SHA-256 of the text is {actual[:12]}..., {digest[:12]}... was expected"
    return None


def fetch_multi30k(folder: Path) -> None:
    """Download Multi30K task 1 (train, val, test_2016_flickr; English and German) into a folder.

    Files that are there, plain or gzipped, and right are not fetched again. The environment
    variable COMPOSABLE_MULTI30K_URL names another place to take NAME.gz from.

    Args:
        folder: where NAME.gz goes; made when it is absent.

    Raises:
        UserError: the files cannot be reached, or the transfer broke.
        FormatError: what arrived is not the published text.
        OSError: the folder cannot be written.
    """
    missing = [name for name in MULTI30K if not _is_there(folder, name)]
    with Stage(missing, "fetch Multi30K", unit="files") as stage:
        for name in stage:
            files.write_bytes(folder / f"{name}.gz", _fetch(name))


def _is_there(folder: Path, name: str) -> bool:
    """Tell whether a file of Multi30K is in `folder`, plain or gzipped, and right."""
    paths = (folder / name, folder / f"{name}.gz")
    return any(path.is_file() and fault_of_file(name, path) is None for path in paths)


def fault_of_file(name: str, path: Path) -> str | None:
    """As `fault`, of a file, decompressed where its name ends in .gz."""
    try:
        with opened(path) as file:
            return fault(name, file.read(MOST_FETCHED + 1))
    except FormatError as error:
        return str(error)


def _fault_of_gzip(name: str, content: bytes) -> str | None:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return fault(name, file.read(MOST_FETCHED + 1))
    except (OSError, EOFError, zlib.error) as error:
        return f"not a whole gzip file ({error})"


def _fetch(name: str) -> bytes:
    """Download NAME.gz into memory (2 MB at most) and check it."""
    base = os.environ.get("COMPOSABLE_MULTI30K_URL") or URL
    url = f"{base.rstrip('/')}/{name}.gz"
    way_out = 'use the data "embedded", or a folder with a copy of Multi30K.'
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            content: bytes = response.read(MOST_FETCHED + 1)
            if response.length and len(content) <= MOST_FETCHED:  # which only a read of all notices
                raise http.client.IncompleteRead(content, response.length)
    except urllib.error.HTTPError as error:
        raise UserError(f"Multi30K: {url} answered {error.code}; {way_out}") from error
    except http.client.HTTPException as error:
        raise UserError(
            f"Multi30K: the transfer of {url} was interrupted; run it again, or {way_out}"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"Multi30K: no network to {url} ({reason}); {way_out}") from error
    if found := _fault_of_gzip(name, content):
        raise FormatError(f"Multi30K: {url} is not the published text: {found}; {way_out}")
    return content
