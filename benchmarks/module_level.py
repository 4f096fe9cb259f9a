"""`ls` and `hybrid` against `grad`: time to the same held-out error, and the error in the end."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import composed_quality, spread
from benchmarks.context import STATS, Context
from benchmarks.levels import UNIFORM, every
from benchmarks.page import Section, Table
from benchmarks.runs import Run
from benchmarks.spread import number
from benchmarks.t5_small_speed import geometry_table

VARIANTS = "stats_variants.csv"
#: how much worse a composed model's validation loss may be and still count as equal
EQUAL = 0.01
#: what is timed more than once, since it is no training
REPEATS = 5


@dataclass(frozen=True)
class Course:
    """Losses of a fine-tuning over its seconds.

    Attributes:
        points: (seconds since the start of the command, summed held-out squared error).
        error: mean relative error in the end.
        before: mean relative error before.
        seconds: of the whole command.
        variants: relative error of each in the end.
    """

    points: tuple[tuple[float, float], ...]
    error: float
    before: float
    seconds: float
    variants: tuple[float, ...]


def course(context: Context, run: Run) -> Course:
    """Read what a run of block_level_finetuning.py did, and when.

    The stats have wall seconds of the epochs; they are scaled by the share of the CPU that the
    process had. What they do not cover (start, reading, writing) counts before the first epoch.
    """
    share = context.seconds(run) / run.wall_seconds
    rows = run.rows(STATS)
    spent = [
        (float(row["training_seconds"] or 0) + float(row["validation_seconds"] or 0)) * share
        for row in rows
    ]
    start = context.seconds(run) - sum(spent)
    points = tuple(
        (start + sum(spent[: i + 1]), float(row["validation_loss"])) for i, row in enumerate(rows)
    )
    variants = tuple(float(row["error_after"]) for row in run.rows(VARIANTS) if row["error_after"])
    return Course(
        points,
        run.report["mean_error_after"],
        run.report["mean_error_before"],
        context.seconds(run),
        variants,
    )


def schemes(context: Context) -> dict[str, dict[str, list[float]]]:
    """All linears alone and all attentions alone, each at three rates."""
    attentions, linears = context.names()
    if context.is_quick:
        attentions, linears = attentions[:2], linears[:3]
    return {
        "linears": every(linears, UNIFORM.linear),
        "attentions": every(attentions, UNIFORM.attention),
    }


def run_kind(context: Context, kind: str, scheme: dict[str, list[float]]) -> dict[str, list[Run]]:
    """Fine-tune one kind's variants by every solver; ls several times."""
    missing: dict[str, None] = {"attention" if kind == "linears" else "linear": None}
    pruned = context.prune(context.write(kind, scheme), **missing)
    solvers = ("grad", "ls") if kind == "linears" else ("grad", "ls", "hybrid")
    repeats = {"ls": context.few(REPEATS, 2)}
    calls = [(name, repeat) for name in solvers for repeat in range(repeats.get(name, 1))]
    runs = context.runner.parallel(
        [partial(context.tune, name, pruned, repeat=repeat) for name, repeat in calls]
    )
    found: dict[str, list[Run]] = {name: [] for name in solvers}
    for (name, _), run in zip(calls, runs, strict=True):
        found[name].append(run)
    return found


def kind_rows(context: Context, kind: str, runs: dict[str, list[Run]]) -> list[list[str]]:
    """Rows of one kind: errors, seconds, and how much later grad reaches the same error."""
    grad = course(context, runs["grad"][0])
    rows = [
        [kind, "grad", number(grad.before), number(grad.error), "", number(grad.seconds)] + [""] * 3
    ]
    for name in [name for name in runs if name != "grad"]:
        found = [course(context, run) for run in runs[name]]
        seconds = [one.seconds for one in found]
        met = spread.crossing(grad.points, found[0].points[-1][1])
        better = spread.ratios(found[0].variants, grad.variants).text()
        rows.append(
            [
                kind,
                name,
                number(found[0].before),
                number(found[0].error),
                better,
                spread.of(seconds).text(),
                "never" if met is None else number(met.place),
                *(
                    _ratio(grad.seconds if met is None else met.place, seconds, met, start)
                    for start in (0.0, context.start())
                ),
            ]
        )
    return rows


