"""Folders of runs: one run at a time, nothing that is changed is taken for whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composable import runs
from composable.errors import FormatError, UserError
from composable.runs import RunFolder
from tests.end_to_end.forked import environment


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """Three files, one of them empty, under a seal."""
    folder = tmp_path / "run-0123456789abcdef" / "checkpoint-8"
    folder.mkdir(parents=True)
    for name, content in (("a.bin", b"some bytes"), ("b.json", b"{}"), ("empty", b"")):
        (folder / name).write_bytes(content)
    runs.seal(folder)
    runs.check_seal(folder)
    return folder


def test_a_flipped_bit_of_every_byte_is_found(sealed: Path) -> None:
    """But in the spaces of the seal's own JSON, where JSON stays the same."""

    def is_whole() -> bool:
        try:
            runs.check_seal(sealed)
        except FormatError:
            return False
        return True

    for path in sealed.iterdir():
        whole = path.read_bytes()
        for position in range(len(whole)):
            content = bytearray(whole)
            content[position] ^= 1 << position % 8
            path.write_bytes(content)
            assert not is_whole() or json.loads(content) == json.loads(whole), (path, position)
        path.write_bytes(whole)
    assert is_whole()


def swap(folder: Path) -> None:
    (folder / "a.bin").rename(folder / "c")
    (folder / "b.json").rename(folder / "a.bin")
    (folder / "c").rename(folder / "b.json")


def link(folder: Path) -> None:
    (folder / "a.bin").rename(folder.parent / "a.bin")
    (folder / "a.bin").symlink_to("../a.bin")


def link_all(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "was cut off": lambda folder: (folder / runs.SEAL).unlink(),
    r"seal.json is not readable": lambda folder: (folder / runs.SEAL).write_bytes(b"{"),
    r"seal.json is another's": lambda folder: (folder / runs.SEAL).write_bytes(b"[]"),
    r"a.bin is missing": lambda folder: (folder / "a.bin").unlink(),
    r"more.pt is missing, or is not of it": lambda folder: (folder / "more.pt").touch(),
    r"empty was changed": lambda folder: (folder / "empty").write_bytes(b"\0"),
    r"a.bin was changed|b.json was changed": swap,
    r"a.bin was changed": link,
    r"a link": link_all,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_found(sealed: Path, message: str) -> None:
    DAMAGES[message](sealed)
    with pytest.raises(FormatError, match=message):
        runs.check_seal(sealed)


def test_a_pipe_is_no_file(sealed: Path) -> None:
    (sealed / "a.bin").unlink()
    os.mkfifo(sealed / "a.bin")
    with pytest.raises(FormatError, match=r"a.bin was changed"):
        runs.check_seal(sealed)


@pytest.mark.parametrize("place", ["run-0123456789abcdef/checkpoint-16", "run-0/checkpoint-8"])
def test_a_folder_of_another_place_is_not_taken(sealed: Path, place: str) -> None:
    other = sealed.parents[1] / place
    shutil.copytree(sealed, other)
    with pytest.raises(FormatError, match="is another's"):
        runs.check_seal(other)
    moved = sealed.parents[1] / "moved"
    shutil.copytree(sealed.parent, moved / sealed.parent.name)
    runs.check_seal(moved / sealed.parent.name / sealed.name)  # all together may move


def test_sealed_files(tmp_path: Path) -> None:
    path, other = tmp_path / "one", tmp_path / "two"
    with pytest.raises(FileNotFoundError):
        runs.read_sealed(path)
    runs.write_sealed(path, b"content")
    assert runs.read_sealed(path) == b"content"
    whole = path.read_bytes()
    for change in (
        b"",
        whole[:-1],
        whole + b"\0",
        whole[:31],
        b"\0" + whole[1:],
        whole[:-1] + b"s",
    ):
        path.write_bytes(change)
        with pytest.raises(FormatError, match="is damaged"):
            runs.read_sealed(path)
    other.write_bytes(whole)
    with pytest.raises(FormatError, match="is damaged"):
        runs.read_sealed(other)
    path.unlink()
    path.symlink_to(other)
    with pytest.raises(FormatError, match="is damaged"):
        runs.read_sealed(path)


HOLD = """
import sys, time
from pathlib import Path
from composable.runs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Also where a process that it forked lives on."""
    path = tmp_path / "run-0123456789abcdef"
    code = HOLD.replace("time.sleep", "import os; os.fork(); time.sleep")
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env=environment(), stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert other.stdout
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"process {other.pid} on .* is at work on the same; wait"):
        RunFolder(path)
    RunFolder(path, is_main=False).release()  # another process of the same run
    other.kill()  # not the one it forked
    other.wait()
    RunFolder(path).release()
    os.killpg(other.pid, signal.SIGKILL)
    other.stdout.close()


def test_a_lock_that_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "run-0123456789abcdef"
    path.mkdir()
    os.mkfifo(path / runs.LOCK)
    with pytest.raises(OSError, match="is no ordinary file") as caught:
        RunFolder(path)
    assert caught.value.filename == str(path / runs.LOCK)


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    path = tmp_path / "run-0123456789abcdef"
    first = RunFolder(path)
    (path / "part").touch()
    first.clear()
    assert [entry.name for entry in path.iterdir()] == [runs.LOCK]
    with pytest.raises(UserError, match=rf"process {os.getpid()} on "):
        RunFolder(path)
    first.release(remove=True)
    assert not path.exists()
    second = RunFolder(path)
    first.release(remove=True)  # has nothing any more
    assert path.exists()
    del second  # as at the end of a process
    RunFolder(path).release()


def test_what_abandoned_runs_left_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "composable")
    busy = RunFolder(tmp_path / "model-0123456789abcdef")
    RunFolder(tmp_path / "block-0123456789abcdef").release()
    (tmp_path / "block-0123456789abcdef" / "checkpoint-8").mkdir()
    (tmp_path / "block-0123456789abcdef" / "checkpoint-8" / "x").write_bytes(bytes(2_500_000))
    (tmp_path / "runs").mkdir()
    caplog.clear()
    RunFolder(tmp_path / "ls-0123456789abcdef").release()
    (message,) = caplog.messages
    assert "block-0123456789abcdef (2.5 MB); delete the folders" in message
    assert "model-" not in message
    busy.release()
