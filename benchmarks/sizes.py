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
#: Of SmolLM2's layers' parameters, and of MiniLM's MACs.
PARAMETERS, MACS, TASK_MACS = (0.8, 0.6, 0.5), (0.7, 0.5, 0.3), (0.7, 0.5)
STEPS = ("--steps", "200")
SCORES, CONFIGURATIONS = "scores.npz", "conf.json"
#: Tokens of each of two domains in a mixed calibration text, and of its held-out part.
HALF, HALF_HELD_OUT = 32_768, 8_192


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
        reading = ("--calibration-data", self.data, *amount(self.context))
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
            "--checkpoint-dir", Out("checkpoints"),
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
        "captions": (str(captions), None),
        "PTB": (str(data / "ptb" / "valid.txt.gz"), None),
    }

    def scores(model: Artifact) -> dict[str, float]:
        few = (lambda limit: 32) if context.is_quick else (lambda limit: limit)
        found = {name: evaluate(context, model, where, few(limit))
                 for name, (where, limit) in places.items()}  # fmt: skip
        return {name: float(report["perplexity"]["value"]) for name, report in found.items()}

    base = scores(dense)
    texts = {"WikiText-2": str(data / "wikitext-2"), "half captions": mixed}

    def one(name: str, allocation: str) -> list[Any]:
        family = Family(context, dense, texts[name], "layer-parameters", PARAMETERS)
        sized, bundle = family.make(allocation)
        rows = []
        for index, size in enumerate(PARAMETERS):
            model = family.compose(sized, bundle, index)
            rows.append([name, allocation, size, share(sized, index, "layer_parameters"),
                         share(sized, index, "macs"), scores(model)])  # fmt: skip
            context.runner.drop(model)
        return rows

    pairs = [(name, allocation) for name in texts for allocation in ALLOCATIONS]
    found = context.runner.parallel([partial(one, *pair) for pair in pairs])
    rows = [
        [name, allocation, f"{size:.0%}", kept, macs,
         *(f"{value:,.2f} ({value / base[place]:.2f})" for place, value in values.items())]
        for group in found
        for name, allocation, size, kept, macs, values in group
    ]  # fmt: skip
    dense_row = ["", "dense", "100%", "100%", "100%", *(f"{v:,.2f}" for v in base.values())]
    table = Table(
        ["calibrated on", "allocation", "size", "layers' parameters", "MACs", *places],
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


def embeddings(context: Context) -> tuple[Table, Any]:
    """MiniLM as it comes: cosine of sentence embeddings with those of the dense model."""
    data = Path(context.data).resolve()
    bert = chains(data)[0]
    dense = context.runner.run("download_model.py", *bert.source, "-o", Out(MODEL)).output(MODEL)
    folder = context.runner.folder.parent / "texts" / "captions"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in (("train", "train.en.gz"), ("valid", "val.en.gz")):
        lines = lines_of(data / "multi30k" / source).strip().split("\n")
        table = "".join(f"{line.strip()}\t{i % 2}\n" for i, line in enumerate(lines))
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{table}", encoding="utf-8")
    texts = Artifact.of(folder / "valid.tsv")

    def one(allocation: str) -> list[Any]:
        family = Family(context, dense, str(folder), "macs", MACS)
        sized, bundle = family.make(allocation)
        models = [family.compose(sized, bundle, index) for index in range(len(MACS))]
        report = context.runner.run(
            "benchmarks/probes.py", "embeddings", texts, str(context.few(500, 16)), dense, *models
        ).report
        for model in models:
            context.runner.drop(model)
        return [[allocation, size, share(sized, i, "macs"), share(sized, i, "parameters"),
                 report["cosines"][i]] for i, size in enumerate(MACS)]  # fmt: skip

    found = context.runner.parallel([partial(one, allocation) for allocation in ALLOCATIONS])
    rows = [
        [allocation, f"{size:.0%}", macs, parameters, f"{cosine:.4f}"]
        for group in found
        for allocation, size, macs, parameters, cosine in group
    ]
    table = Table(
        ["allocation", "size", "MACs", "parameters", "cosine"], rows,
        title="**all-MiniLM-L6-v2, sentence embeddings.** Cosine of mean-pooled embeddings with "
        "the dense model's, mean over the first 500 lines of Multi30K val.en; calibrated on "
        "train.en; `--metric macs`, refitted by `--solver ls`, nothing trained.",
    )  # fmt: skip
    return table, found


def classifier(context: Context) -> tuple[Table, Any]:
    """MiniLM fine-tuned on SST-2: accuracy as composed, and after a short training."""
    bert = chains(Path(context.data).resolve())[0]
    dense, data = dense_of(context, bert), str(bert.data)
    base = evaluate(context, dense, data, None)
    steps = ("--steps", "2", "--limit", "64") if context.is_quick else STEPS

    def one(allocation: str) -> list[Any]:
        family = Family(context, dense, data, "macs", TASK_MACS)
        sized, bundle = family.make(allocation)
        rows = []
        for index, size in enumerate(TASK_MACS):
            model = family.compose(sized, bundle, index)
            trained = context.runner.run(
                "model_level_finetuning.py", "-m", dense, "-p", bundle,
                "-c", sized.output(CONFIGURATIONS), "-n", str(index), "-o", Out(MODEL),
                "--stats", Out("stats.csv"), "--data", data, "--device", context.device,
                "--dtype", context.dtype, "--checkpoint-dir", Out("checkpoints"), *steps,
            ).output(MODEL)  # fmt: skip
            scores = [
                evaluate(context, each, data, None)["accuracy"]["value"]
                for each in (model, trained)
            ]
            rows.append([allocation, size, share(sized, index, "macs"), *scores])
        return rows

    found = context.runner.parallel([partial(one, allocation) for allocation in ALLOCATIONS])
    rows = [
        [allocation, f"{size:.0%}", macs, *(f"{score:.2f}" for score in scores)]
        for group in found
        for allocation, size, macs, *scores in group
    ]
    score = f"{base['accuracy']['value']:.2f}"
    table = Table(
        ["allocation", "size", "MACs", "composed", "after 200 steps"],
        [["dense", "100%", "100%", score, ""], *rows],
        title="**all-MiniLM-L6-v2 on SST-2.** Accuracy on dev; calibrated on train, refitted by "
        "`--solver ls`.",
        note=f"Signature: `{base['accuracy']['signature']}`.",
    )  # fmt: skip
    return table, found


def mixed(context: Context) -> tuple[Table, Any]:
    """One bundle with variants of three methods, and configurations that mix them."""
    bert = chains(Path(context.data).resolve())[0]
    dense, data = dense_of(context, bert), str(bert.data)
    kinds = context.runner.run("benchmarks/probes.py", "modules", dense).report["kinds"]
    halves = {
        "a quarter of the heads by stat, half of the ffns' weights by wanda":
            {name: _first(name, kind) for name, kind in kinds.items()},
        "half of the neurons by stat, half of o's weights by l1":
            {name: _second(name, kind) for name, kind in kinds.items()},
    }  # fmt: skip
    one, other = halves.values()
    turns = {name: (other if _layer(name) % 2 else one)[name] for name in kinds}
    named = {**halves, "the two in turns, layer by layer": turns}
    wanted = [{n: e for n, e in entries.items() if e} for entries in named.values()]
    made = context.write("mixed", wanted)
    reading = ("--calibration-data", data, *amount(context))
    pruned = context.runner.run(
        "prune.py", "-m", dense, "-c", context.scheme(made), "-o", Out(PRUNED),
        "--calibration", Out(CALIBRATION), *reading,
    )  # fmt: skip
    fitted = context.runner.run(
        "block_level_finetuning.py", "--solver", "ls", "-m", dense, "-p", pruned.output(PRUNED),
        "-o", Out(TUNED), "--stats", Out("stats.csv"), "--device", context.device,
        "--calibration", pruned.output(CALIBRATION), "--checkpoint-dir", Out("checkpoints"),
        *reading,
    )  # fmt: skip
    rows = []
    for index, name in enumerate(named):
        cells = []
        for bundle in (pruned.output(PRUNED), fitted.output(TUNED)):
            model = context.compose([bundle], made, index, dense).output(MODEL)
            report = evaluate(context, model, data, None)
            cells.append(f"{report['accuracy']['value']:.2f}")
            context.runner.drop(model)
        rows.append([name, f"{report['removed']:.1%}", *cells])
    table = Table(
        ["configuration", "of the dense model gone or zero", "as pruned", "refitted"], rows,
        title=f"**One bundle of {pruned.report['variants']} variants by stat, wanda and l1**, "
        "all-MiniLM-L6-v2 on SST-2: three configurations that mix them. Accuracy on dev.",
    )  # fmt: skip
    return table, rows


def _first(name: str, kind: str) -> Any:
    if kind == "attention":
        return {"rate": 0.25, "method": "stat"}
    is_o = ".attention." in name
    return {"rate": 0.5, "method": "wanda"} if kind == "linear" and not is_o else None


def _second(name: str, kind: str) -> Any:
    if kind == "ffn":
        return {"rate": 0.5, "method": "stat"}
    is_o = ".attention." in name
    return {"rate": 0.5, "method": "l1"} if kind == "linear" and is_o else None


def _layer(name: str) -> int:
    return next((int(word) for word in name.split(".") if word.isdecimal()), 0)


def measure(context: Context) -> Section:
    """Make all of them."""
    parts = [partial(part, context) for part in (language_model, embeddings, classifier, mixed)]
    found = [part() for part in parts]
    notes = [
        "Heads and neurons by the default methods. Calibration: 65,536 tokens, scores and variants "
        "of the same texts, measured once.",
        "`half captions`: half of the calibration's tokens are of WikiText-2, half of Multi30K's "
        "English captions (train.en); captions are scored on val.en, PTB on its valid text, which "
        "no calibration has seen.",
        "`stat` gives every layer a share of its own (docs/costs.md), `uniform` the same share to "
        "all.",
        "Single runs.",
    ]
    figures = {"ran": [], "found": [figures for _, figures in found]}
    return Section("A size that is asked for", [table for table, _ in found], notes, figures)


def seconds_of(family: Family) -> str:
    """Say what each stage of a family cost."""
    return ", ".join(f"{name} {number(value)}" for name, value in family.seconds.items())
