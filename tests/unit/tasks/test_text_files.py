"""Text files: one encoding, line ends, bounds, and no more of a file than is asked for."""

import csv
import gzip
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composable import tasks
from composable.errors import FormatError, UserError
from composable.tasks import images, multi30k, text_files
from composable.tasks.plain_texts import read_texts
from tests import tiny_tasks


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", ["a\n", "b\n"]),
        (b"a\r\nb", ["a\r\n", "b"]),
        (b"a\rb\r", ["a\r", "b\r"]),
        (b"a\rb", ["a\r", "b"]),
        (b"a\r\rb\n", ["a\r\rb\n"]),  # with \n in the file, \r is in the line
        (b"\xef\xbb\xbfa\nb", ["a\n", "b"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfa", ["\ufeffa"]),
        (b"a\n\xef\xbb\xbfb", ["a\n", "\ufeffb"]),
        ("ü\u2028\x0b\x85\x1cx\n".encode(), ["ü\u2028\x0b\x85\x1cx\n"]),
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"\n\n", ["\n", "\n"]),
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_lines(name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert [*text_files.lines(path)] == expected
    assert text_files.read_text(path) == content.decode("utf-8-sig")


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1"]
)
def test_other_encodings_are_one_line(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", "Hündin\n".encode(encoding))
    with pytest.raises(FormatError, match=r"x\.txt: cannot be read as text \(line 1.*as UTF-8"):
        text_files.read_text(path)


def test_pipes_are_refused_and_nothing_waits(tmp_path: Path) -> None:
    pipe = tmp_path / "test" / "pos" / "x.txt"
    for folder in ("pos", "neg"):
        (tmp_path / "test" / folder).mkdir(parents=True)
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"no ordinary file"):
        tasks.by_name("text_classification").read(str(tmp_path), None, "test", None)
    for name in tasks.names():
        with pytest.raises(UserError, match=r"no ordinary file|no such folder"):
            tasks.by_name(name).read(str(pipe), None, "test", None)


#: Task -> file, and two samples of it.
DATA: dict[str, tuple[str, bytes]] = {
    "text_classification": ("x.tsv.gz", b"text\tlabel\na dog\t0\na cat\t1\n"),
    "text_similarity": ("x.csv.gz", b"text1,text2,score\na,b,0\nc,d,1\n"),
    "question_answering": (
        "x.json.gz",
        tiny_tasks.squad(
            [{"context": "a dog", "qas": [tiny_tasks.asked(i, "who", "a dog")]} for i in (1, 2)]
        ).encode(),
    ),
    "language_modeling": ("x.txt.gz", b"a dog\na cat\n"),
}


@pytest.mark.parametrize("task", DATA)
def test_what_is_read_is_bounded(task: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Of a file that is a thousandth of what it becomes, as of one that is large itself."""
    name, content = DATA[task]
    read = tasks.by_name(task).read
    padding = content + b"\n" * 10_000
    monkeypatch.setattr(text_files, "MOST_BYTES", len(padding))
    read(str(write(tmp_path / name, padding)), None, "test", 1)
    for path in (tmp_path / name, tmp_path / name.removesuffix(".gz")):
        with pytest.raises(FormatError, match=r"has more than 10,\d+ bytes.* the most that is"):
            read(str(write(path, padding + b"\n")), None, "test", None)


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_lines_are_bounded(end: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Short lines need far more memory than the file, which a thousandth of its size may become."""
    path = write(tmp_path / "x.txt.gz", f"a{end}".encode() * 1001)
    assert len(list(text_files.lines(path))) == 1001
    monkeypatch.setattr(text_files, "MOST_LINES", 1000)
    with pytest.raises(FormatError, match=r"x\.txt\.gz: has more than 1,000 lines, the most"):
        list(text_files.lines(path))
    write(path, f"a{end}".encode() * 1000)
    assert len(list(text_files.lines(path))) == 1000


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_no_more_is_read_than_the_limit_asks_for(name: str, tmp_path: Path) -> None:
    """The end of the file is damaged, and never met."""
    line = b'{"text": "a dog"}\n' if "jsonl" in name else b"a dog\n"
    lines = [line.replace(b"dog", str(number).encode()) for number in range(50_000)]
    packed = gzip.compress(b"".join(lines))
    path = tmp_path / name
    path.write_bytes(packed[: len(packed) // 2])
    expected = write(tmp_path / f"few-{name}", b"".join(lines[:3]))
    assert read_texts(path, limit=3).sha256 == read_texts(expected).sha256
    with pytest.raises(FormatError, match="cannot be read as text"):
        read_texts(path)
    if "jsonl" not in name:
        read = tasks.by_name("language_modeling").read
        found, few = (
            read(str(it), None, "test", limit) for it, limit in ((path, 3), (expected, None))
        )
        assert found.sha256 == few.sha256


def test_cells_may_be_long(tmp_path: Path) -> None:
    """Longer than 131,072 characters, the default of Python's csv; which reads the same."""
    cell = 'He said "no",\r\n' * 20_000
    written = io.StringIO()
    csv.writer(written).writerows([["text", "label"], [cell, "1"], ["b", "0"]])
    path = write(tmp_path / "x.csv", written.getvalue().encode())
    corpus = tasks.by_name("text_classification").read(str(path), None, "test", None)
    assert corpus.texts == [cell.strip(), "b"]
    assert corpus.rows == [2, 3]


def npz(path: Path, shape: tuple[int, ...], content: bytes) -> Path:
    """An archive of images whose header says `shape`, and of labels."""
    header = io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    labels = io.BytesIO()
    np.save(labels, np.zeros(max(0, min(shape[0], 9)), dtype=np.int64))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test_images.npy", header.getvalue() + content)
        archive.writestr("test_labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**13, 8, 8), "test_images has 640,000,000,000,000 bytes, more than 1,073,741,824"),
        ((2**80, 8, 8), "more than 1,073,741,824"),
        ((9, 8, 8), "test_images has 64 bytes, 576 were expected"),
        ((-1, 8, 8), "test_images holds no rows of numbers"),
        ((2**80, 0), "not such an .npz file"),
    ],
)
def test_sizes_in_archives_are_not_trusted(
    shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        images.read(str(npz(tmp_path / "x.npz", shape, bytes(64))), None, "test", None)


def test_the_first_images_of_an_archive_are_read_alone(tmp_path: Path) -> None:
    """Those of an archive that has no more than these, and says so."""
    pictures, _ = tiny_tasks.pictures(4)
    grey = np.ascontiguousarray(pictures[..., 0])
    archive = npz(tmp_path / "x.npz", (2**40, 8, 8), grey.tobytes())
    found = images.read(str(archive), None, "test", 3)
    assert np.array_equal(found.pictures, grey[:3])


def test_downloads_that_become_large_are_refused() -> None:
    packed = gzip.compress(b"a\n" * 2**24)
    assert len(packed) < 100_000
    found = multi30k._fault_of_gzip("train.en", packed)
    assert found == f"{2**23} lines, 29000 were expected"  # 16 MiB of the 32
