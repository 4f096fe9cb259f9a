"""A bundle of variants against np.save of pickled modules: load a configuration, load all, save."""

from functools import partial
from typing import Any

from benchmarks import spread
from benchmarks.context import PRUNED, Context
from benchmarks.levels import every
from benchmarks.page import Section, Table
from benchmarks.runs import Argument, Artifact, Out
from benchmarks.spread import number
from composable import files

PROBE = "benchmarks/probes.py"
#: rates of every module; one configuration takes the middle one of each
RATES = (0.25, 0.5, 0.75)
OTHERS = {"thesis": "modules as the thesis program saves them", "plain": "plain modules"}
FORMS = ("bundle", *OTHERS)
REPEATS = 5
TASKS = {
    "load one configuration": ("load", "--rate", "0.5"),
    "load all variants": ("load",),
    "save all variants": ("save",),
}


def files_to_compare(context: Context) -> dict[str, Artifact]:
    """Make one set of variants in all forms: every module of a T5-small at three rates."""
    run = context.runner.run
    model = run("benchmarks/geometry.py", "small", "-o", Out("model.pth")).output("model.pth")
    names = every_name(context, model)
    scheme = context.write("bundle", every(names[:6] if context.is_quick else names, RATES))
    pruned = run(
        "prune.py", "-m", model, "-c", scheme, "-o", Out(PRUNED), "--attention", "head_l1"
    ).output(PRUNED)
    pickled = {
        form: run(PROBE, "pickles", form, model, pruned, Out("pickles.npy")).output("pickles.npy")
        for form in OTHERS
    }
    return {"bundle": pruned, **pickled}


def every_name(context: Context, model: Artifact) -> list[str]:
    """Names of all attentions and linears of a model."""
    run = context.runner.run(
        "config_generator.py", "-m", model, "-o", Out("conf.json"),
        "--attention", "0.5", "--linear", "0.5",
    )  # fmt: skip
    return list(files.read_json(run.folder / "conf.json")[0])


def compare(context: Context, paths: dict[str, Artifact], task: str) -> dict[str, list[Any]]:
    """Do a task with all forms in turns, each time in a new process; the first turn warms up."""
    word, *options = TASKS[task]
    turns = dict.fromkeys(FORMS, 0)

    def once(form: str) -> dict[str, Any]:
        turns[form] += 1
        extra: list[Argument] = [Out("again.npy")] if word == "save" else []
        run = context.runner.run(
            PROBE, word, form, paths[form], *extra, *options, repeat=turns[form]
        )
        for name in run.outputs:
            context.runner.drop(run.output(name))
        return run.report

    calls = {form: partial(once, form) for form in FORMS}
    found = spread.alternate(calls, context.few(REPEATS, 2) + 1)
    return {form: values[1:] for form, values in found.items()}


def measure(context: Context) -> Section:
    """Fill the tables: for either kind of pickles, tasks by seconds and memory."""
    paths = files_to_compare(context)
    found = {task: compare(context, paths, task) for task in TASKS}
    sizes = {form: found["load all variants"][form][0]["bytes"] for form in FORMS}
    tables = [table(found, sizes, other) for other in OTHERS]
    return Section("Bundles against pickled modules", tables, NOTES, {**found, "bytes": sizes})


def table(found: dict[str, Any], sizes: dict[str, int], other: str) -> Table:
    """Compare the bundle with one kind of pickles."""
    rows = []
    for task in TASKS:
        cells = []
        for key, scale in (("seconds", 1.0), ("peak_bytes", 1e-6)):
            pair = [[one[key] * scale for one in found[task][form]] for form in ("bundle", other)]
            medians = [number(spread.of(values).median) for values in pair]
            cells += [*medians, spread.ratios(pair[1], pair[0]).text()]
        rows.append([task, *cells])
    megabytes = [number(sizes[form] / 1e6) for form in ("bundle", other)]
    rows.append(
        ["size of the file", "", "", "", *megabytes, number(sizes[other] / sizes["bundle"])]
    )
    names = ("bundle, s", "pickles, s", "ratio", "bundle, MB", "pickles, MB", "ratio")
    return Table(
        ["", *names],
        rows,
        title=f"Against {OTHERS[other]}: CPU seconds and peak memory; above 1 the bundle is "
        "better.",
    )


NOTES = [
    "T5-small's geometry (60.5 M parameters, random weights): 18 attentions and 42 linears at "
    "rates 0.25, 0.5 and 0.75, 180 variants; one configuration takes every module at 0.5.",
    "Pickles: `np.save` of a dictionary of lists of torch modules. The thesis program leaves "
    "torch's pruning hooks in them, so a linear holds weight, `weight_orig` and `weight_mask`; a "
    "plain module holds its weight alone.",
    "A bundle is checked while it is read (SHA-256, mask, finiteness). Pickles are not, and can "
    "run code.",
    "A new process with one thread each, in turns, 5 of each after one that warms the file cache; "
    "imports not counted. Peak memory: rise of the resident set.",
]
