"""Which file of a folder holds which split, and what stands in where a split is missing."""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from composable.errors import FormatError, NoDataError, UserError

Sample = TypeVar("Sample")
#: What the file or folder of a split may be called, the first that exists is read.
NAMES = {"train": ("train",), "valid": ("valid", "val", "dev", "validation"), "test": ("test",)}
#: Of so many samples one is held out for validation where no file is there for it.
HELD_OUT = 10
_PARTS = {"all": "", "train": "[9of10]", "valid": "[1of10]"}


@dataclass(frozen=True)
class Corpus:
    """One split of the data of a task.

    Attributes:
        name: folder or file that it came from.
        split: train, valid or test.
        file: what was read there, and which part of it: "dev.tsv.gz", "train.csv[9of10]".
        sha256: of what was read.
    """

    name: str
    split: str
    file: str
    sha256: str


def short_name(corpus: Any) -> str:
    """Last part of the path that a corpus came from, the same however it was spelled."""
    return followed(Path(corpus.name)).name if corpus.name else ""


def followed(path: Path) -> Path:
    """Follow links, as long as the name of a file keeps its ending (not so in a hub's cache)."""
    target = path.resolve()
    is_kept = target.is_dir() or target.suffix == path.suffix
    return target if is_kept else path.parent.resolve() / path.name


@dataclass(frozen=True)
class Source:
    """Where a split comes from.

    Attributes:
        path: a file, or a folder with a folder for each class.
        share: "all" of it; or "train" or "valid", of which each sample is in one.
    """

    path: Path
    share: str

    @property
    def label(self) -> str:
        """Name and share, as in `Corpus.file`."""
        return self.path.name + _PARTS[self.share]


def locate(
    data: str | None,
    default: str | None,
    split: str,
    names: Mapping[str, Sequence[str]],
    find: Callable[[Path, Sequence[str]], Path | None],
    wanted: str,
) -> tuple[str, list[Source]]:
    """Find the places a split can be read from.

    Args:
        data: a folder, or a single file.
        default: what the model file asks for where the option is not given.
        split: train, valid or test.
        names: split -> what its file or folder may be called.
        find: (folder, names) -> the first of them that is there, or None.
        wanted: what the task reads, for messages.

    Returns:
        What was asked for, and the places, the best first; a place that turns out to have no
        labels is passed over.

    Raises:
        NoDataError: nothing was asked for.
        UserError: there is no such data.
    """
    name = data or default
    if name is None:
        raise NoDataError(
            "no data: the model file names none, and neither data nor calibration_data was given; "
            f"expected {wanted}."
        )
    path = Path(name)
    if not path.exists():
        raise UserError(f"data {name}: no such file or folder; expected {wanted}.")
    is_single = path.is_file() or (path / "state.json").is_file()
    found = (
        {"valid": followed(path)}
        if is_single
        else {each: find(path, names[each]) for each in names}
    )
    places = sources(split, found)
    if not places:
        raise UserError(f"data {name}: no {split} split; expected {wanted}.")
    return name, places


def sources(split: str, found: Mapping[str, Path | None]) -> list[Source]:
    """Say where a split is read; `found` is split -> its file, a single file is that of valid.

    Without a valid file, one of ten training samples is held out for it. Without a train file the
    valid file is divided in the same way. Without a test file (or without labels in it) the whole
    valid file stands in, or else what is held out of the training.
    """
    train, valid, test = (found.get(name) for name in NAMES)
    if split == "test":
        stand_in = [Source(valid, "all")] if valid else sources("valid", {"train": train})
        return [Source(test, "all"), *stand_in] if test else stand_in
    if train and valid:
        return [Source(train if split == "train" else valid, "all")]
    only = train or valid
    return [Source(only, split)] if only else []


def share_of(samples: Sequence[Sample], share: str) -> list[Sample]:
    """Return the share of the samples; every tenth, from the first, is held out for "valid"."""
    if share == "all":
        return list(samples)
    is_wanted = share == "valid"
    return [each for i, each in enumerate(samples) if (i % HELD_OUT == 0) == is_wanted]


def interleave(groups: Sequence[Sequence[Sample]], limit: int | None) -> list[Sample]:
    """Take one sample of each group in turn, so that the first few are of all classes."""
    longest = max((len(group) for group in groups), default=0)
    mixed = [group[i] for i in range(longest) for group in groups if i < len(group)]
    return mixed[:limit]


def first_of(folder: Path, names: Sequence[str], endings: Sequence[str]) -> Path | None:
    """Find the first file that exists: each name with each ending, plain or .gz."""
    parts = itertools.product(names, endings, ("", ".gz"))
    paths = (folder / "".join(each) for each in parts)
    return next((path for path in paths if path.is_file()), None)


def folder_of(folder: Path, names: Sequence[str], classes: Sequence[str] = ()) -> Path | None:
    """Find the first folder that has folders: one for each class, or any where none is named."""
    for path in (folder / name for name in names if (folder / name).is_dir()):
        inside = [path / each for each in classes] or path.iterdir()
        if (all if classes else any)(each.is_dir() for each in inside):
            return path
    return None


def json_lines(path: Path, text: str) -> Iterator[tuple[int, str, Any]]:
    """Parse JSON lines: number from 1, line and value of each that is not empty."""
    # not splitlines: a JSON string may hold line separators of Unicode
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise FormatError(f"{path}: line {number} is not JSON ({error}).") from error
            yield number, line, value


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed where its name ends in .gz; a FormatError where it cannot be."""
    raw = path.read_bytes()
    try:
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, OSError, zlib.error) as error:
        raise FormatError(f"{path}: cannot be read as text ({error}).") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file, plain or .gz, without a byte order mark; another is a FormatError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: cannot be read as text ({error}).") from error
