"""A ViT of two sizes by its trajectory and by STAT: accuracy, MACs and latency, through files."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import CALIBRATION, MODEL, PRUNED, TUNED, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import Follower, chains
from benchmarks.runs import Artifact, Out, Run, print_step
from benchmarks.selectors_probe import able
from benchmarks.sizes import CONFIGURATIONS, SCORES, share
from benchmarks.spread import of
from benchmarks.unit_choice import amount, evaluate

SIZES = (0.8, 0.6)
PAIRS = (
    *("trajectory:global", "trajectory:uniform", "stat:stat", "stat:uniform", "l1:uniform"),
    "random:uniform",
)
#: Rankers that read no texts.
WITHOUT = ("l1", "random")
BATCHES = (1, 64)
RANKED = ("--attention", "ranked", "--ffn", "ranked")
STAGES = {"pruned": PRUNED, "refitted": TUNED}


@dataclass(frozen=True)
class Made:
    """Models of all sizes by one ranker and allocation.

    Attributes:
        ranker, allocation: these.
        sized: the run of config_generator.py.
        bundles: stage -> its variants.
    """

    ranker: str
    allocation: str
    sized: Run
    bundles: dict[str, Artifact]


def make(context: Context, dense: Artifact, data: str, ranker: str, allocation: str) -> Made:
    """Rank, choose the sizes of all layers, cut, and refit."""
    run, few = context.runner.run, amount(context)
    reading = ("--data", data, "--device", context.device)
    texts: tuple[Any, ...] = ()
    if ranker == "stat":
        texts = (*reading, "--calibration", Out(CALIBRATION), *few)
    elif ranker not in WITHOUT:
        texts = reading
    ranked = run(
        "rank_importance.py", "--method", ranker, "-m", dense, "-o", Out(SCORES), *texts
    ).output(SCORES)
    grid = ("--grid", "16") if allocation == "global" else ()
    # equal shares look at no scores but for the lengths of texts
    by = () if ranker in WITHOUT and allocation == "uniform" else ("--scores", ranked)
    sized = run(
        "config_generator.py", "-m", dense, "-o", Out(CONFIGURATIONS), *by,
        "--sizes", *map(str, SIZES), "--metric", "macs", "--allocate", allocation, *grid,
    )  # fmt: skip
    scheme = context.scheme(sized.output(CONFIGURATIONS))
    pruned = run(
        "prune.py", "-m", dense, "-c", scheme, "-o", Out(PRUNED), "--scores", ranked, *RANKED
    ).output(PRUNED)
    fitted = run(
        "block_level_finetuning.py", "--solver", "ls", "-m", dense, "-p", pruned, "-o", Out(TUNED),
        "--stats", Out("stats.csv"), "--calibration", Out(CALIBRATION), *reading, *few,
    ).output(TUNED)  # fmt: skip
    return Made(ranker, allocation, sized, {"pruned": pruned, "refitted": fitted})


def compose(context: Context, dense: Artifact, made: Made, stage: str, index: int) -> Artifact:
    """Put one of the models together."""
    run = context.runner.run(
        "compose_model.py", "-m", dense, "-p", made.bundles[stage],
        "-c", made.sized.output(CONFIGURATIONS), "-n", str(index), "-o", Out(MODEL),
    )  # fmt: skip
    return run.output(MODEL)


def row_of(context: Context, dense: Artifact, data: str, pair: tuple[str, str]) -> list[Any]:
    """Make and score the models of one ranker and allocation."""
    made = make(context, dense, data, *pair)
    cells: list[str] = []
    for index in range(len(SIZES)):
        reports = [
            evaluate(context, compose(context, dense, made, stage, index), data, None)
            for stage in STAGES
        ]
        scores = [f"{report[report['main']]['value']:.2f}" for report in reports]
        cells += [share(made.sized, index, "macs"), *scores]
    return [made, [f"`{pair[0]}`", pair[1], *cells]]


def latency(context: Context, dense: Artifact, made: Made) -> tuple[Table, Any]:
    """Time the refitted models beside the dense one."""
    models = [compose(context, dense, made, "refitted", index) for index in range(len(SIZES))]
    batches = [word for batch in BATCHES for word in ("--batch", str(batch))]
    report = context.runner.run(
        "benchmarks/probes.py", "latency", "0", str(context.few(50, 3)), dense, *models, *batches
    ).report
    rows = []
    for batch, times in zip(BATCHES, report["milliseconds"], strict=True):
        for index, values in enumerate(times):
            name = f"{SIZES[index - 1]:.0%} of the MACs" if index else "dense"
            ratios = [mine / theirs for mine, theirs in zip(values, times[0], strict=True)]
            rows.append([str(batch), name, of(values).text(), of(ratios).text()])
    table = Table(
        ["batch", "model", "milliseconds", "of dense"], rows,
        title=f"**Latency of those by `{made.ranker}`, `{made.allocation}`**: a forward pass on "
        "one CPU thread in float32, median of 50 (smallest to largest); the models take turns.",
    )  # fmt: skip
    return table, report["milliseconds"]


def measure(context: Context) -> Section:
    """Make models of a ViT of digits."""
    chain = chains(Path(context.data).resolve())[3]
    follower = Follower(context, chain)
    dense, data = follower.dense(), follower.data
    report = evaluate(context, dense, data, None)
    score = report[report["main"]]
    pairs = [(name, how) for name, hows in able(PAIRS, print_step).items() for how in hows]
    found = context.runner.parallel([partial(row_of, context, dense, data, pair) for pair in pairs])
    columns = [f"{size:.0%}: {what}" for size in SIZES for what in ("MACs", *STAGES)]
    table = Table(
        ["chosen by", "allocation", *columns], [row for _, row in found],
        title=f"**{chain.what[0].upper()}{chain.what[1:]}.** Accuracy on 400 test pictures at "
        f"sizes of the MACs; dense {score['value']:.2f}.",
    )  # fmt: skip
    times, milliseconds = latency(context, dense, found[0][0])
    notes = [
        "The trajectory is of 256 patches; `global` with `--grid 16`. Refitted: `--solver ls`. All "
        "patches stay: what is cut is static. One picture more or less is 0.25 points.",
        f"`{score['signature']}`.",
    ]
    ran = [
        {"family": "ViT", "task": "image_classification", "kind": kind, "method": "ranked"}
        for kind in ("attention", "ffn")
    ]
    return Section(
        "A ViT of two sizes", [table, times], notes,
        {"ran": ran, "rows": [row for _, row in found], "milliseconds": milliseconds},
    )  # fmt: skip
