"""Real processes without the start-up time: a server that has torch loaded forks one per command.

The server is this file as a program. It imports what the scripts import, computes nothing (torch's
autograd does not survive a fork) and forks a child for every command; the child runs the script as
`python SCRIPT ARGS` would and may be told to die. Everything that kills lies here, not in the code
that is tested.
"""

import errno
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.paths import ROOT


@dataclass(frozen=True)
class Ended:
    """A process that ended.

    Attributes:
        code: exit code, minus the signal's number if killed.
        out, err: stdout and stderr.
        memory: bytes at its peak; 0 where not measured.
    """

    code: int
    out: str
    err: str
    memory: int = 0

    @property
    def report(self) -> dict[str, Any]:
        """The JSON object that stdout has to be."""
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line that stderr has to be after a failure, but for log lines before it."""
        assert "Traceback" not in self.err, self.err
        *_, last = self.err.strip().splitlines()
        assert last.startswith("Error: "), self.err
        return last


def environment() -> dict[str, str]:
    """The environment for scripts in subprocesses: one thread, nothing left of other settings."""
    ours = ("COMPOSABLE_PROGRESS", "COMPOSABLE_WORKDIR")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Server:
    """Runs scripts, one after another.

    Use as a context manager.

    Args:
        preload: modules that the scripts import late, imported once for all of them.
    """

    def __init__(self, preload: tuple[str, ...] = ()):
        self.preload = preload

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, __file__, *self.preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=120)

    def run(
        self, script: str, *args: object, cwd: Path, file_limit: int | None = None, **fault: Any
    ) -> Ended:
        """Run a script in `cwd`.

        Args:
            script: name of a top-level script.
            args: its arguments.
            cwd: folder to run in.
            file_limit: bytes that one file may have.
            fault: where and how the process gets into trouble, see `_arm` and `_arm_write`.
        """
        limits = {"RLIMIT_FSIZE": file_limit} if file_limit else {}
        return self.run_all([(script, *args)], cwd=cwd, limits=limits, **fault)

    def run_all(
        self,
        scripts: Sequence[Sequence[object]],
        cwd: Path,
        limits: Mapping[str, int],
        log: str = "",
        **fault: Any,
    ) -> Ended:
        """Run scripts in one process, until one fails.

        Args:
            scripts: name and arguments of each.
            cwd, fault: as of `run`.
            limits: names of the module `resource` -> value; "wall" -> seconds until SIGALRM,
                "memory" -> bytes of address space beside what the process has at its start.
            log: start of the names of the files in `cwd` that hold stdout and stderr meanwhile.
        """
        out, err = cwd / f"{log}.stdout", cwd / f"{log}.stderr"
        command = {
            "scripts": [[str(ROOT / name), *map(str, args)] for name, *args in scripts],
            "cwd": str(cwd), "out": str(out), "err": str(err), "limits": limits, "fault": fault,
        }  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server died"
        status, memory = map(int, answer.split())
        said = [path.read_text(errors="replace") for path in (out, err)]
        out.unlink()
        err.unlink()
        return Ended(os.waitstatus_to_exitcode(status), *said, memory)


def _serve() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have said nohup
    import torch

    torch.set_num_threads(1)
    import composable.training.finetune
    import composable.variants.tuning

    assert composable.variants.tuning
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            _run(command)
        _, status, used = os.wait4(child, 0)
        print(status, used.ru_maxrss * 1024, flush=True)  # noqa: T201


def _run(command: dict[str, Any]) -> None:
    """Be the scripts, one after another, and end."""
    os.chdir(command["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        target = os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        for name, limit in command["limits"].items():
            if name == "wall":
                signal.alarm(limit)
            elif name == "memory":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                whole = pages * resource.getpagesize() + limit
                resource.setrlimit(resource.RLIMIT_AS, (whole, whole))
            else:
                resource.setrlimit(getattr(resource, name), (limit, limit))
        _arm(**command["fault"])
        for script, *args in command["scripts"]:
            code = _call(script, args)
            if code:
                break
    except BaseException:  # noqa: BLE001
        code = 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(script: str, args: list[str]) -> int:
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0


def _arm(
    call: str = "",
    count: int = 1,
    half: str = "",
    signal_: int = signal.SIGKILL,
    write: int = 0,
    seconds: float = 0.0,
    act: Sequence[str] = ("signal",),
) -> None:
    """Send this process a signal when a function is called for the n-th time.

    Args:
        call: `step`, `optimizer` (model.safetensors is written, the optimizer is not), `state` (all
            but trainer_state.json is written), `seal` (all but the seal is), `rotate` (the new
            checkpoint is complete, old ones are still there), `validation`, `output` or `bundle`
            (the training is over, no result is written).
            `full` is no signal: from the optimizer of the first checkpoint on the disk is full.
        count: n.
        half: file of a checkpoint that is left with a part of its bytes.
        signal_: what is sent.
        write: before which change of a file below the working directory, counted from 1 ...
        seconds: ... or after how long `act` happens.
        act: `signal`; `full`, nothing can be written any more; `overwrite`, FROM, TO: the bytes
            of one file are written into another that exists.
    """
    if write:
        sys.addaudithook(_AtWrite(write, act, signal_))
    if seconds:
        _after(seconds, act, signal_)
    if not call:
        return
    import transformers

    from composable import runs
    from composable.formats import bundle
    from composable.models import checkpoint
    from composable.training import checkpoints, trainer

    owner, name = {
        "step": (transformers.Trainer, "training_step"),
        "optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
        "full": (transformers.Trainer, "_save_optimizer_and_scheduler"),
        "state": (transformers.TrainerState, "save_to_json"),
        "seal": (runs, "seal"),
        "rotate": (checkpoints, "rotate"),
        "validation": (trainer.Trainer, "prediction_step"),
        "output": (checkpoint, "save"),
        "bundle": (bundle, "write"),
    }[call]
    if call == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            if half:
                folder = Path(args[1]) if call == "optimizer" else Path(args[1]).parent
                (folder / half).write_bytes(b"PK\x03\x04 cut off"[: 2 + 2 * (half[-1] != "n")])
            if call == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
            else:
                os.kill(os.getpid(), signal_)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


class _AtWrite:
    """An audit hook: it sees every change of a file that Python makes, before it is made."""

    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")

    def __init__(self, count: int, act: Sequence[str], signal_: int):
        self.left, self.act, self.signal, self.folder = count, act, signal_, os.getcwd() + os.sep

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
        if not (is_write or event in self.CHANGES) or not isinstance(args[0], str | os.PathLike):
            return
        if not os.path.abspath(args[0]).startswith(self.folder):
            return
        self.left -= 1
        if self.act[0] == "full":
            if self.left == 0:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # stderr is a file too
            if self.left <= 0 and (is_write or event == "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        elif self.left == 0:
            _do(self.act, self.signal, os.getpid())


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _after(seconds: float, act: Sequence[str], signal_: int) -> None:
    """Do it from a process of its own, which waits."""
    victim = os.getpid()
    if os.fork():
        return
    signal.alarm(0)
    deadline = time.monotonic() + seconds
    while os.getppid() == victim and time.monotonic() < deadline:
        time.sleep(min(0.02, max(0.0, deadline - time.monotonic())))
    if os.getppid() == victim:
        _do(act, signal_, victim)
    os._exit(0)


def _do(act: Sequence[str], signal_: int, victim: int) -> None:
    if act[0] == "overwrite":
        with open(act[1], "rb") as source, open(act[2], "r+b") as target:
            shutil.copyfileobj(source, target)
            target.truncate()
    else:
        os.kill(victim, signal_)


if __name__ == "__main__":
    _serve()
