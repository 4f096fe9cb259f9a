"""Images: folders and .npz, how they are prepared, classes to outputs, top-k."""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig

from composable.errors import FormatError, MismatchError, UserError
from composable.families.vit import VIT
from composable.tasks import images
from composable.tasks.image_classification import IMAGE_CLASSIFICATION, outputs_of
from composable.tasks.images import Images, Preparation
from composable.tasks.splits import short_name
from tests import tiny_tasks

SETTINGS = {"device": "cpu", "dtype": "float32"}
Image = pytest.importorskip("PIL.Image", reason="Pillow comes with matplotlib")


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def read(path: Path, split: str = "test", limit: int | None = None) -> Images:
    return images.read(str(path), None, split, limit)


def test_folders_and_arrays_hold_the_same(tmp_path: Path) -> None:
    """The same pixels, labels, answers and scores."""
    folder = tiny_tasks.data("image_classification", tmp_path / "folder")
    pictures, labels = tiny_tasks.pictures(10, seed=2)  # as of its test split
    archive = save(tmp_path / "x.npz", test_images=pictures, test_labels=labels)
    from_files, from_arrays = read(folder), read(archive)
    assert from_files.classes == ("dark", "left")
    assert from_files.labels == [0, 1] * 5 == from_arrays.labels
    assert (from_files.file, from_arrays.file) == ("test", "x.npz:test")
    made = tiny_tasks.checkpoint("image_classification")
    data = [IMAGE_CLASSIFICATION.dataset(each, made) for each in (from_files, from_arrays)]
    for one, two in zip(*data, strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert one["labels"] == two["labels"]
    assert data[0].lengths == [5] * 10  # 4 patches and a token
    found = [
        IMAGE_CLASSIFICATION.evaluate(made, each, SETTINGS) for each in (from_files, from_arrays)
    ]
    assert found[0][0] == found[1][0]
    assert found[0][1]["top1"]["value"] == found[1][1]["top1"]["value"]
    assert "|classes_by:order|" in found[0][1]["top1"]["signature"]
    said = "|size:8x8|image_processor:ViTImageProcessor|image_settings:"
    assert said in found[1][1]["top1"]["signature"]
    assert "|classes_by:number|" in found[1][1]["top1"]["signature"]


def test_a_file_is_named_the_same_however_its_path_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through links too, but for one to a hub's cache, where files have digests for names."""
    pictures, labels = tiny_tasks.pictures(4)
    path = save(tmp_path / "x.npz", test_images=pictures, test_labels=labels)
    (tmp_path / "link.npz").symlink_to(path)
    (tmp_path / "0a1b").write_bytes(path.read_bytes())
    (tmp_path / "y.npz").symlink_to(tmp_path / "0a1b")
    monkeypatch.chdir(tmp_path)
    for spelled in ("x.npz", "./x.npz", str(path), "link.npz", f"../{tmp_path.name}/link.npz"):
        found = images.read(spelled, None, "test", None)
        assert (short_name(found.name), found.file) == ("x.npz", "x.npz:test")
    assert short_name(images.read("y.npz", None, "test", None).name) == "y.npz"


def test_limit_and_held_out_images_are_of_all_classes(tmp_path: Path) -> None:
    folder = tiny_tasks.data("image_classification", tmp_path)
    assert read(folder, limit=3).labels == [0, 1, 0]
    for each in ("val", "test"):
        (folder / each).rename(tmp_path.parent / f"{tmp_path.name}-{each}")
    held, left = read(folder, "valid"), read(folder, "train")
    assert [path.name for path in held.pictures] == ["000.png", "001.png", "020.png", "021.png"]
    assert held.labels == [0, 1, 0, 1]
    assert len(left.pictures) == 36
    assert (held.file, left.file) == ("train[1of10]", "train[9of10]")


def test_arrays_without_a_split(tmp_path: Path) -> None:
    pictures, labels = tiny_tasks.pictures(20)
    path = save(tmp_path / "x.npz", val_images=pictures, val_labels=labels[:, None])
    assert read(path, "test").labels == labels.tolist()
    assert read(path, "valid").labels == labels[[0, 10]].tolist()
    assert read(path, "train", 4).file == "x.npz:val[9of10]"
    with pytest.raises(UserError, match=r"no train split; expected a folder .* train_images"):
        read(save(tmp_path / "y.npz", test_images=pictures, test_labels=labels), "train")


def preparation(channels: int = 3, size: int = 2, **settings: Any) -> Preparation:
    config = ViTConfig(image_size=size, num_channels=channels)
    return Preparation(images.default_settings(config, VIT) | settings, config)


def test_preparation_of_bytes_and_floats() -> None:
    """(pixel / 255 - mean) / std, channels first."""
    made = preparation(image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 1.0, 2.0])
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    expected = (pixels / 255 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    found = made.tensor(pixels)
    assert found.dtype == torch.float32
    assert found.permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(made.tensor(pixels / 255), found)
    black_and_white = (pixels > 100).astype(np.float32)  # as floats they could be bytes
    assert torch.equal(made.tensor(black_and_white), made.tensor((pixels > 100) * np.uint8(255)))


def test_grey_images_fill_all_channels() -> None:
    made = preparation(do_normalize=False)
    found = made.tensor(np.full((2, 2), 51, dtype=np.uint8))
    assert torch.allclose(found, torch.full((3, 2, 2), 0.2))
    with pytest.raises(FormatError, match="the images have 3 channels, the model takes 1"):
        preparation(channels=1).tensor(np.zeros((2, 2, 3), dtype=np.uint8))


def test_grey_models_read_colour_files_as_grey(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (255, 255, 255)).save(tmp_path / "x.png")
    made = preparation(channels=1, do_normalize=False)
    assert torch.equal(made.tensor(tmp_path / "x.png"), torch.ones(1, 2, 2))


def test_what_the_model_file_says_counts() -> None:
    made = tiny_tasks.checkpoint("image_classification")
    assert Preparation.of(made).settings["image_mean"] == [0.5] * 3
    made.info["image_processor"] = Preparation.of(made).settings | {"resample": 3}
    assert Preparation.of(made).settings == made.info["image_processor"]
    made.info["image"] = {"size": [8, 8], "mean": [0.5], "std": [0.5]}
    with pytest.raises(FormatError, match="says in an older form how images are prepared; make it"):
        Preparation.of(made)


@pytest.mark.parametrize("said", [[], {}, {"image_processor_type": 1}, {"size": 8}])
def test_settings_that_are_none(said: Any) -> None:
    with pytest.raises(FormatError, match=r"is no image processor of transformers \S+ that works"):
        Preparation(said, ViTConfig())


def test_images_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, labels = tiny_tasks.pictures(4)
    found = read(save(tmp_path / "x.npz", test_images=pictures, test_labels=labels))
    data = IMAGE_CLASSIFICATION.dataset(found, tiny_tasks.checkpoint("image_classification"))
    first = [data[i]["pixel_values"] for i in range(4)]
    monkeypatch.setattr(Preparation, "tensor", None)
    assert all(torch.equal(data[i]["pixel_values"], first[i]) for i in range(4))


def test_files_are_read_as_transformers_does(tmp_path: Path) -> None:
    """Photos that lie on their side, print colours, palettes, transparency, the first picture."""
    from transformers.image_utils import load_image

    pixels = np.random.default_rng(0).integers(0, 255, (20, 10, 3), dtype=np.uint8)
    image, turned = Image.fromarray(pixels), Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=turned)
    image.convert("CMYK").save(tmp_path / "print.jpg")
    image.convert("P").save(tmp_path / "palette.png", transparency=0)
    image.convert("LA").save(tmp_path / "transparent.png")
    image.convert("1").save(tmp_path / "bits.png")
    image.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (10, 20))])
    for path in tmp_path.iterdir():
        expected = np.asarray(load_image(str(path)))
        assert np.array_equal(images._open(path, 3), expected)
    assert images._open(tmp_path / "turned.jpg", 3).shape == (10, 20, 3)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (0, 5)])
