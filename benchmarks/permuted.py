"""Which units go without any training: the task of permuted captions, with every corrector."""

from functools import partial
from pathlib import Path

from benchmarks.context import MODEL, Context
from benchmarks.page import Section
from benchmarks.runs import Out
from benchmarks.selectors_page import merge, permuted_section
from benchmarks.selectors_runs import PAIRS, Trial, try_all

SIZES = (0.7, 0.5, 0.4)


def trial(context: Context) -> Trial:
    """Make the task, its dense model and the texts that are scored."""
    data = str(Path(context.data).resolve() / "multi30k")
    few = ("--steps", "2", "--limit", "200") if context.is_quick else ()
    run = context.runner.run(
        "benchmarks/train_permuted.py", "--data", data, "-o", Out(MODEL),
        "--device", context.device, *few,
    )  # fmt: skip
    scoring = ("--scoring", str(run.folder / "scoring"))
    return Trial(
        "permuted", run.output(MODEL), str(run.folder / "data"), SIZES, 1000, PAIRS, scoring
    )


def measure(context: Context) -> Section:
    """Try all selectors at three sizes."""
    found, *_ = merge(try_all(context, [partial(trial, context)]))
    return permuted_section(found)
