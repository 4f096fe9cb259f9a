"""Files appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from composable import files
from composable.errors import FormatError, UserError


def test_an_error_keeps_the_older_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail_half_way() -> None:
        with files.atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_one_path_for_two_outputs_is_refused(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a", None, tmp_path / "b")
    with pytest.raises(UserError, match=r"a: is named for two outputs"):
        files.check_writable(tmp_path / "a", tmp_path / "sub" / ".." / "a")
    assert not (tmp_path / "a").exists()


LOOSE = [
    *('{"a": 1, "a": 2}', "[NaN]", "[Infinity]", "[1e999]", "{", "[" * 10**5, '["\\ud800"]'),
    *("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101, "1" * 5000),
]


@pytest.mark.parametrize("text", LOOSE)
def test_loose_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"a\.json: "):
        files.read_json(path)


def test_a_missing_asset_is_one_line() -> None:
    assert (files.assets("captions") / "train.en").is_file()
    with pytest.raises(FormatError, match="assets/nothing is not in this installation"):
        files.assets("nothing")


def test_links_are_followed_and_special_files_refused(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real" / "a", tmp_path / "link", tmp_path / "pipe"
    files.write_text(real, "old")
    link.symlink_to(real)
    files.write_text(link, "new")
    assert real.read_text() == "new"
    assert link.is_symlink()
    os.mkfifo(pipe)
    for write in (files.check_writable, lambda path: files.write_text(path, "x")):
        with pytest.raises(OSError, match="no ordinary file"):
            write(pipe)
        with pytest.raises(IsADirectoryError):
            write(tmp_path)
    assert pipe.is_fifo()


def test_a_log_is_not_replaced_through_dev_stdout(tmp_path: Path) -> None:
    """A rename would leave the log without what was in it, and without what is printed later."""
    log = tmp_path / "log"
    log.write_text("earlier\n")
    code = (
        "import sys; from pathlib import Path; from composable import files\n"
        "for write in (files.check_writable, lambda path: files.write_text(path, 'x')):\n"
        "    try: write(Path(sys.argv[1]))\n"
        "    except files.UserError as error: print(error)\n"
    )
    for path in ("/dev/stdout", "/dev/stderr", str(log)):
        with log.open("a") as file:
            subprocess.run([sys.executable, "-c", code, path], check=True, stdout=file, stderr=file)
    said = log.read_text().splitlines()
    assert said[0] == "earlier"
    assert sum("printed there; name another file to write." in line for line in said) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_reports_hold_finite_numbers(value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a number of the report is not finite"):
        files.write_json(tmp_path / "x.json", {"scores": [{"loss": value}]})
    assert not list(tmp_path.iterdir())


def test_json_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(FormatError, match=r"a\.json: not a JSON file"):
        files.read_json(path)


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    """But not what a run is writing."""
    with files.atomic_write(tmp_path / "a") as file, files.atomic_folder(tmp_path / "b") as folder:
        file.write(b"half")
        (folder / "c").touch()
        left, inner = (tmp_path / f".{name}.0a1b2c3d{files.TEMPORARY}" for name in ("x", "y"))
        left.touch()
        inner.mkdir()
        (inner / "z").touch()
        files.check_writable(tmp_path / "other")
        assert not left.exists()
        assert not inner.exists()
    assert (tmp_path / "a").read_bytes() == b"half"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        files.check_writable(tmp_path / name)
        files.write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"
    with files.atomic_folder(tmp_path / ("f" * 255)) as folder:
        (folder / "a").touch()
    assert (tmp_path / ("f" * 255) / "a").is_file()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_written_is_noticed_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "missing" / "a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").symlink_to(tmp_path / "missing")
    for name in ("file/a", "dangling", "loop", "folder/a", "n" * 256):
        path = tmp_path / name
        for attempt in (files.check_writable, lambda path: files.write_text(path, "x")):
            with pytest.raises(OSError) as caught:  # noqa: PT011 (the path is compared below)
                attempt(path)
            assert str(caught.value.filename) in (str(path), str(path.parent)), name
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dangling",
        "file",
        "folder",
        "loop",
    ]


def test_json_may_be_a_hundred_deep(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100 + "]" * 100)
    assert isinstance(files.read_json(tmp_path / "a.json"), list)


def test_only_ordinary_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"content")
    assert files.read_bytes(tmp_path / "link") == b"content"
    for path, problem in (
        (tmp_path / "pipe", "is no ordinary file"),
        (Path("/dev/zero"), "is no ordinary file"),
        (tmp_path, "is a folder"),
        (tmp_path / "circle", "Too many levels"),
        (tmp_path / "absent", "No such file"),
    ):
        with pytest.raises(OSError, match=problem):
            files.open_input(path)
    with pytest.raises(FormatError, match="has 7 bytes, at most 6 were expected"):
        files.read_bytes(tmp_path / "file", limit=6)


@pytest.mark.parametrize("way", ["same", "hard link", "link"])
def test_what_is_to_be_written_is_not_read(way: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.write_text("content")
    if way == "hard link":
        os.link(source, output)
    elif way == "link":
        output.symlink_to(source)
    else:
        output = source
    with files.reads_no_output():
        files.check_writable(output, tmp_path / "other")
        with pytest.raises(UserError, match="source: is to be written and is also read; name"):
            files.open_input(source)
        files.write_text(tmp_path / "other", "new")
        assert files.read_bytes(tmp_path / "other") == b"new"  # written: it is no input any more
    assert files.read_bytes(source) == b"content"
    files.check_writable(output)
    assert files.read_bytes(source) == b"content"  # only a command is watched