def _ratio(seconds: float, others: list[float], reached: object, start: float) -> str:
    text = spread.of([(seconds - start) / (other - start) for other in others]).text()
    return f"more than {text}" if reached is None else text


def kinds_table(context: Context, runs: dict[str, dict[str, list[Run]]]) -> Table:
    """Compare the solvers kind by kind."""
    rows = [row for kind in runs for row in kind_rows(context, kind, runs[kind])]
    return Table(
        [
            "variants of", "solver", "error before", "error in the end",
            "error over grad's, variant by variant", context.clock,
            "grad reaches that error after", "times faster", "imports left out",
        ],
        rows,
        title="Each kind alone, every module of the kind at three rates.",
        note="Error: squared error over squared dense output, validation split, mean over the "
        "variants. When grad reaches an error is interpolated between epochs; `never`: not within "
        "its whole time, which the ratio then takes. Imports left out: without the "
        f"{number(context.start())} s in which any script imports torch and transformers.",
    )  # fmt: skip


def stage_table(context: Context) -> tuple[Table, dict[str, Any]]:
    """Compare the whole stage at equal composed validation loss, with another benchmark's runs."""
    found = composed_quality.collect(context)
    rows, figures = [], {}
    for name in ("ls", "hybrid"):
        ratios = []
        cells = []
        for index, rate in enumerate(UNIFORM.linear):
            loss = found[name]["quality"][index]["loss"]
            ours = found[name]["seconds"]
            equal = [
                (found[other]["seconds"], other)
                for other in ("grad, 1 epoch", "grad")
                if found[other]["quality"][index]["loss"] <= loss + EQUAL
            ]
            seconds, other = min(equal, default=(found["grad"]["seconds"], None))
            ratios.append(seconds / ours)
            cells.append(f"{loss:.3f} ({other or 'no run'})")
            figures[f"{name}, {rate}"] = {"loss": loss, "ratio": seconds / ours, "grad": other}
        mark = "more than " if any("no run" in cell for cell in cells) else ""
        rows.append([name, number(ours), *cells, mark + spread.of(ratios).text()])
    for name in ("grad, 1 epoch", "grad"):
        losses = [f"{one['loss']:.3f}" for one in found[name]["quality"]]
        rows.append([name, number(found[name]["seconds"]), *losses, ""])
    table = Table(
        ["solver", context.clock, *(f"rate {rate}" for rate in UNIFORM.linear), "times faster"],
        rows,
        title="The whole stage, all attentions with their output projections and all linears: "
        "validation loss of the model composed at one rate. In brackets the shortest run of grad "
        f"whose loss is at most {EQUAL} higher; times faster: than this run (`no run`: than the "
        "longest). `grad, 1 epoch` has the whole schedule within one epoch.",
    )
    return table, figures


def measure(context: Context) -> Section:
    """Fill the three tables."""
    runs = {kind: run_kind(context, kind, scheme) for kind, scheme in schemes(context).items()}
    stage, figures = stage_table(context)
    steps = grad_epochs(runs)
    speed, speed_figures = geometry_table(context, steps)
    section = Section(
        "Module-level fine-tuning: least squares and hybrid against gradient",
        [kinds_table(context, runs), stage, speed],
        [
            f"grad: defaults (at most 4 epochs, patience 2), {context.dtype} autocast, single "
            f"runs. `ls` was run {context.few(REPEATS, 2)} times per kind. Calibration on 4,096 "
            "sentences is part of every run of `ls` and `hybrid`.",
        ],
        {"stage": figures, "t5-small": speed_figures},
    )
    for kind, found in runs.items():
        section.figures[kind] = {
            name: [course(context, run).__dict__ for run in many] for name, many in found.items()
        }
    return section


def grad_epochs(runs: dict[str, dict[str, list[Run]]]) -> dict[str, int]:
    """Epochs that grad took, by kind."""
    return {kind: len(found["grad"][0].rows(STATS)) - 1 for kind, found in runs.items()}
