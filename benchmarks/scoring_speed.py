"""What the trajectory of all units costs, beside one forward pass of the whole model for each."""

from typing import Any

from benchmarks.context import Context
from benchmarks.page import Section, Table
from benchmarks.permuted import trial
from benchmarks.spread import number, of, ratios

KINDS = {"attention": "heads", "ffn": "neurons"}


def measure(context: Context) -> Section:
    """Time both on MiniLM, on the ten captions of the task of permuted ones."""
    made = trial(context)
    scoring = made.options[made.options.index("--scoring") + 1]
    few = ("--repeats", "1", "--sample") if context.is_quick else ()
    run = context.runner.run("benchmarks/scoring_probe.py", made.dense, "--data", scoring, *few)
    return section_of(run.report)


def section_of(report: dict[str, Any]) -> Section:
    """Lay out what scoring_probe.py printed."""
    rows = []
    for kind, name in KINDS.items():
        seconds = report[kind]["seconds"]
        loop, ours = ([1000 * value for value in seconds[key]] for key in ("loop", "trajectory"))
        rows.append(
            [f"{name} ({report[kind]['all']:,})", of(loop).text(), of(ours).text(),
             ratios(loop, ours).text(), number(1000 / of(ours).median, 3)]
        )  # fmt: skip
    differences = [value for kind in KINDS for value in report[kind]["difference"]]
    whole = f" All units together: {number(report['whole'])} s." if "whole" in report else ""
    turns = len(report["ffn"]["seconds"]["loop"])
    table = Table(
        ["units", "loop, ms a unit", "`trajectory`, ms a unit", "times faster", "units a second"],
        rows,
        title=f"**all-MiniLM-L6-v2, 10 captions, {report['tokens']} tokens, one thread.** CPU "
        f"milliseconds, median of {turns} turns (smallest to largest).",
        note=f"The loop was measured on {report['attention']['units']} heads and "
        f"{report['ffn']['units']} neurons, drawn anew in every turn, equally many of every "
        f"layer.{whole} Both find the same, up to {number(max(differences), 2)} of the largest "
        "change.",
    )  # fmt: skip
    notes = [
        "The loop runs the model once for every unit, with a hook that zeroes it and others that "
        "keep the output of every ffn, and compares Gram matrices of all tokens; those of the "
        "dense model are computed once. It does what the reference does, without its printing, "
        "its sampling of tokens and its hooks for every unit.",
        "Nothing is approximated: after a masked head 3.2 of 6 layers have to run on average, and "
        "after a neuron 2.5, so the loop's arithmetic is 1.9 and 2.4 times as much, and that is "
        "most of the time of both. `--group 16` divides the neurons' time by 16.",
    ]
    return Section("What scoring costs", [table], notes, {"ran": [], "report": report})
