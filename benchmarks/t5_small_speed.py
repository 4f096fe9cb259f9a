"""Seconds of grad and hybrid on T5-small's geometry, from a few steps and few sentences."""

from typing import Any

from benchmarks import composed_quality
from benchmarks.bundle import every_name
from benchmarks.context import STATS, Context
from benchmarks.levels import UNIFORM, every
from benchmarks.page import Table
from benchmarks.runs import Argument, Artifact, Out, Run
from benchmarks.spread import EXTRAPOLATED, number
from composable.variants.unit_phase import Settings as Phase

#: sentences of Multi30K's training and validation split, and of the default calibration set
FULL = {"train": 29_000, "valid": 1_014, "calibration": 4_096}
BATCH = 64
#: (training, validation) sentences that are measured; the shares of the second are those of the
#: calibration and validation sets, so that all of hybrid's times scale alike
FOR_GRAD, FOR_HYBRID = (320, 64), (128, 32)
#: Too few for hybrid to end early; its default is `Phase.epochs`.
EPOCHS = 2


def variants(context: Context) -> tuple[Artifact, Run]:
    """Make a T5-small with random weights, and all its modules' variants at three rates."""
    model = context.runner.run("benchmarks/geometry.py", "small", "-o", Out("model.pth"))
    dense = model.output("model.pth")
    names = every_name(context, dense)
    heads = [name for name in names if f"{name}.o" in names]
    linears = [name for name in names if name not in heads]
    if context.is_quick:
        heads, linears = heads[:1], linears[:1]
    scheme = every(heads, UNIFORM.attention) | every(linears, UNIFORM.linear)
    pruned = context.runner.run(
        "prune.py",
        "-m",
        dense,
        "-c",
        context.write("t5_small", scheme),
        "-o",
        Out("pruned.npy"),
        "--attention",
        "head_l1",
    )
    return dense, pruned


def tune(context: Context, solver: str, sizes: tuple[int, int], *options: str) -> Run:
    """Run block_level_finetuning.py on few sentences."""
    dense, pruned = variants(context)
    measured: list[Argument] = ["--calibration", Out("calibration.npy")] if solver != "grad" else []
    return context.runner.run(
        "block_level_finetuning.py", "--solver", solver, "-m", dense,
        "-p", pruned.output("pruned.npy"), "-o", Out("tuned.npy"), "--stats", Out(STATS),
        "--data", context.first_pairs(*sizes), "--device", context.device, "--dtype", context.dtype,
        *measured, *options,
    )  # fmt: skip


def grad_seconds(context: Context, epochs: int) -> dict[str, float]:
    """Measure a step of grad, and say what the whole training would take."""
    run = tune(context, "grad", FOR_GRAD, "--epochs", "1")
    share = context.seconds(run) / run.wall_seconds
    first, last = run.rows(STATS)[0], run.rows(STATS)[-1]
    step = float(last["training_seconds"]) * share / (FOR_GRAD[0] / BATCH)
    validation = float(last["validation_seconds"]) * share * FULL["valid"] / FOR_GRAD[1]
    spent = sum(float(row["validation_seconds"]) for row in (first, last))
    spent += float(last["training_seconds"])
    start = context.seconds(run) - spent * share
    steps = epochs * -(-FULL["train"] // BATCH)
    whole = start + steps * step + (epochs + 1) * validation
    return {"step": step, "steps": steps, "validation": validation, "start": start, "whole": whole}


def hybrid_seconds(context: Context) -> dict[str, float]:
    """Measure the parts of hybrid, and say what they would take on the default calibration set."""
    run = tune(context, "hybrid", FOR_HYBRID, "--epochs", str(EPOCHS))
    share = context.seconds(run) / run.wall_seconds
    parts = {
        name: float(run.report[f"{name}_seconds"]) * share
        for name in ("calibration", "solve", "training")
    }
    start = context.seconds(run) - sum(parts.values())
    scale = FULL["calibration"] / FOR_HYBRID[0]
    parts["calibration"] *= scale
    parts["training"] *= scale * Phase.epochs / EPOCHS
    return {**parts, "start": start, "whole": start + sum(parts.values())}


def geometry_table(context: Context, epochs: dict[str, int]) -> tuple[Table, dict[str, Any]]:
    """Compare what both forms cost on T5-small's geometry, beside the embedded model.

    Args:
        context: settings.
        epochs: that grad took on the model at hand, by kind; T5-small is taken to need as many.
    """
    count = max(epochs.values())
    grad, hybrid = grad_seconds(context, count), hybrid_seconds(context)
    whole = composed_quality.collect(context)
    here = {name: whole[name]["seconds"] for name in ("grad", "hybrid")}
    mark = EXTRAPOLATED
    rows = [
        ["this page's model, measured whole", "", number(here["grad"]), "", "", "",
         number(here["hybrid"]), number(here["grad"] / here["hybrid"])],
        ["T5-small", number(grad["step"]), mark + number(grad["whole"]),
         mark + number(hybrid["calibration"]), number(hybrid["solve"]),
         mark + number(hybrid["training"]), mark + number(hybrid["whole"]),
         mark + number(grad["whole"] / hybrid["whole"])],
    ]  # fmt: skip
    table = Table(
        ["geometry", "grad: a step", "grad: whole", "hybrid: calibration", "solve",
         "training", "hybrid: whole", "ratio"],
        rows,
        title=f"As the model grows, {context.clock}: T5-small's geometry (d 512, 6+6 layers, 8 "
        "heads of 64, ffn 2048, random weights), 180 variants of 18 attentions and 42 linears.",
        note=f"grad: {FOR_GRAD[0] // BATCH} steps and {FOR_GRAD[1]} validation sentences "
        f"measured; whole: {count} epochs of Multi30K, {grad['steps']:.0f} steps. hybrid: "
        f"{FOR_HYBRID[0]} calibration and {FOR_HYBRID[1]} validation sentences measured, "
        f"{EPOCHS} of {Phase.epochs} epochs; calibration and training times "
        f"{FULL['calibration'] // FOR_HYBRID[0]}.",
    )  # fmt: skip
    return table, {"grad": grad, "hybrid": hybrid, "here": here}
