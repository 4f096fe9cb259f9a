"""Models of a wanted size: uniform and allocated, on the texts of the calibration and on others."""

import gzip
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import CALIBRATION, MODEL, PRUNED, TUNED, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import chains, dense_of
from benchmarks.runs import Artifact, Out, Run
from benchmarks.spread import number
from benchmarks.unit_choice import amount, evaluate

ALLOCATIONS = ("uniform", "stat")
#: Of the layers' parameters.
PARAMETERS = (0.8, 0.6, 0.5)
SCORES, CONFIGURATIONS = "scores.npz", "conf.json"
#: Tokens of each of two domains in a mixed calibration text, and of its held-out part.
HALF, HALF_HELD_OUT = 32_768, 8_192
NOTES = [
    "Heads and neurons by the default methods; 65,536 tokens of calibration, for scores and "
    "variants.",
    "`stat` gives every layer a share of its own ([costs.md](costs.md#sizes)), `uniform` the same "
    "to all. Single runs.",
]


@dataclass
class Family:
    """Models of several sizes out of one dense model.

    Attributes:
        context: of the benchmark.
        dense: the model.
        data: whose texts it is calibrated on.
        metric: of which sizes are shares.
        sizes: shares kept.
        seconds: stage -> seconds, summed up.
    """

    context: Context
    dense: Artifact
    data: str
    metric: str
    sizes: tuple[float, ...]
    seconds: dict[str, float]

    def __init__(
        self, context: Context, dense: Artifact, data: str, metric: str, sizes: tuple[float, ...]
    ):
        self.context, self.dense, self.data = context, dense, data
        self.metric, self.sizes, self.seconds = metric, sizes, {}

    def make(self, allocation: str) -> tuple[Run, Artifact]:
        """Choose the sizes of all layers, make and refit the variants they need.

        Returns:
            The run of config_generator.py, and the bundle.
        """
        reading = ("--data", self.data, *amount(self.context))
        ranked = self._run(
            "rank_importance.py", "--method", "stat", "-m", self.dense, "-o", Out(SCORES),
            "--calibration", Out(CALIBRATION), *reading,
        )  # fmt: skip
        sized = self._run(
            "config_generator.py", "-m", self.dense, "-o", Out(CONFIGURATIONS),
            "--scores", ranked.output(SCORES), "--sizes", *map(str, self.sizes),
            "--metric", self.metric, "--allocate", allocation,
        )  # fmt: skip
        scheme = self.context.scheme(sized.output(CONFIGURATIONS))
        measured = ranked.output(CALIBRATION)
        pruned = self._run(
            "prune.py", "-m", self.dense, "-c", scheme, "-o", Out(PRUNED),
            "--calibration", measured, *reading,
        )  # fmt: skip
        fitted = self._run(
            "block_level_finetuning.py", "--solver", "ls", "-m", self.dense,
            "-p", pruned.output(PRUNED), "-o", Out(TUNED), "--stats", Out("stats.csv"),
            "--calibration", measured, "--device", self.context.device, *reading,
        )  # fmt: skip
        return sized, fitted.output(TUNED)

    def compose(self, sized: Run, bundle: Artifact, index: int) -> Artifact:
        """Put one of the models together."""
        run = self._run(
            "compose_model.py", "-m", self.dense, "-p", bundle,
            "-c", sized.output(CONFIGURATIONS), "-n", str(index), "-o", Out(MODEL),
        )  # fmt: skip
        return run.output(MODEL)

    def _run(self, script: str, *args: Any) -> Run:
        run = self.context.runner.run(script, *args)
        self.seconds[script] = self.seconds.get(script, 0.0) + run.cpu_seconds
        return run


def share(sized: Run, index: int, metric: str) -> str:
    """What config_generator.py says a configuration keeps of a metric."""
    return f"{sized.report['costs'][index]['shares'][metric]:.1%}"


