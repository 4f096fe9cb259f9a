"""Runs cases in children of warm processes, two at a time, and says how each ended."""

import os
import queue
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.end_to_end.forked import Ended, Server

#: How a case may end. The last three must never happen.
OUTCOMES = ("refused", "survived", "another file", "another result", "traceback", "hang")
BAD = OUTCOMES[3:]
#: Seconds of processor and wall time until a command hangs; bytes of memory that are too many.
SECONDS, WALL, MEMORY = 25, 60, 1 << 30
#: What commands import late, so that it is there before a child is forked.
PRELOAD = (
    "transformers.models.t5.modeling_t5", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama", "transformers.models.vit.modeling_vit",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.image_processing_auto", "composable.calibration.obtain",
    "composable.variants.compose", "composable.ranking", "composable.models.pretrained",
    "composable.tasks", "composable.commands.cli", "torchtext.data.metrics", "sacrebleu",
    "matplotlib.figure", "PIL.Image",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One case and its end.

    Attributes:
        kind: what was damaged, or which command was disturbed.
        fault: how, a row of the report.
        case: what repeats it, as JSON has it.
        outcome: one of OUTCOMES.
        said: the last line of stderr, or how the process died.
    """

    kind: str
    fault: str
    case: dict[str, Any]
    outcome: str
    said: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the program failed."""
        return self.outcome in BAD


@dataclass(frozen=True)
class Kind:
    """Something that the program reads, and what reads it.

    Attributes:
        name: a row of the report.
        files: what is damaged; patterns below the folder of sound files, one file at a time.
        needs: files and folders that the commands read beside it.
        commands: command lines, one after another in one process.
        results: files that the commands write; the digest of all of them is the result.
        is_sealed: whether any change has to be noticed, or to be without influence.
        documents: end of a file name -> how its content is edited.
        free: pattern of paths in a document, joined by slashes, where any value makes another
            sound file.
        answers: the result that counts after an edit, where `results` repeat what was edited.
    """

    name: str
    files: tuple[str, ...]
    needs: tuple[str, ...]
    commands: tuple[tuple[Any, ...], ...]
    results: tuple[str, ...]
    is_sealed: bool = False
    documents: dict[str, Any] = field(default_factory=dict)
    free: str = "^$"
    answers: tuple[str, ...] = ()


Job = Callable[[Server, Path], Trial]


class Pool:
    """Warm processes that run jobs side by side."""

    def __init__(self, servers: list[Server], folder: Path):
        self.folder = folder
        self.free: queue.Queue[Server] = queue.Queue()
        for server in servers:
            self.free.put(server)
        self.size = len(servers)

    def run(self, jobs: Iterable[Job]) -> list[Trial]:
        """Run all; results are in the order of the jobs."""
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(self._run, jobs))

    def _run(self, job: Job) -> Trial:
        with self.place() as (server, folder):
            return job(server, folder)

    @contextmanager
    def place(self) -> Iterator[tuple[Server, Path]]:
        """Lend a process and an empty folder."""
        server = self.free.get()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield server, folder
        finally:
            self.free.put(server)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def pool(folder: Path, size: int = 0) -> Iterator[Pool]:
    """Start as many processes as there are cores, or `size`."""
    with ExitStack() as stack:
        count = size or os.cpu_count() or 1
        servers = [stack.enter_context(Server(PRELOAD)) for _ in range(count)]
        yield Pool(servers, folder)


def run(server: Server, commands: Any, folder: Path, **fault: Any) -> Ended:
    """Run command lines with limits of time; without progress bars or devices of chance."""
    scripts = [(name, *args, "-q") for name, *args in commands]
    limits = {"RLIMIT_CPU": SECONDS, "wall": WALL, "memory": 3 * MEMORY}
    return server.run_all(scripts, cwd=folder, limits=limits, **fault)


def digest(folder: Path, results: tuple[str, ...]) -> str:
    """Hash files, but for what they say of speed."""
    total = sha256()
    for path in sorted(each for pattern in results for each in folder.glob(pattern)):
        content = path.read_bytes()
        if path.name.startswith("stats"):
            rows = [line.split(b",") for line in content.splitlines()]
            kept = [i for i, name in enumerate(rows[0]) if b"seconds" not in name]
            content = repr([[row[i] for i in kept if i < len(row)] for row in rows]).encode()
        if path.suffix == ".json":
            content = re.sub(rb'"\w+_per_second": [^,\n]+', b"", content)
        total.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return total.hexdigest()


def judge(ended: Ended, found: str, expected: str, is_other_sound: bool) -> tuple[str, str]:
    """Say how a process ended, and what it said.

    Args:
        ended: the process.
        found: digest of what it wrote.
        expected: digest of what an undisturbed one writes.
        is_other_sound: whether another result is right, as the file may be another sound one.
    """
    lines = ended.err.strip().splitlines() or [""]
    if ended.code < 0:
        killed = f"killed by signal {-ended.code}"
        return ("hang" if ended.code in (-14, -24, -9) else "traceback"), killed
    if ended.memory > MEMORY or "out of memory" in lines[-1]:
        return "hang", f"{ended.memory >> 20} MB of memory: {lines[-1]:.300}"
    if "Traceback (most recent call last)" in ended.err:
        return "traceback", _where(lines)
    if ended.code:
        fault = unclean(ended.err)
        return ("traceback", f"{fault}: {lines[-1]!a:.300}") if fault else ("refused", lines[-1])
    if found == expected:
        return "survived", lines[-1]
    return ("another file" if is_other_sound else "another result"), lines[-1]


def unclean(err: str) -> str:
    """What is wrong with the message of a refusal; "" where nothing is."""
    *_, last = err.strip().splitlines() or [""]
    if not last.startswith("Error: "):
        return "no line of error"
    if len(last) > 1200:
        return "a message of more than 1,200 characters"
    if any(unicodedata.category(each) == "Cc" for each in err if each not in "\n\r\t"):
        return "control characters in the message"
    return ""


def _where(lines: list[str]) -> str:
    """The exception, and the last line of ours that it passed."""
    ours = [line.strip() for line in lines if "/composable/" in line and "File " in line]
    place = ours[-1].rpartition("/composable/")[2].replace('"', "") if ours else ""
    return f"{lines[-1]:.200} ({place})"
