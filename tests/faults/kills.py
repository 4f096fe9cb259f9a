"""Commands that are killed, stopped, or out of disk, and then run again."""

import random
import shutil
import signal
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.end_to_end.forked import Ended, Server
from tests.faults import runner, sound
from tests.faults.runner import Pool, Trial
from tests.faults.sound import CALIBRATION, TRAININGS

CPU = ("--device", "cpu")
MODEL = ("-m", "model.pth")
#: Name of a row -> command line, and the files that it makes.
COMMANDS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "download_model.py": (("download_model.py", "-m", "t5_folder", "-o", "o.pth"), ("o.pth",)),
    "rank_importance.py": (
        ("rank_importance.py", *MODEL, "--method", "stat", "--data", "data",
         "--calibration", "new.npy", "--limit", 12, "-o", "o.npz", *CPU),
        ("o.npz", "new.npy"),
    ),
    "config_generator.py": (("config_generator.py", *MODEL, "-o", "o.json"), ("o.json",)),
    "prune_scheme_generator.py": (("prune_scheme_generator.py", "-o", "o.json"), ("o.json",)),
    "prune.py": (
        ("prune.py", *MODEL, "--calibration", "new.npy", "--data", "data",
         "-o", "o.npy", "-p", "o.pth", *CALIBRATION[:2], *CPU),
        ("o.npy", "o.pth", "new.npy"),
    ),
    "compose_model.py": (("compose_model.py", *MODEL, "-o", "o.pth"), ("o.pth",)),
    "block_level_finetuning.py (grad)": (TRAININGS["block_level"], ("trained.npy", "stats*.csv")),
    "block_level_finetuning.py (ls)": (TRAININGS["ls"], ("trained.npy", "stats*.csv")),
    "block_level_finetuning.py (hybrid)": (TRAININGS["hybrid"], ("trained.npy", "stats*.csv")),
    "model_level_finetuning.py": (TRAININGS["model_level"], ("trained.pth", "stats*.csv")),
    "baseline_finetuning.py": (TRAININGS["baseline"], ("trained.pth", "stats*.csv")),
    "evaluate.py": (
        ("evaluate.py", *MODEL, "--data", "data", "--max-length", 6, "--limit", 4, "-o", "o.json",
         "--predictions", "o.txt", *CPU),
        ("o.json", "o.txt"),
    ),
    "plot_loss.py": (("plot_loss.py", "stats_baseline.csv", "-o", "o.png"), ("o.png",)),
    "plot_importance.py": (
        ("plot_importance.py", "scores.npz", "-o", "o.png"), ("o.png",)
    ),
    "report.py": (("report.py", "-d", "out"), ("out/report.md",)),
    "export_model.py": (("export_model.py", *MODEL, "-o", "exported"), ("exported/*",)),
}  # fmt: skip
NEEDS = (
    *sound.CHAIN_FILES, "t5_folder", "stats_baseline.csv", "scores.npz", "out",
)  # fmt: skip
MOST = 150  # changes of files by one command
#: A signal that asks a process to end -> the exit code that it answers with.
ASKED = {signal.SIGTERM: 143, signal.SIGHUP: 129}


#: Seconds in which a process may not have come to its main function: signals end it there.
STARTING = 0.05


@dataclass(frozen=True)
class Undisturbed:
    """What a command makes when nothing happens, and how long it takes."""

    digest: str
    seconds: float


class Killing:
    """One command in all kinds of trouble."""

    def __init__(self, name: str, home: Path, pool: Pool):
        self.name, self.home, self.pool = name, home, pool
        self.command, self.results = COMMANDS[name]
        with pool.place() as (server, folder):
            self._bring(folder)
            started = time.monotonic()
            ended = runner.run(server, [self.command], folder)
            assert ended.code == 0, ended.err
            self.whole = Undisturbed(
                runner.digest(folder, self.results), time.monotonic() - started
            )

    def at_every_write(self, act: str = "signal") -> list[Trial]:
        """Kill it (or fill the disk) before each change that it makes to a file."""
        trials: list[Trial] = []
        while not trials or (trials[-1].case["happened"] and len(trials) < MOST):
            batch = range(len(trials) + 1, len(trials) + 1 + 2 * self.pool.size)
            trials += self.pool.run([self._job({"write": n, "act": [act]}) for n in batch])
        return [trial for trial in trials if trial.case["happened"]]

    def at_random_times(self, count: int = 20, signals: tuple[int, ...] = ()) -> list[Trial]:
        """Send it signals while it runs: of each as many, in turn."""
        draw = random.Random(zlib.crc32(self.name.encode()))
        # who is asked must have come as far as to its main function
        earliest, signals = (0.35, signals) if signals else (0.02, (signal.SIGKILL,))
        faults = [
            {"seconds": round(draw.uniform(earliest, 1) * self.whole.seconds, 3), "signal_": number}
            for _ in range(count)
            for number in map(int, signals)
        ]
        return self.pool.run([self._job(fault) for fault in faults])

    def _bring(self, folder: Path) -> None:
        sound.copy(self.home, folder, NEEDS)

    def _job(self, fault: dict[str, Any]) -> runner.Job:
        def job(server: Server, folder: Path) -> Trial:
            self._bring(folder)
            before = sorted(folder.rglob("*"))
            ended = runner.run(server, [self.command], folder, **fault)
            happened = ended.code != 0
            outcome, said = self._first(ended, fault)
            if not outcome:
                outcome, said = self._again(server, folder)
            if outcome == "survived" and (left := _leftovers(folder, before)):
                outcome, said = "another result", f"leaves {left}"
            case = {"command": self.name, **fault, "happened": happened}
            return Trial(self.name, "killed", case, outcome, said)

        return job

    def _first(self, ended: Ended, fault: dict[str, Any]) -> tuple[str, str]:
        """Judge the disturbed run; "" where it ended as it should."""
        number = fault.get("signal_", signal.SIGKILL)
        is_early = fault.get("seconds", 1) < STARTING  # Python has not come to our handler yet
        if (ended.code == -number and (number == signal.SIGKILL or is_early)) or ended.code == 0:
            return "", ""
        wanted = 1 if fault.get("act") == ["full"] else ASKED.get(number)
        outcome, said = runner.judge(ended, "", "", False)
        if ended.code == wanted and outcome == "refused":
            return "", ""
        return ("traceback" if outcome == "refused" else outcome), f"{fault}: {ended.code} {said}"

    def _again(self, server: Server, folder: Path) -> tuple[str, str]:
        """Run the same command once more, undisturbed; an export wants an empty folder."""
        if self.name.startswith("export"):
            shutil.rmtree(folder / "exported", ignore_errors=True)
        again = runner.run(server, [self.command], folder)
        outcome, said = runner.judge(
            again, runner.digest(folder, self.results), self.whole.digest, False
        )
        return ("another result", f"refused the second time: {said}") if outcome == "refused" else (
            outcome, said
        )  # fmt: skip


def _leftovers(folder: Path, before: list[Path]) -> list[str]:
    """Temporary files and checkpoints that the second run left lying about."""
    new = sorted(set(folder.rglob("*")) - set(before))
    found = (path for path in new if path.suffix == ".tmp" or "checkpoint-" in path.name)
    return [str(path.relative_to(folder)) for path in found]
