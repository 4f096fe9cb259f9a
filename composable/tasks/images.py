"""Labelled images: folders with a folder for each class, .npz files; as a model wants them."""

import hashlib
import json
import logging
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from composable import files
from composable.errors import FormatError, UserError, listed
from composable.families import Family
from composable.files import MOST_BYTES
from composable.tasks import splits
from composable.tasks.labels import ordered
from composable.tasks.splits import Corpus, Source

log = logging.getLogger("composable")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".webp")
#: What file managers leave among images, beside the names with a dot.
JUNK = ("Thumbs.db", "desktop.ini")
WANTED = (
    "a folder with train, valid (val, dev, validation) and test, each with a folder of images for "
    "each class, or an .npz file with train_images, train_labels, valid_images, valid_labels, "
    "test_images, test_labels"
)
#: Bytes of prepared images that a split keeps in memory.
KEPT_BYTES = 256 << 20
MOST_PIXELS = 50_000_000  # of a file, which take ten times as many bytes while it is prepared
#: What zipfile and numpy raise where a file is no .npz, or a damaged one.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, EOFError, KeyError, AttributeError, RuntimeError),
    ArithmeticError,
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
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
    groups, left = [], []
    for number, each in enumerate(classes):
        found = splits.inside(place.path / each) if (place.path / each).is_dir() else []
        paths = [it for it in found if it.suffix.lower() in ENDINGS and it.is_file()]
        left += [it for it in found if it not in paths and it.name not in JUNK]
        groups.append([(path, number) for path in splits.share_of(paths, place.share)])
    if left:
        names = listed([it.relative_to(place.path).as_posix() for it in left])
        log.warning("%s: no images (%s), left out: %s.", place.path, ", ".join(ENDINGS), names)
    chosen = splits.interleave(groups, limit)
    if not chosen:
        raise FormatError(f"{place.path}: no images ({', '.join(ENDINGS)}) for {split}.")
    total = hashlib.sha256()
    for path, _ in chosen:
        relative = path.relative_to(place.path).as_posix()
        total.update(files.canonical_json([relative, path.stat().st_size]).encode())
        with files.open_input(path) as file:
            while piece := file.read(2**20):
                total.update(piece)
    paths, labels = ([*side] for side in zip(*chosen, strict=True))
    return Images(name, split, place.label, total.hexdigest(), paths, labels, classes)


def _read_arrays(path: Path, split: str, limit: int | None) -> Images:
    try:
        with files.open_input(path) as opened, zipfile.ZipFile(opened) as archive:
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
    file = f"{splits.followed(path).name}:{places[0].label}"
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
            raise ValueError(
                f"{name} has {size:,} bytes, more than {MOST_BYTES:,}, which are read; a folder of "
                "images is read one by one"
            )
        content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{name} has {len(content):,} bytes, {size:,} were expected")
    found = np.frombuffer(content, dtype)
    return found.reshape((count, *shape[1:]), order="F" if is_fortran else "C")


def _check(path: Path, stem: str, pictures: NDArray[Any], labels: NDArray[Any]) -> None:
    """Refuse arrays that are not images and labels."""
    said = f"{pictures.dtype} {pictures.shape}"
    is_image = pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[3] in (1, 3))
    is_image = is_image and 0 not in pictures.shape[1:]
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