def test_images_that_would_fill_the_memory_are_refused(
    size: tuple[int, int], tmp_path: Path
) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        framed = name + content
        return struct.pack(">I", len(content)) + framed + struct.pack(">I", zlib.crc32(framed))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(FormatError, match=r"x\.png: cannot be read as an image"):
        images._open(tmp_path / "x.png", 3)


def corpus(classes: tuple[str, ...], labels: list[int]) -> Images:
    return Images("x", "test", "x", "0" * 64, np.zeros((len(labels), 8, 8)), labels, classes)


def outputs(
    classes: tuple[str, ...], labels: list[int], names: Sequence[str] = ("Dog", "Cat")
) -> tuple[dict[str, int], str]:
    made = tiny_tasks.checkpoint("image_classification")
    made.info["labels"] = [*names]
    return outputs_of(corpus(classes, labels), made)


def test_classes_and_outputs() -> None:
    assert outputs(("cat", "dog"), [0, 1]) == ({"cat": 1, "dog": 0}, "name")
    assert outputs(("n01", "n02"), [1]) == ({"n01": 0, "n02": 1}, "order")
    assert outputs((), [1]) == ({"0": 0, "1": 1}, "number")
    assert outputs(("bird", "cat"), [1]) == ({"cat": 1}, "name")  # no image of a bird
    for classes in (("a", "b", "c"), ("a", "b"), ("a", "cat"), ("a1", "cat")):
        with pytest.raises(MismatchError, match=r'class "a1?" is none of the model\'s, which are'):
            outputs(classes, [0, 1])
    with pytest.raises(MismatchError, match=r'the class "n03" is none of the model\'s, which are'):
        outputs(("n03", "n04"), [0, 1], ["n01", "n02"])
    with pytest.raises(MismatchError, match="labels from 0 to 2, the model has 2 classes"):
        outputs((), [0, 2])


def test_folders_of_numbers_are_in_their_order(tmp_path: Path) -> None:
    """Whatever classes a split has, and whatever else lies among the folders."""
    for split, numbers in {"train": range(1, 13), "test": (12, 2)}.items():
        for number in numbers:
            place = tmp_path / split / str(number)
            place.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(place / "a.png")
            for junk in ("._a.png", ".DS_Store", "Thumbs.db"):
                (place / junk).write_bytes(b"x")
            os.mkfifo(place / "pipe.png")
        for junk in (".ipynb_checkpoints", "__MACOSX"):
            (tmp_path / split / junk).mkdir()
    made = tiny_tasks.checkpoint("image_classification", labels=12)
    read = IMAGE_CLASSIFICATION.read(str(tmp_path), None, "test", None)
    assert IMAGE_CLASSIFICATION.dataset(read, made).labels == [1, 11]
    assert made.info | IMAGE_CLASSIFICATION.learned(made, read) == made.info | {
        "labels": [str(number) for number in range(1, 13)]
    }


@pytest.mark.parametrize(("classes", "k"), [(2, 2), (7, 5)])
def test_top_5_of_fewer_classes_says_so(classes: int, k: int, tmp_path: Path) -> None:
    pictures, labels = tiny_tasks.pictures(12)
    path = save(tmp_path / "x.npz", test_images=pictures, test_labels=labels)
    made = tiny_tasks.checkpoint("image_classification", labels=classes)
    lines, report = IMAGE_CLASSIFICATION.evaluate(made, read(path), SETTINGS)
    assert report["top5"]["name"] == f"top-{k}"
    assert report["top5"]["signature"].endswith(f"|k:{k} of {classes}")
    data = IMAGE_CLASSIFICATION.dataset(read(path), made)
    with torch.no_grad():
        logits = torch.stack(
            [made.model(pixel_values=each["pixel_values"][None]).logits[0] for each in data]
        )
    assert lines == [str(i) for i in logits.argmax(1).tolist()]
    likeliest = logits.topk(k).indices
    share = float((likeliest == torch.tensor(labels)[:, None]).any(1).float().mean())
    assert report["top5"]["value"] == pytest.approx(100 * share, abs=1e-4)


def test_models_for_text_are_refused() -> None:
    made = tiny_tasks.checkpoint("text_classification")
    with pytest.raises(MismatchError, match="reads no images; a model for images was expected"):
        IMAGE_CLASSIFICATION.length(made)


IMAGES, LABELS = tiny_tasks.pictures(4)


@pytest.mark.parametrize(
    ("pictures", "labels", "message"),
    [
        (IMAGES[:, :0], LABELS, r"test_images is uint8 \(4, 0, 8, 3\); expected"),
        (IMAGES.astype(np.int64), LABELS, r"test_images is int64 \(4, 8, 8, 3\); expected"),
        (IMAGES[..., :2], LABELS, r"test_images is uint8 \(4, 8, 8, 2\)"),
        (IMAGES[0, 0], LABELS, r"test_images is uint8 \(8, 3\)"),
        (IMAGES / 100, LABELS, r"test_images has values from .* floats from 0 to 1 were expected"),
        (IMAGES * np.nan, LABELS, "test_images has values from nan to nan"),
        (IMAGES, LABELS[:3], r"test_labels is int64 \(3,\); expected 4 whole numbers"),
        (IMAGES, LABELS / 2, "test_labels is float64"),
        (IMAGES[:0], LABELS[:0], "no images for test"),
    ],
)
def test_other_arrays_are_refused(pictures: Any, labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(save(tmp_path / "x.npz", test_images=pictures, test_labels=labels))
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "x.npz", test_images=IMAGES, test_labels=LABELS).read_bytes()
    objects = np.array([{}], dtype=object)
    contents = {"text": b"text", "cut": whole[:200], "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "one.npy", IMAGES)
    save(tmp_path / "pickled.npz", test_images=objects, test_labels=objects)
    save(tmp_path / "unlabelled.npz", test_images=IMAGES)
    for name in (*contents, "one.npy", "pickled.npz", "unlabelled.npz"):
        with pytest.raises(FormatError, match=rf"{name}: not such an \.npz file") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no test split; expected a folder with train, valid"):
        read(tmp_path)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(FormatError, match=r"no images \(\.png, .*\) for test"):
        read(tmp_path)
    (tmp_path / "test" / "cat" / "x.png").write_bytes(b"no image")
    with pytest.raises(FormatError, match=r"x\.png: cannot be read as an image"):
        preparation().tensor(read(tmp_path).pictures[0])


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image in a folder further down, and one of a kind that is not read."""
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name)
    (tmp_path / "test" / "cat" / "Thumbs.db").touch()
    assert IMAGE_CLASSIFICATION.read(str(tmp_path), None, "test", None).labels == [0, 1]
    assert "left out" not in caplog.text
    (tmp_path / "test" / "cat" / "more").mkdir()
    (tmp_path / "test" / "dog" / "c.tif").touch()
    assert IMAGE_CLASSIFICATION.read(str(tmp_path), None, "test", None).labels == [0, 1]
    assert "left out: cat/more, dog/c.tif." in caplog.text


def test_pixels_of_16_bits_are_refused(tmp_path: Path) -> None:
    """Pillow would cut off what is above 255."""
    from PIL import Image

    folder = tmp_path / "test" / "0"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(folder / "x.png")
    made = tiny_tasks.checkpoint("image_classification")
    with pytest.raises(FormatError, match=r"x\.png: its pixels have more than 8 bits \(mode I"):
        IMAGE_CLASSIFICATION.evaluate(made, read(tmp_path), SETTINGS)
    Image.new("1", (50_000, 1001)).save(folder / "x.png")  # 8 kB
    with pytest.raises(FormatError, match=r"x\.png: has 50000 x 1001 pixels, at most 50,000,000"):
        IMAGE_CLASSIFICATION.evaluate(made, read(tmp_path), SETTINGS)
