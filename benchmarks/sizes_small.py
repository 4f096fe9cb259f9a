"""Sizes of MiniLM: sentence embeddings, a classifier, and a bundle of mixed variants."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import CALIBRATION, MODEL, PRUNED, TUNED, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import chains, dense_of
from benchmarks.runs import Artifact, Out
from benchmarks.sizes import ALLOCATIONS, CONFIGURATIONS, Family, lines_of, share
from benchmarks.unit_choice import amount, evaluate

#: Shares of the MACs: for embeddings, and for the classifier.
MACS, TASK_MACS = (0.7, 0.5, 0.3), (0.7, 0.5)
STEPS = ("--steps", "200")
#: Sentences of SST-2.
SCORED = 2000
NOTE = ["Single runs; methods, calibration, allocations as [above](#a-size-that-is-asked-for)."]


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
        return [[allocation, size, share(sized, i, "parameters"), report["cosines"][i]]
                for i, size in enumerate(MACS)]  # fmt: skip

    found = context.runner.parallel([partial(one, allocation) for allocation in ALLOCATIONS])
    rows = [
        [allocation, f"{size:.0%}", parameters, f"{cosine:.4f}"]
        for group in found
        for allocation, size, parameters, cosine in group
    ]
    table = Table(
        ["allocation", "MACs", "parameters", "cosine"], rows,
        title="**all-MiniLM-L6-v2, sentence embeddings.** Cosine of mean-pooled embeddings with "
        "the dense model's, mean over the first 500 lines of Multi30K val.en; calibrated on "
        "train.en; `--metric macs`, refitted by `--solver ls`, nothing trained.",
    )  # fmt: skip
    return table, found


def classifier(context: Context) -> tuple[Table, Any]:
    """MiniLM fine-tuned on SST-2: accuracy as composed, and after a short training."""
    bert = chains(Path(context.data).resolve())[0]
    dense, data = dense_of(context, bert), str(bert.data)
    base = evaluate(context, dense, data, SCORED)
    steps = ("--steps", "2", "--limit", "64") if context.is_quick else STEPS
    same = context.runner.run(
        "baseline_finetuning.py", "-m", dense, "-o", Out(MODEL), "--stats", Out("stats.csv"),
        "--data", data, "--device", context.device, "--dtype", context.dtype, *steps,
    ).output(MODEL)  # fmt: skip
    control = evaluate(context, same, data, SCORED)["accuracy"]["value"]

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
                "--dtype", context.dtype, *steps,
            ).output(MODEL)  # fmt: skip
            scores = [
                evaluate(context, each, data, SCORED)["accuracy"]["value"]
                for each in (model, trained)
            ]
            rows.append([allocation, size, *scores])
        return rows

    found = context.runner.parallel([partial(one, allocation) for allocation in ALLOCATIONS])
    rows = [
        [allocation, f"{size:.0%}", *(f"{score:.2f}" for score in scores)]
        for group in found
        for allocation, size, *scores in group
    ]
    score = f"{base['accuracy']['value']:.2f}"
    table = Table(
        ["allocation", "MACs", "composed", "after 200 steps"],
        [["dense", "100%", score, f"{control:.2f}"], *rows],
        title="**all-MiniLM-L6-v2 on SST-2.** Accuracy on the first 2,000 sentences of dev; "
        "calibrated on train, refitted by `--solver ls`. The dense model had the same 200 steps; "
        "where they do not lower the validation loss, the start is kept.",
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
    reading = ("--data", data, *amount(context))
    pruned = context.runner.run(
        "prune.py", "-m", dense, "-c", context.scheme(made), "-o", Out(PRUNED),
        "--calibration", Out(CALIBRATION), *reading,
    )  # fmt: skip
    fitted = context.runner.run(
        "block_level_finetuning.py", "--solver", "ls", "-m", dense, "-p", pruned.output(PRUNED),
        "-o", Out(TUNED), "--stats", Out("stats.csv"), "--device", context.device,
        "--calibration", pruned.output(CALIBRATION), *reading,
    )  # fmt: skip
    rows = []
    for index, name in enumerate(named):
        cells = []
        for bundle in (pruned.output(PRUNED), fitted.output(TUNED)):
            model = context.compose([bundle], made, index, dense).output(MODEL)
            report = evaluate(context, model, data, SCORED)
            cells.append(f"{report['accuracy']['value']:.2f}")
            context.runner.drop(model)
        rows.append([name, f"{report['sparsity']:.1%}", *cells])
    table = Table(
        ["configuration", "of the dense model gone or zero", "as pruned", "refitted"], rows,
        title=f"**One bundle of {pruned.report['variants']} variants by stat, wanda and l1**, "
        "all-MiniLM-L6-v2 on SST-2: three configurations that mix them. Accuracy as above.",
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
    found = [part(context) for part in (embeddings, classifier, mixed)]
    figures = {"ran": [], "found": [figures for _, figures in found]}
    return Section("A size of a small model", [table for table, _ in found], NOTE, figures)
