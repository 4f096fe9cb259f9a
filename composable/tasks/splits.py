"""Which file of a folder holds which split, and what stands in where a split is missing."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from composable.errors import NoDataError, UserError

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


def short_name(name: str) -> str:
    """Last part of the path that a corpus came from, the same however it was spelled."""
    return followed(Path(name)).name if name else ""


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


Find = Callable[[Path, Sequence[str]], Path | None]


def locate(
    data: str | None,
    default: str | None,
    split: str,
    names: Mapping[str, Sequence[str]],
    find: Find,
    wanted: str,
) -> tuple[str, list[Source]]:
    """Find the places a split can be read from: `places` of `files_of`."""
    name, found = files_of(data, default, names, find, wanted)
    return name, places(name, split, found, wanted)


def files_of(
    data: str | None,
    default: str | None,
    names: Mapping[str, Sequence[str]],
    find: Find,
    wanted: str,
) -> tuple[str, dict[str, Path | None]]:
    """Find the files of all splits.

    Args:
        data: a folder, or a single file.
        default: what the model file asks for where the option is not given.
        names: split -> what its file or folder may be called.
        find: (folder, names) -> the first of them that is there, or None.
        wanted: what the task reads, for messages.

    Returns:
        What was asked for; and split -> its file, or None. A single file is that of valid.

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
    if not (path.is_file() or path.is_dir()):
        said = "is no ordinary file or folder" if path.exists() else "no such file or folder"
        raise UserError(f"data {name}: {said}; expected {wanted}.")
    is_single = path.is_file() or (path / "state.json").is_file()
    if is_single:
        return name, {"valid": followed(path)}
    return name, {each: find(path, names[each]) for each in names}


def places(name: str, split: str, found: Mapping[str, Path | None], wanted: str) -> list[Source]:
    """Say where a split can be read, the best place first; the other arguments are of `files_of`.

    A place that turns out to have no labels is passed over. A UserError where there is none.
    """
    found_places = sources(split, found)
    if not found_places:
        raise UserError(f"data {name}: no {split} split; expected {wanted}.")
    return found_places


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


def share_of(samples: Iterable[Sample], share: str, limit: int | None = None) -> list[Sample]:
    """Return the first samples of a share; no more are asked for than are returned.

    Every tenth sample, from the first, is held out for "valid".
    """
    is_held = share == "valid"
    chosen = (
        each for i, each in enumerate(samples) if share == "all" or (i % HELD_OUT == 0) == is_held
    )
    return list(itertools.islice(chosen, limit))


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


def inside(folder: Path) -> list[Path]:
    """List a folder, sorted, without what file managers, notebooks and archives leave there."""
    paths = sorted(folder.iterdir())
    return [it for it in paths if not it.name.startswith((".", "__MACOSX"))]


def folder_of(folder: Path, names: Sequence[str], classes: Sequence[str] = ()) -> Path | None:
    """Find the first folder that has folders: one for each class, or any where none is named."""
    for path in (folder / name for name in names if (folder / name).is_dir()):
        found = [path / each for each in classes] or inside(path)
        if (all if classes else any)(each.is_dir() for each in found):
            return path
    return None
