"""What every benchmark is given: settings, the runner, and the scripts of the chain as calls."""

import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import Argument, Artifact, Out, Run, Runner
from composable import files

#: module name -> entry, as in conf.json
Configuration = dict[str, Any]
TUNED, PRUNED, MODEL, STATS = "tuned.npy", "pruned.npy", "model.pth", "stats.csv"
CALIBRATION = "calibration.npy"


@dataclass
class Context:
    """Settings of a benchmark.

    Attributes:
        runner: runs scripts, or finds what they gave earlier.
        model: what `download_model.py -m` takes, or a model file.
        data: the `--data` option.
        device: cpu or cuda.
        dtype: of autocast in trainings.
        is_quick: try everything with very little data; the figures mean nothing.
    """

    runner: Runner
    model: str = "embedded"
    data: str = "multi30k"
    device: str = "cpu"
    dtype: str = "bfloat16"
    is_quick: bool = False

    def few(self, normally: int, quick: int) -> int:
        """Return one of two numbers."""
        return quick if self.is_quick else normally

    def seconds(self, run: Run) -> float:
        """Return what a run costs: CPU seconds on a CPU, wall seconds on a GPU."""
        return run.cpu_seconds if self.device == "cpu" else run.wall_seconds

    @property
    def clock(self) -> str:
        """Say which seconds these are."""
        return "CPU seconds" if self.device == "cpu" else "wall seconds"

    def start(self) -> float:
        """Return the seconds that the imports of any of the scripts take: median of 5."""
        runs = [
            self.runner.run("benchmarks/probes.py", "start", repeat=turn)
            for turn in range(self.few(5, 2))
        ]
        return statistics.median(map(self.seconds, runs))

    @property
    def reading(self) -> list[str]:
        """Options that say what is read and where it runs."""
        return ["--data", self.texts, "--device", self.device]

    @property
    def texts(self) -> str:
        """The `--data` option: all of the data, or the beginning of each split."""
        return self.first_pairs(96, 32) if self.is_quick else self.data

    def first_pairs(self, train: int, valid: int) -> str:
        """Make a folder with the first pairs of the data; as many to test as to validate."""
        run = self.runner.run(
            "benchmarks/probes.py", "subset", self.data, Out("train.en"), str(train), str(valid)
        )
        return str(run.folder)

    @property
    def training(self) -> list[Argument]:
        """Options of all trainings."""
        return [*self.reading, "--dtype", self.dtype]

    @property
    def samples(self) -> list[str]:
        """Options of the calibration set."""
        return ["--limit", str(self.few(4096, 64))]

    @functools.cached_property
    def model_file(self) -> Artifact | None:
        """The dense model where it was given as a file, read once for its hash."""
        return Artifact.of(Path(self.model)) if Path(self.model).is_file() else None

    def dense(self) -> Artifact:
        """Return the dense model."""
        if self.model_file:
            return self.model_file
        run = self.runner.run("download_model.py", "-m", self.model, "-o", Out(MODEL))
        return run.output(MODEL)

    def write(self, name: str, value: Any) -> Artifact:
        """Write a conf.json or conf_prune.json; several writers of one content do not clash."""
        digest = files.digest_of(value)[:12]
        path = self.runner.folder.parent / "configurations" / f"{name}_{digest}.json"
        files.write_json(path, value)
        return Artifact.of(path)

    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of the dense model's attentions and linears."""
        run = self.runner.run(
            "config_generator.py", "-m", self.dense(), "-o", Out("conf.json"),
            "--attention", "0.5", "--linear", "0",
        )  # fmt: skip
        rates = json.loads((run.folder / "conf.json").read_text())[0]
        attentions = [name for name, rate in rates.items() if rate]
        return attentions, [name for name in rates if name not in attentions]

    def scheme(self, configurations: Artifact) -> Artifact:
        """Run prune_scheme_generator.py."""
        run = self.runner.run(
            "prune_scheme_generator.py", "-i", configurations, "-o", Out("scheme.json")
        )
        return run.output("scheme.json")

    def prune(
        self, scheme: Artifact, linear: str | None = "l1", attention: str | None = "head_l1"
    ) -> Run:
        """Run prune.py; methods that look at inputs measure them (CALIBRATION).

        Args:
            scheme: of linears and attentions.
            linear: method, or None where the scheme has no linear.
            attention: the same for attentions.
        """
        named = {"--linear": linear, "--attention": attention}
        chosen = [word for flag, name in named.items() if name for word in (flag, name)]
        needs = not {linear, attention} <= {"l1", "head_l1", None}
        calibrating: list[Argument] = [
            "--calibration", Out(CALIBRATION), "--data", self.texts, *self.samples,
            "--device", self.device,
        ]  # fmt: skip
        return self.runner.run(
            "prune.py", "-m", self.dense(), "-c", scheme, "-o", Out(PRUNED),
            *chosen, *(calibrating if needs else []),
        )  # fmt: skip

    def tune(
        self,
        solver: str,
        pruned: Run,
        *options: str,
        calibration: Artifact | None = None,
        repeat: int = 0,
    ) -> Run:
        """Run block_level_finetuning.py: bundle TUNED, losses STATS and its table of variants.

        Args:
            solver: grad, ls or hybrid.
            pruned: what `prune` gave.
            options: further ones.
            calibration: measured earlier; without it ls and hybrid measure it themselves.
            repeat: number of the repeat.
        """
        measured: list[Argument] = []
        if solver != "grad":
            measured = ["--calibration", calibration or Out(CALIBRATION), *self.samples]
        return self.runner.run(
            "block_level_finetuning.py", "--solver", solver, "-m", self.dense(),
            "-p", pruned.output(PRUNED), "-o", Out(TUNED), "--stats", Out(STATS),
            *(self.reading if solver == "ls" else self.training), *measured, *options,
            repeat=repeat,
        )  # fmt: skip

    def compose(
        self,
        bundles: Sequence[Artifact],
        configurations: Artifact,
        index: int = 0,
        dense: Artifact | None = None,
    ) -> Run:
        """Run compose_model.py, by default on the context's dense model: MODEL."""
        chosen: list[Argument] = [word for bundle in bundles for word in ("-p", bundle)]
        return self.runner.run(
            "compose_model.py", "-m", dense or self.dense(), *chosen, "-c", configurations,
            "-n", str(index), "-o", Out(MODEL),
        )  # fmt: skip

    def train_composed(
        self, bundle: Artifact, configurations: Artifact, index: int, *options: str
    ) -> Run:
        """Run model_level_finetuning.py: MODEL and STATS."""
        return self.runner.run(
            "model_level_finetuning.py", "-m", self.dense(), "-p", bundle, "-c", configurations,
            "-n", str(index), "-o", Out(MODEL), "--stats", Out(STATS), *self.training, *options,
        )  # fmt: skip

    def train_alone(self, model: Artifact, *options: str) -> Run:
        """Run baseline_finetuning.py: MODEL and STATS."""
        return self.runner.run(
            "baseline_finetuning.py", "-m", model, "-o", Out(MODEL), "--stats", Out(STATS),
            *self.training, *options,
        )  # fmt: skip

    def evaluate(self, model: Artifact, split: str = "test") -> dict[str, Any]:
        """Run evaluate.py, greedy; the report has bleu and loss."""
        run = self.runner.run("evaluate.py", "-m", model, "--split", split, *self.reading)
        return run.report
