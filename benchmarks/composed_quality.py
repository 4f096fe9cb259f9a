"""BLEU and validation loss straight after module-level fine-tuning, every module at one rate."""

from functools import partial
from typing import Any

from benchmarks.context import CALIBRATION, MODEL, PRUNED, TUNED, Context
from benchmarks.levels import UNIFORM, Configuration, uniform
from benchmarks.page import Section, Table
from benchmarks.runs import Artifact, Run
from benchmarks.spread import number

#: procedure -> (methods for linears and attentions, solver or None, options)
PROCEDURES: dict[str, tuple[str, str, str | None, tuple[str, ...]]] = {
    "pruned only": ("l1", "head_l1", None, ()),
    "grad, 1 epoch": ("l1", "head_l1", "grad", ("--epochs", "1")),
    "grad": ("l1", "head_l1", "grad", ()),
    "ls": ("l1", "head_l1", "ls", ()),
    "hybrid": ("l1", "head_l1", "hybrid", ()),
    "hybrid, alps masks, gram heads": ("alps", "head_gram", "hybrid", ()),
}


def configurations(context: Context) -> tuple[Artifact, list[Configuration]]:
    """Write one configuration per rate; an attention and its output projection form a pair."""
    attentions, linears = context.names()
    modules = {"attention": attentions, "linear": linears}
    found = [
        uniform({"attention": heads, "linear": rate}, modules)
        for heads, rate in zip(UNIFORM.attention, UNIFORM.linear, strict=True)
    ]
    return context.write("uniform", found), found


def tuned(context: Context, procedure: str, wanted: Artifact) -> tuple[Artifact, float, Run]:
    """Make the variants by one procedure.

    Returns:
        The bundle, the seconds of pruning and fine-tuning, and the last run.
    """
    linear, attention, solver, options = PROCEDURES[procedure]
    pruned = context.prune(context.scheme(wanted), linear, attention)
    if solver is None:
        return pruned.output(PRUNED), context.seconds(pruned), pruned
    calibration = pruned.output(CALIBRATION) if CALIBRATION in pruned.outputs else None
    run = context.tune(solver, pruned, *options, calibration=calibration)
    return run.output(TUNED), context.seconds(pruned) + context.seconds(run), run


def quality(context: Context, bundle: Artifact, wanted: Artifact, index: int) -> dict[str, float]:
    """Compose a configuration and measure it on both splits."""
    model = context.compose([bundle], wanted, index).output(MODEL)
    test, valid = (context.evaluate(model, split) for split in ("test", "valid"))
    return {"bleu": test["bleu"]["value"], "loss": valid["loss"]}


def collect(context: Context) -> dict[str, dict[str, Any]]:
    """Run all procedures: seconds, error and the quality at every rate of each."""
    wanted, found = configurations(context)

    def one(procedure: str) -> dict[str, Any]:
        bundle, seconds, run = tuned(context, procedure, wanted)
        return {
            "seconds": seconds,
            "error": run.report.get("mean_error_after"),
            "quality": [quality(context, bundle, wanted, i) for i in range(len(found))],
        }

    values = context.runner.parallel([partial(one, name) for name in PROCEDURES])
    return dict(zip(PROCEDURES, values, strict=True))


def measure(context: Context) -> Section:
    """Fill the table: procedures by rates."""
    dense = context.dense()
    test, valid = (context.evaluate(dense, split) for split in ("test", "valid"))
    found = collect(context)
    rows = [["dense", *[_cell(test["bleu"]["value"], valid["loss"])] * 3, "", ""]]
    for name, values in found.items():
        cells = [_cell(one["bleu"], one["loss"]) for one in values["quality"]]
        error = values["error"]
        rows.append(
            [name, *cells, "" if error is None else f"{error:.4f}", number(values["seconds"])]
        )
    rates = [f"rate {rate}" for rate in UNIFORM.linear]
    table = Table(
        ["procedure", *rates, "mean error of the variants", context.clock], rows,
        title="BLEU on the test split / validation loss.",
        note="Error: squared error over squared dense output, held out, mean over all variants. "
        "Seconds: pruning and fine-tuning of all variants together.",
    )  # fmt: skip
    notes = [
        "Every attention with its output projection, and every linear of the ffns. Heads: "
        f"rates {', '.join(f'{rate:g}' for rate in UNIFORM.attention)}.",
        f"grad, ls and hybrid with their defaults, {context.dtype} autocast; one run each.",
        f"BLEU: {test['bleu']['signature']}, {test['sentences']} sentences, greedy.",
    ]
    figures = {"dense": {"bleu": test["bleu"]["value"], "loss": valid["loss"]}, **found}
    return Section("Composed straight after module-level fine-tuning", [table], notes, figures)


def _cell(bleu: float, loss: float) -> str:
    return f"{bleu:.2f} / {loss:.3f}"
