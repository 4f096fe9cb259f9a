"""Real processes without the start-up time: a server that has torch loaded forks one per command.

The server is this file as a program. It imports what the scripts import, computes nothing (torch's
autograd does not survive a fork) and forks a child for every command; the child runs the script as
`python SCRIPT ARGS` would and may be told to die. Everything that kills lies here, not in the code
that is tested.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.paths import ROOT


@dataclass(frozen=True)
class Ended:
    """A process that ended: exit code (minus the signal's number if killed), stdout, stderr."""

    code: int
    out: str
    err: str

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
    kept = {key: value for key, value in os.environ.items() if not key.startswith("COMPOSABLE_P")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Server:
    """Runs scripts, one after another.

    Use as a context manager.
    """

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def run(
        self, script: str, *args: object, cwd: Path, file_limit: int | None = None, **fault: Any
    ) -> Ended:
        """Run a script in `cwd`.

        Args:
            script: name of a top-level script.
            args: its arguments.
            cwd: folder to run in.
            file_limit: bytes that one file may have.
            fault: where and how the process gets into trouble, see `_arm`.
        """
        out, err = cwd / ".stdout", cwd / ".stderr"
        command = {
            "script": str(ROOT / script), "args": [str(arg) for arg in args], "cwd": str(cwd),
            "out": str(out), "err": str(err), "file_limit": file_limit, "fault": fault,
        }  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server died"
        ended = Ended(os.waitstatus_to_exitcode(int(answer)), out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
        return ended


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import composable.training.finetune
    import composable.variants.tuning

    assert composable.variants.tuning
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            _run(command)
        print(os.waitpid(child, 0)[1], flush=True)  # noqa: T201


def _run(command: dict[str, Any]) -> None:
    """Be the script, and end."""
    os.chdir(command["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        target = os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [command["script"], *command["args"]]
    if command["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_limit"],) * 2)
    code = 1
    try:
        _arm(**command["fault"])
        runpy.run_path(command["script"], run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(call: str = "", count: int = 1, half: str = "", signal_: int = signal.SIGKILL) -> None:
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
    """
    import transformers

    from composable import runs
    from composable.formats import bundle
    from composable.models import checkpoint
    from composable.training import checkpoints, trainer

    owner, name = {
        "": (None, ""),
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
    if owner is None:
        return
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


if __name__ == "__main__":
    _serve()
