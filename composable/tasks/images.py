"""Labelled images: folders with a folder for each class, .npz files; as a model wants them."""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from composable import files
from composable.errors import FormatError, UserError
from composable.tasks import splits
from composable.tasks.labels import ordered
from composable.tasks.splits import Corpus, Source

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".webp")
WANTED = (
    "a folder with train, valid (val, dev, validation) and test, each with a folder of images for "
    "each class, or an .npz file with train_images, train_labels, valid_images, valid_labels, "
    "test_images, test_labels"
)
#: Most bytes that are read of an array: 4 GiB.
MOST_BYTES = 2**32
#: What zipfile and numpy raise where a file is no .npz, or a damaged one.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, EOFError, KeyError, AttributeError, RuntimeError),
    ArithmeticError,
    *(zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Images(Corpus):
    """A split.

    Attributes:
        pictures: paths of files; or an array (images, height, width) or (images, height, width,
            channels), uint8 from 0 to 255 or floats from 0 to 1.
        labels: number of the class of each.
        classes: names of the classes of all splits, ordered (`labels.ordered`); () where they have
            none.
    """

    pictures: Any
    labels: list[int]
    classes: tuple[str, ...]


def read(data: str | None, default: str | None, split: str, limit: int | None) -> Images:
    """Read a split, see `Task.read`; the first images of a folder come from each class in turn."""
    name = data or default
    if name and Path(name).is_file():
        return _read_arrays(Path(name), split, limit)
    name, found = splits.files_of(data, default, splits.NAMES, splits.folder_of, WANTED)
    place, every = splits.places(name, split, found, WANTED)[0], filter(None, found.values())
    return _read_folder(name, split, place, every, limit)


def _read_folder(
    name: str, split: str, place: Source, every: Iterable[Path], limit: int | None
) -> Images:
    """List the files of each class; `every` are the folders of all splits."""
    classes = ordered(
        {each.name for folder in every for each in splits.inside(folder) if each.is_dir()}
    )
    groups = []
    for number, each in enumerate(classes):
        found = splits.inside(place.path / each) if (place.path / each).is_dir() else []
        paths = [it for it in found if it.suffix.lower() in ENDINGS and it.is_file()]
        groups.append([(path, number) for path in splits.share_of(paths, place.share)])
    chosen = splits.interleave(groups, limit)
    if not chosen:
        raise FormatError(f"{place.path}: no images ({', '.join(ENDINGS)}) for {split}.")
    total = hashlib.sha256()
    for path, _ in chosen:
        relative = path.relative_to(place.path).as_posix()
        total.update(files.canonical_json([relative, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while piece := file.read(2**20):
                total.update(piece)
    paths, labels = ([*side] for side in zip(*chosen, strict=True))
    return Images(name, split, place.label, total.hexdigest(), paths, labels, classes)


def _read_arrays(path: Path, split: str, limit: int | None) -> Images:
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {*archive.namelist()}
            found = {
                each: next((Path(it) for it in names if f"{it}_images.npy" in inside), None)
                for each, names in splits.NAMES.items()
            }
            places = splits.sources(split, found)
            if not places:
                raise UserError(f"{path}: no {split} split; expected {WANTED}.")
            stem, share = places[0].path.name, places[0].share
            # of a share a tenth or more of the samples are wanted
            rows = limit and (limit if share == "all" else limit * splits.HELD_OUT)
            pictures = _first_rows(archive, f"{stem}_images", rows)
            labels = _first_rows(archive, f"{stem}_labels", rows)
    except _UNREADABLE as error:
        raise FormatError(f"{path}: not such an .npz file ({error}); expected {WANTED}.") from error
    _check(path, stem, pictures, labels)
    chosen = splits.share_of(range(len(pictures)), places[0].share)[:limit]
    if not chosen:
        raise FormatError(f"{path}: no images for {split}; at least one was expected.")
    pictures, numbers = pictures[chosen], labels.reshape(-1)[chosen]
    shape = [str(pictures.dtype), *pictures.shape]
    total = hashlib.sha256(files.canonical_json(shape).encode())
    total.update(np.ascontiguousarray(pictures).tobytes())
    total.update(numbers.astype("<i8").tobytes())
    file = f"{path.name}:{places[0].label}"
    return Images(str(path), split, file, total.hexdigest(), pictures, numbers.tolist(), ())


def _first_rows(archive: zipfile.ZipFile, name: str, rows: int | None) -> NDArray[Any]:
    """Read the first rows of an array of an .npz file, None: all, without trusting its header.

    A ValueError where it is no such array, or more than `MOST_BYTES` would be read.
    """
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header: Any = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, is_fortran, dtype = read_header(file)
        if dtype.hasobject or not shape or min(shape) < 0:
            raise ValueError(f"{name} holds no rows of numbers")
        count = shape[0] if rows is None or is_fortran else min(shape[0], rows)
        size = math.prod((count, *shape[1:])) * dtype.itemsize
        if size > MOST_BYTES:
            raise ValueError(f"{name} has {size:,} bytes, more than {MOST_BYTES:,}, which are read")
        content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{name} has {len(content):,} bytes, {size:,} were expected")
    found = np.frombuffer(content, dtype)
    return found.reshape((count, *shape[1:]), order="F" if is_fortran else "C")


def _check(path: Path, stem: str, pictures: NDArray[Any], labels: NDArray[Any]) -> None:
    """Refuse arrays that are not images and labels."""
    said = f"{pictures.dtype} {pictures.shape}"
    is_image = pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[3] in (1, 3))
    is_float = pictures.dtype.kind == "f"
    if not is_image or not (is_float or pictures.dtype == np.uint8):
        raise FormatError(
            f"{path}: {stem}_images is {said}; expected (images, height, width) or (images, "
            "height, width, 1 or 3), uint8 or floats from 0 to 1."
        )
    if is_float and pictures.size and not (pictures.min() >= 0 and pictures.max() <= 1):
        raise FormatError(
            f"{path}: {stem}_images has values from {pictures.min()} to {pictures.max()}; floats "
            "from 0 to 1 were expected."
        )
    if labels.dtype.kind not in "iu" or labels.size != len(pictures):
        raise FormatError(
            f"{path}: {stem}_labels is {labels.dtype} {labels.shape}; expected {len(pictures)} "
            "whole numbers."
        )


@dataclass(frozen=True)
class Preparation:
    """How a model wants its images.

    Attributes:
        size: height and width.
        mean: of each channel, on the scale from 0 to 1.
        std: of each channel; (pixel - mean) / std is what the model sees.
        channels: 1 (grey) or 3 (red, green, blue).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int

    @classmethod
    def of(cls, info: Mapping[str, Any] | None, config: Any) -> "Preparation":
        """Take what the model file says; without it the config's size, 0.5 and 0.5."""
        said = info or {}
        channels = int(getattr(config, "num_channels", 3))
        size: Any = said.get("size") or getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        mean, std = (tuple(said.get(key) or [0.5] * channels) for key in ("mean", "std"))
        return cls((height, width), mean, std, channels)

    def tensor(self, picture: Any) -> Tensor:
        """Turn one of the pictures of `Images` into (channels, height, width), float32.

        Raises:
            FormatError: the file is no image, or of colours where the model takes none.
        """
        pixels = self._open(picture) if isinstance(picture, Path) else self._resized(picture)
        scaled = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        mean, std = (torch.tensor(side)[:, None, None] for side in (self.mean, self.std))
        return (scaled - mean) / std

    def _open(self, path: Path) -> NDArray[np.float32]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # convert would cut off what is above 255
                    raise FormatError(
                        f"{path}: its pixels have more than 8 bits (mode {image.mode}); convert "
                        "it to 8 bits a channel."
                    )
                mode = "L" if self.channels == 1 else "RGB"
                return self._resized(np.asarray(image.convert(mode)))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise FormatError(f"{path}: cannot be read as an image ({error}).") from error

    def _resized(self, picture: NDArray[Any]) -> NDArray[np.float32]:
        """Resize bilinearly, with Pillow's filter, and scale: (height, width, channels), 0 to 1."""
        from PIL import Image

        layers = picture if picture.ndim == 3 else picture[..., None]
        if layers.shape[2] > self.channels:
            raise FormatError(
                f"the images have {layers.shape[2]} channels, the model takes {self.channels}; "
                "convert them."
            )
        if layers.shape[:2] != self.size:
            # Pillow knows no other floats
            mode = np.uint8 if layers.dtype == np.uint8 else np.float32
            drawn = (Image.fromarray(layers[..., i].astype(mode)) for i in range(layers.shape[2]))
            size, way = self.size[::-1], Image.Resampling.BILINEAR
            layers = np.stack([np.asarray(one.resize(size, way)) for one in drawn], axis=-1)
        scaled = layers.astype(np.float32) / (255 if layers.dtype == np.uint8 else 1)
        return np.broadcast_to(scaled, (*self.size, self.channels))


class Pixels(torch.utils.data.Dataset[dict[str, Any]]):
    """Images as a model wants them, read one by one when they are asked for.

    Attributes:
        identity: SHA-256 of what the pixels follow from: files or arrays, their preparation, and
            the labels. To hash the pixels would be to read and resize every image once more.
        labels: number of the model's output for each image.
        lengths: tokens of every image.
        sizes: the same twice, see `Task.dataset`.
    """

    def __init__(self, images: Images, labels: list[int], preparation: Preparation, tokens: int):
        self.pictures, self.labels, self.preparation = images.pictures, labels, preparation
        self.identity = files.digest_of([images.sha256, asdict(preparation), labels])
        self.lengths = [tokens] * len(labels)
        self.sizes = [(tokens, tokens)] * len(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.preparation.tensor(self.pictures[index])
        return {"pixel_values": pixels, "labels": self.labels[index]}


def stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put images together: pixel_values (batch, channels, height, width), labels (batch,)."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }
