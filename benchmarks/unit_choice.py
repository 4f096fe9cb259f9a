"""Which heads and neurons go: every method at two rates, as pruned and after the refit."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import CALIBRATION, MODEL, PRUNED, TUNED, Configuration, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import chains, dense_of
from benchmarks.runs import Artifact, Out, Run
from benchmarks.spread import number
from benchmarks.unit_choice_picture import draw
from composable import methods

RATES = (0.2, 0.5)
KINDS = {"ffn": "neurons", "attention": "heads"}
#: Of SmolLM2: what goes, by default methods, and by which solvers the variants are fitted.
CONFIGURATIONS: dict[str, dict[str, float]] = {
    "a fifth of the neurons": {"ffn": 0.2},
    "half of the neurons": {"ffn": 0.5},
    "a third of the heads": {"attention": 0.33},
    "a third of the heads, half of the neurons": {"attention": 0.33, "ffn": 0.5},
}
SOLVERS = ("ls", "hybrid")
REFITTED = (
    "Refitted: `--solver ls`, ridge 0.01. Calibration: 65,536 tokens of the training split; error: "
    "squared error over squared dense output on a quarter as many others, mean over the modules. "
    "Seconds: CPU, one thread, both rates together, without calibration."
)


@dataclass
class Setup:
    """A dense model and its texts.

    Attributes:
        what: one line on both.
        dense: the model.
        data: of its task.
        limit: samples that are scored; None: all of the test split.
        report: of evaluate.py on the dense model.
    """

    what: str
    dense: Artifact
    data: str
    limit: int | None
    report: dict[str, Any]

    @property
    def score(self) -> float:
        """The dense model's main score."""
        return float(self.report[self.report["main"]]["value"])


def language_model(context: Context) -> Setup:
    """Name SmolLM2 and its texts."""
    llama = chains(Path(context.data).resolve())[2]
    return _setup(context, llama.what, dense_of(context, llama), str(llama.data), 400)


def small_models(context: Context) -> list[Setup]:
    """Name MiniLM, the embedded T5, and their texts."""
    data = Path(context.data).resolve()
    bert = chains(data)[0]
    t5 = context.runner.run("download_model.py", "-m", "embedded", "-o", Out(MODEL)).output(MODEL)
    what = "the embedded T5 (4.25 M parameters) on Multi30K"
    return [
        _setup(context, bert.what, dense_of(context, bert), str(bert.data), 1000),
        _setup(context, what, t5, str(data / "multi30k"), 300),
    ]


def _setup(context: Context, what: str, dense: Artifact, data: str, limit: int | None) -> Setup:
    limit = 32 if context.is_quick else limit
    return Setup(what, dense, data, limit, evaluate(context, dense, data, limit))


def evaluate(context: Context, model: Artifact, data: str, limit: int | None) -> dict[str, Any]:
    """Run evaluate.py in float32."""
    few = ("--limit", str(limit)) if limit else ()
    run = context.runner.run(
        "evaluate.py", "-m", model, "--data", data, "--device", context.device,
        "--dtype", "float32", *few,
    )  # fmt: skip
    return run.report


def amount(context: Context) -> tuple[str, ...]:
    """Options for how much is calibrated on: as prune.py by default."""
    return ("--limit", "16") if context.is_quick else ()


def calibration(context: Context, setup: Setup) -> Artifact:
    """Measure the statistics of both splits once, for all methods."""
    kinds = context.runner.run("benchmarks/probes.py", "modules", setup.dense).report["kinds"]
    one = next(name for name, kind in kinds.items() if kind == "ffn")
    scheme = context.write("one", {one: [{"rate": 0.5, "method": "stat"}]})
    reading = (*amount(context), "--data", setup.data, "--device", context.device)
    pruned = context.runner.run(
        "prune.py", "-m", setup.dense, "-c", scheme, "-o", Out(PRUNED),
        "--calibration", Out(CALIBRATION), *reading,
    )  # fmt: skip
    fitted = context.runner.run(
        "block_level_finetuning.py", "--solver", "ls", "-m", setup.dense,
        "-p", pruned.output(PRUNED), "-o", Out(TUNED), "--stats", Out("stats.csv"),
        "--calibration", Out(CALIBRATION), *reading,
    )  # fmt: skip
    return fitted.output(CALIBRATION)


def selectors(kind: str) -> list[str]:
    """Names of the methods that choose units of a kind by weights or inputs."""
    return [m.name for m in methods.METHODS if kind in m.kinds and "scores" not in m.needs]


def try_methods(context: Context, setup: Setup) -> dict[str, dict[str, Any]]:
    """Try every method for every kind: kind -> method -> what the probe printed."""
    measured = calibration(context, setup)
    few: tuple[str, ...] = ("--limit", str(setup.limit)) if setup.limit else ()
    few += ("--samples", "16") if context.is_quick else ()

    def one(kind: str, method: str) -> dict[str, Any]:
        run = context.runner.run(
            "benchmarks/unit_choice_probe.py", setup.dense, measured, kind, method,
            *map(str, RATES), "--data", setup.data, "--device", context.device, *few,
        )  # fmt: skip
        return run.report

    pairs = [(kind, method) for kind in KINDS for method in selectors(kind)]
    found = context.runner.parallel([partial(one, *pair) for pair in pairs])
    tables: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for (kind, method), report in zip(pairs, found, strict=True):
        tables[kind][method] = report
    return tables


def compose_default(context: Context, setup: Setup) -> list[dict[str, Any]]:
    """Take the configurations through prune.py, both solvers and evaluate.py, all by default."""
    kinds = context.runner.run("benchmarks/probes.py", "modules", setup.dense).report["kinds"]
    wanted: list[Configuration] = [
        {name: rates[kind] for name, kind in kinds.items() if kind in rates}
        for rates in CONFIGURATIONS.values()
    ]
    made = context.write("default", wanted)
    pruned = context.runner.run(
        "prune.py", "-m", setup.dense, "-c", context.scheme(made), "-o", Out(PRUNED),
        "--calibration", Out(CALIBRATION), "--data", setup.data, *amount(context),
    )  # fmt: skip
    fits = [partial(fit, context, setup, pruned, solver) for solver in SOLVERS]
    fitted = dict(zip(SOLVERS, context.runner.parallel(fits), strict=True))
    bundles = {"pruned": pruned.output(PRUNED)}
    bundles |= {solver: run.output(TUNED) for solver, run in fitted.items()}
    wanted_of = [(key, index) for key in bundles for index in range(len(wanted))]
    values = context.runner.parallel(
        [partial(_composed, context, setup, bundles[key], made, i) for key, i in wanted_of]
    )
    rows: list[dict[str, Any]] = [{} for _ in wanted]
    for (key, index), value in zip(wanted_of, values, strict=True):
        rows[index][key] = value
    rows[0] |= {f"{solver} seconds": context.seconds(run) for solver, run in fitted.items()}
    return rows


def fit(context: Context, setup: Setup, pruned: Run, solver: str, *options: str) -> Run:
    """Run block_level_finetuning.py on what prune.py made."""
    return context.runner.run(
        "block_level_finetuning.py", "--solver", solver, "-m", setup.dense,
        "-p", pruned.output(PRUNED), "-o", Out(TUNED), "--stats", Out("stats.csv"),
        "--calibration", pruned.output(CALIBRATION), "--data", setup.data,
        "--device", context.device, *amount(context), *options,
    )  # fmt: skip


def _composed(
    context: Context, setup: Setup, bundle: Artifact, made: Artifact, index: int
) -> float:
    run = context.runner.run(
        "compose_model.py", "-m", setup.dense, "-p", bundle, "-c", made, "-n", str(index),
        "-o", Out(MODEL),
    )  # fmt: skip
    report = evaluate(context, run.output(MODEL), setup.data, setup.limit)
    context.runner.drop(run.output(MODEL))
    return float(report[report["main"]]["value"])


def table_of(setup: Setup, kind: str, found: dict[str, Any]) -> Table:
    """Lay out one kind of one model: methods by rates and stages."""
    is_default = methods.DEFAULTS[kind].name
    rows = []
    for method, report in found.items():
        cells = [f"{one[stage]['score']:,.2f}" for one in report["rates"]
                 for stage in ("pruned", "ls")]  # fmt: skip
        errors = [f"{one['error_after']:.4f}" for one in report["rates"]]
        seconds = [number(report["seconds"][key]) for key in ("choice", "refit")]
        name = f"`{method}`{' (default)' if method == is_default else ''}"
        rows.append([name, *cells, *errors, *seconds])
    first = next(iter(found.values()))["rates"]
    asked = [f"{one['rate']:.0%}" for one in first]
    stages = [f"{rate} {stage}" for rate in asked for stage in ("pruned", "refitted")]
    errors = [f"error at {rate}" for rate in asked]
    return Table(
        ["chosen by", *stages, *errors, "s to choose", "s to refit"], rows,
        title=f"**The same: {KINDS[kind]}.**"
        if kind != next(iter(KINDS))
        else f"**{setup.what}: {KINDS[kind]}.** {setup.report[setup.report['main']]['name']}; "
        f"dense {setup.score:.2f}.",
    )  # fmt: skip


def default_table(setup: Setup, rows: list[dict[str, Any]]) -> Table:
    """Lay out what the default methods and both solvers reach."""
    cells = [
        [name, *(f"{row[key]:,.2f} ({row[key] / setup.score:.2f})" for key in ("pruned", *SOLVERS))]
        for name, row in zip(CONFIGURATIONS, rows, strict=True)
    ]
    seconds = ", ".join(f"{name} {number(rows[0][f'{name} seconds'])}" for name in SOLVERS)
    return Table(
        ["gone", "as pruned", *SOLVERS], cells,
        title=f"**{setup.what}, by the default methods.** Perplexity (times dense, "
        f"{setup.score:.2f}), no training of the whole model.",
        note=f"Seconds of fitting all variants of the four: {seconds}.",
    )  # fmt: skip


def measure(context: Context) -> Section:
    """Try all methods on SmolLM2, and take the default ones through both solvers."""
    setup = language_model(context)
    tables, rows = context.runner.parallel(
        [partial(try_methods, context, setup), partial(compose_default, context, setup)]
    )
    found = section(
        "Which units go", [setup], [tables], [("Llama", "language_modeling")],
        "Every ffn (attention) loses the same share of its neurons (heads); nothing is trained. Of "
        "groups of 3 heads 20 % is 1 and 50 % is 2.",
    )  # fmt: skip
    found.notes.insert(1, REFITTED)
    found.tables.insert(0, default_table(setup, rows))
    found.figures["default"] = rows
    return found


def section(
    title: str,
    setups: list[Setup],
    tries: list[dict[str, dict[str, Any]]],
    names: list[tuple[str, str]],
    note: str,
) -> Section:
    """Lay out what all methods reached.

    Args:
        title: heading.
        setups: the models.
        tries: of each, what `try_methods` returned.
        names: family and task of each.
        note: how the units were chosen and fitted.
    """
    tables = [
        table_of(setup, kind, by_kind[kind])
        for setup, by_kind in zip(setups, tries, strict=True)
        for kind in KINDS
    ]
    signatures = "; ".join(f"`{s.report[s.report['main']]['signature']}`" for s in setups)
    notes = [note, f"Scored in float32. {signatures}."]
    ran = [
        {"family": family, "task": task, "kind": kind, "method": method}
        for (family, task), by_kind in zip(names, tries, strict=True)
        for kind in KINDS
        for method in by_kind[kind]
    ]
    return Section(
        title, tables, notes, {"ran": ran, "tries": tries}, picture=draw(setups, tries),
        picture_text="Scores after the refit by every method, beside the dense model's",
    )  # fmt: skip