def language_model(context: Context) -> tuple[Table, Any]:
    """SmolLM2: calibrated on one domain and on two, scored on three."""
    data = Path(context.data).resolve()
    llama = chains(data)[2]
    dense = dense_of(context, llama)
    folder = context.runner.folder.parent / "texts"
    mixed = str(mix(context, dense, data, folder))
    captions = folder / "val.en.txt"
    captions.write_text(lines_of(data / "multi30k" / "val.en.gz"), encoding="utf-8")
    places = {
        "WikiText-2": (str(data / "wikitext-2"), 400),
        "captions": (str(captions), 500),
        "PTB": (str(data / "ptb" / "valid.txt.gz"), 300),
    }

    few = (lambda limit: 32) if context.is_quick else (lambda limit: limit)

    def scores(model: Artifact, names: tuple[str, ...]) -> dict[str, float]:
        reports = {name: evaluate(context, model, places[name][0], few(places[name][1]))
                   for name in names}  # fmt: skip
        return {name: float(report["perplexity"]["value"]) for name, report in reports.items()}

    base = scores(dense, tuple(places))
    texts = {"WikiText-2": str(data / "wikitext-2"), "half captions": mixed}
    scored = {"WikiText-2": ("WikiText-2",), "half captions": ("captions", "PTB")}

    def one(name: str, allocation: str) -> list[Any]:
        family = Family(context, dense, texts[name], "layer-parameters", PARAMETERS)
        sized, bundle = family.make(allocation)
        rows = []
        for index, size in enumerate(PARAMETERS):
            model = family.compose(sized, bundle, index)
            rows.append([name, allocation, size, share(sized, index, "macs"),
                         scores(model, scored[name])])  # fmt: skip
            context.runner.drop(model)
        return rows

    pairs = [(name, allocation) for name in texts for allocation in ALLOCATIONS]
    found = context.runner.parallel([partial(one, *pair) for pair in pairs])
    rows = [
        [name, allocation, f"{size:.0%}", macs,
         *(f"{values[place]:,.2f} ({values[place] / base[place]:.2f})" if place in values else ""
           for place in places)]
        for group in found
        for name, allocation, size, macs, values in group
    ]  # fmt: skip
    dense_row = ["", "dense", "100%", "100%", *(f"{v:,.2f}" for v in base.values())]
    table = Table(
        ["calibrated on", "allocation", "size", "MACs", *places],
        [dense_row, *rows],
        title=f"**{llama.what.split(' on ')[0]}.** Perplexity (times dense) by `--sizes "
        f"{' '.join(map(str, PARAMETERS))} --metric layer-parameters`, refitted by `--solver ls`, "
        "nothing trained.",
    )  # fmt: skip
    return table, {"dense": base, "found": found}


def mix(context: Context, dense: Artifact, data: Path, folder: Path) -> Path:
    """Write calibration texts that are half WikiText-2 and half Multi30K's English captions."""
    folder = folder / "mixed"
    folder.mkdir(parents=True, exist_ok=True)
    captions = folder.parent / "train.en.txt"
    captions.write_text(lines_of(data / "multi30k" / "train.en.gz"), encoding="utf-8")
    article = folder.parent / "article.txt"
    lines = lines_of(data / "wikitext-2" / "valid.txt.gz").split("\n")
    article.write_text("\n".join(lines[: len(lines) * 9 // 10]), encoding="utf-8")
    rest = folder.parent / "rest.txt"
    rest.write_text("\n".join(lines[len(lines) * 9 // 10 :]), encoding="utf-8")
    later = folder.parent / "later.txt"
    later.write_text("\n".join(captions.read_text().split("\n")[-3000:]), encoding="utf-8")
    for name, sources, tokens in (
        ("train", (article, captions), HALF),
        ("valid", (rest, later), HALF_HELD_OUT),
    ):
        parts = [
            context.runner.run(
                "benchmarks/probes.py", "prefix", dense, Artifact.of(source), Out("part.txt"),
                str(tokens),
            ).folder / "part.txt"
            for source in sources
        ]  # fmt: skip
        text = "\n".join(part.read_text(encoding="utf-8") for part in parts)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def lines_of(path: Path) -> str:
    """Read a packed text."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def measure(context: Context) -> Section:
    """Make models of SmolLM2."""
    table, found = language_model(context)
    notes = [
        *NOTES,
        "`half captions`: calibrated half on WikiText-2, half on Multi30K's English captions "
        "(train.en); scored on the first 500 lines of val.en and the first 300 of PTB's valid "
        "text, which no calibration has seen.",
    ]
    return Section("A size that is asked for", [table], notes, {"ran": [], "found": found})


def seconds_of(family: Family) -> str:
    """Say what each stage of a family cost."""
    return ", ".join(f"{name} {number(value)}" for name, value in family.seconds.items())
