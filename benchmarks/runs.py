"""Scripts as subprocesses: what they cost, and a cache, so that an interrupted run goes on."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from composable import files
from composable.errors import UserError

RECORD = "record.json"


@dataclass(frozen=True)
class Out:
    """An output of a run, by its name within the run's folder."""

    name: str


@dataclass(frozen=True)
class Artifact:
    """A file that a run wrote, or one from elsewhere; equal content counts as equal input."""

    path: Path
    sha256: str
    run: "Run | None" = None

    @classmethod
    def of(cls, path: Path) -> "Artifact":
        """Name a file by its content."""
        return cls(path, _sha256(path))


Argument = str | Out | Artifact


@dataclass
class Run:
    """A finished run of a script.

    Attributes:
        folder: what it wrote.
        report: the JSON it printed.
        cpu_seconds: user and system time of the process and its children.
        wall_seconds: from start to end.
        facts: machine, versions, commit and date.
        outputs: name -> SHA-256 of the files it wrote.
        command: script, arguments, threads, repeat; to make it again.
    """

    folder: Path
    report: dict[str, Any]
    cpu_seconds: float
    wall_seconds: float
    facts: dict[str, Any]
    outputs: dict[str, str]
    command: tuple[str, tuple[Argument, ...], int, int]

    def output(self, name: str) -> Artifact:
        """Return a file it wrote, as an input of other runs."""
        return Artifact(self.folder / name, self.outputs[name], self)

    def rows(self, name: str) -> list[dict[str, str]]:
        """Read a CSV it wrote."""
        import csv

        with open(self.folder / name, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


class Runner:
    """Runs scripts and remembers what they gave.

    Args:
        folder: of the cache.
        jobs: how many run side by side in `parallel`.
        device: cpu or cuda; the GPU's name belongs to a run's identity.
        made: identities of the runs that may be recalled; it grows with those that are made.
            None: all of them.
    """

    def __init__(
        self, folder: Path, jobs: int = 2, device: str = "cpu", made: set[str] | None = None
    ):
        self.folder, self.jobs, self.device, self.made = folder, jobs, device, made
        self.used: dict[str, Run] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._has_failed = False
        self._machine = machine.name(machine.describe(device))

    def run(self, script: str, *args: Argument, threads: int = 1, repeat: int = 0) -> Run:
        """Run `python SCRIPT ARGS`, or return what the same command gave earlier.

        Args:
            script: path from the repository's root, or `-m NAME`.
            args: texts, outputs (`Out`) and inputs (`Artifact`).
            threads: of the process.
            repeat: number of a repeat, which is a run of its own.

        Raises:
            UserError: the script fails.
        """
        command = (script, args, threads, repeat)
        key = self._key(command)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if self._has_failed:
                raise UserError("left out, since another run failed.")
            if key not in self.used:
                folder = self.folder / f"{Path(script.split()[-1]).stem}-{key[:16]}"
                is_old = self.made is not None and key not in self.made
                found = None if is_old else self._recall(folder, command)
                self.used[key] = found or self._make(folder, command)
                if self.made is not None:
                    self.made.add(key)
            return self.used[key]

    def parallel(self, calls: Iterable[Callable[[], Any]]) -> list[Any]:
        """Do several things that do not need each other, side by side; values in order."""
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(call) for call in calls]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                self._has_failed = True  # a thread that waits for another's run must not make it
                for one in waiting:
                    one.cancel()
                raise

    def drop(self, artifact: Artifact) -> None:
        """Delete a large file that is not needed any more; a later need makes it again."""
        artifact.path.unlink(missing_ok=True)

    def facts(self) -> list[dict[str, Any]]:
        """Return what all runs used so far depend on, each combination once."""
        found = {files.canonical_json(run.facts): run.facts for run in self.used.values()}
        return [found[text] for text in sorted(found)]

    def seconds(self) -> float:
        """Wall seconds of all runs used so far, one after another."""
        return sum(run.wall_seconds for run in self.used.values())

    def _key(self, command: tuple[str, tuple[Argument, ...], int, int]) -> str:
        """Identity of a run: what it is, not at which commit it was made."""
        script, args, threads, repeat = command
        words = [_identity(arg) for arg in args]
        return files.digest_of([script, words, threads, repeat, self._machine])

    def _recall(self, folder: Path, command: Any) -> Run | None:
        record = folder / RECORD
        if not record.is_file():
            return None
        return Run(folder=folder, command=command, **files.read_json(record))

    def _make(self, folder: Path, command: tuple[str, tuple[Argument, ...], int, int]) -> Run:
        script, args, threads, _ = command
        self._restore(args)
        shutil.rmtree(folder, ignore_errors=True)  # a training that goes on would seem too short
        folder.mkdir(parents=True)
        words = [*script.split(), *(_word(arg, folder) for arg in args)]
        print_step(f"{' '.join([script, *(_shown(arg) for arg in args)])}")
        cpu, wall = _execute([sys.executable, *words], folder, threads)
        text = (folder / "stdout").read_text(encoding="utf-8")
        names = [arg.name for arg in args if isinstance(arg, Out)]
        found: dict[str, Any] = {
            "report": _without_paths(json.loads(text) if text.strip() else {}),
            "cpu_seconds": round(cpu, 3),
            "wall_seconds": round(wall, 3),
            "facts": machine.describe(self.device),
            "outputs": {n: _sha256(folder / n) for n in names if (folder / n).is_file()},
        }
        files.write_json(folder / RECORD, found)
        return Run(folder=folder, command=command, **found)

    def _restore(self, args: Sequence[Argument]) -> None:
        """Make inputs again that were dropped."""
        for arg in args:
            if isinstance(arg, Artifact) and arg.run and not arg.path.is_file():
                self._make(arg.run.folder, arg.run.command)


def print_step(text: str) -> None:
    """Say on stderr what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)  # noqa: T201


def _execute(words: list[str], folder: Path, threads: int) -> tuple[float, float]:
    """Run a process and return its CPU and wall seconds; stdout and stderr go to files."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "COMPOSABLE_PROGRESS": "0",
        "COMPOSABLE_WORKDIR": str(folder),  # checkpoints, and what no option names
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(machine.ROOT),
    }
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            words,
            cwd=machine.ROOT,
            env=environment,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip()
        last = tail.splitlines()[-1] if tail else "no message"
        raise UserError(f"{folder.name} ended with exit code {process.returncode}: {last}")
    return usage.ru_utime + usage.ru_stime, wall


def _identity(arg: Argument) -> Any:
    if isinstance(arg, Out):
        return {"out": arg.name}
    return {"file": arg.sha256} if isinstance(arg, Artifact) else arg


def _word(arg: Argument, folder: Path) -> str:
    if isinstance(arg, Out):
        return str(folder / arg.name)
    return str(arg.path) if isinstance(arg, Artifact) else arg


def _shown(arg: Argument) -> str:
    if isinstance(arg, Out):
        return arg.name
    return arg.path.name if isinstance(arg, Artifact) else arg


def _without_paths(report: dict[str, Any]) -> dict[str, Any]:
    """Leave out texts that hold a path of this machine."""
    return {k: v for k, v in report.items() if not (isinstance(v, str) and os.sep in v)}


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            total.update(piece)
    return total.hexdigest()