class Preparation:
    """How a model wants its images: by an image processor of transformers, on Pillow.

    The results do not depend on whether torchvision is installed, which transformers would prefer.

    Attributes:
        settings: of the processor, with all defaults, as in a preprocessor_config.json.
        size: height and width of what the model sees.
        channels: 1 (grey) or 3 (red, green, blue).
    """

    def __init__(self, settings: Mapping[str, Any], config: Any):
        """Make the processor, and try it.

        Args:
            settings: of an image processor.
            config: of the model.

        Raises:
            FormatError: there is no such processor, or its images are not what the model takes.
        """
        self._processor = _processor(settings)
        self.settings: dict[str, Any] = json.loads(self._processor.to_json_string())
        self.channels = int(getattr(config, "num_channels", 3))
        side = config.image_size
        self.size = (side, side) if isinstance(side, int) else tuple(side)
        # of another shape than the model takes, so that it has to be cropped or resized
        shape = (2 * self.size[0], self.size[1], self.channels)
        self.tensor(np.full(shape, 255, dtype=np.uint8))

    @classmethod
    def of(cls, checkpoint: Any) -> "Preparation":
        """Take what a model file says; without it `default_settings`."""
        info, config = checkpoint.info, checkpoint.model.config
        if "image" in info:
            raise FormatError(
                "the model file says in an older form how images are prepared; make it again with "
                "download_model.py."
            )
        said = info.get("image_processor")
        return cls(default_settings(config, checkpoint.family) if said is None else said, config)

    def tensor(self, picture: Any) -> Tensor:
        """Turn one of the pictures of `Images` into (channels, height, width), float32.

        Raises:
            FormatError: the file is no image, or of colours where the model takes none.
        """
        pixels = _open(picture, self.channels) if isinstance(picture, Path) else picture
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused
                made = self._processor(self._layers(pixels), input_data_format="channels_last")
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"{self._name()} cannot prepare images ({error}).") from error
        prepared = np.ascontiguousarray(made["pixel_values"][0], dtype=np.float32)
        if prepared.shape != (self.channels, *self.size):
            raise FormatError(
                f"{self._name()} makes {_sides(prepared.shape)} of images of "
                f"{_sides(pixels.shape[:2])} pixels, the model takes "
                f"{_sides((self.channels, *self.size))}; mend size, crop_size or do_resize."
            )
        if not np.isfinite(prepared).all():
            raise FormatError(
                f"{self._name()} makes pixels that are NaN or infinite; mend image_mean, image_std "
                "or rescale_factor."
            )
        return torch.from_numpy(prepared)

    def _layers(self, picture: NDArray[Any]) -> NDArray[np.uint8]:
        """Give a picture all its channels: (height, width, channels), 0 to 255."""
        layers = picture if picture.ndim == 3 else picture[..., None]
        if layers.shape[2] > self.channels:
            raise FormatError(
                f"the images have {layers.shape[2]} channels, the model takes {self.channels}; "
                "convert them."
            )
        if layers.dtype != np.uint8:  # Pillow knows no other pixels
            layers = np.round(layers * 255).astype(np.uint8)
        return np.broadcast_to(layers, (*layers.shape[:2], self.channels))

    def _name(self) -> str:
        return f"the image processor {self.settings['image_processor_type']}"


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def default_settings(config: Any, family: Family) -> dict[str, Any]:
    """Say how images are prepared where nothing says it: mean and standard deviation are 0.5."""
    side, channels = config.image_size, int(getattr(config, "num_channels", 3))
    height, width = (side, side) if isinstance(side, int) else side
    return {
        "image_processor_type": family.image_processor,
        "size": {"height": height, "width": width},
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }


def _processor(settings: Mapping[str, Any]) -> Any:
    """Make the image processor that settings name."""
    import transformers
    from transformers.image_processing_backends import PilBackend

    kind = settings.get("image_processor_type") if isinstance(settings, Mapping) else None
    found = getattr(transformers, f"{kind}Pil", None)
    if not (isinstance(found, type) and issubclass(found, PilBackend)):
        raise FormatError(
            f"image_processor_type {kind!r} is no image processor of transformers "
            f"{transformers.__version__} that works on Pillow."
        )
    try:
        return found.from_dict(dict(settings))
    except (LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{kind}: cannot be made of its settings ({error}).") from error


def _open(path: Path, channels: int) -> NDArray[np.uint8]:
    """Read a file, the right way up: (height, width) or (height, width, 3)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise FormatError(
                    f"{path}: has {image.width} x {image.height} pixels, at most {MOST_PIXELS:,} "
                    "were expected; make it smaller."
                )
            if image.mode[0] in "IF":  # convert would cut off what is above 255
                raise FormatError(
                    f"{path}: its pixels have more than 8 bits (mode {image.mode}); convert "
                    "it to 8 bits a channel."
                )
            upright = ImageOps.exif_transpose(image)  # as transformers' load_image
            return np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    except (
        *(UnidentifiedImageError, OSError, SyntaxError, ValueError),
        Image.DecompressionBombError,
    ) as error:
        raise FormatError(f"{path}: cannot be read as an image ({error}).") from error


class Pixels(torch.utils.data.Dataset[dict[str, Any]]):
    """Images as a model wants them, prepared when they are asked for first.

    Attributes:
        identity: SHA-256 of what the pixels follow from: files or arrays, their preparation, and
            the labels. To hash the pixels would be to read and resize every image once more.
        labels: number of the model's output for each image.
        lengths: tokens of every image.
        sizes: the same twice, see `Task.dataset`.
    """

    def __init__(self, images: Images, labels: list[int], preparation: Preparation, tokens: int):
        self.pictures, self.labels, self.preparation = images.pictures, labels, preparation
        self.identity = files.digest_of([images.sha256, preparation.settings, labels])
        self.lengths = [tokens] * len(labels)
        self.sizes = [(tokens, tokens)] * len(labels)
        self._prepared: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._prepared.get(index)
        if pixels is None:
            pixels = self.preparation.tensor(self.pictures[index])
            if pixels.nbytes * len(self._prepared) < KEPT_BYTES:
                self._prepared[index] = pixels
        return {"pixel_values": pixels, "labels": self.labels[index]}


def stack(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put images together: pixel_values (batch, channels, height, width), labels (batch,)."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }
