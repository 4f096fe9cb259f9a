"""Which units go and what is done to the rest: every selector with every corrector."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.context import CALIBRATION, MODEL, Context
from benchmarks.page import Section
from benchmarks.real_chains import chains, dense_of
from benchmarks.runs import Artifact, Out, Run
from benchmarks.selectors_page import merge, selectors_section

ROWS = "rows.json"
GLOBAL = ("trajectory", "logit_kl", "fisher", "l1")
UNIFORM = (
    "trajectory", "logit_kl", "fisher", "stat", "unit_wanda", "default", "l1", "random",
)  # fmt: skip
PAIRS = (
    *(f"{name}:global" for name in GLOBAL),
    "stat:stat",
    *(f"{name}:uniform" for name in UNIFORM),
)
#: Of SmolLM2, the most wanted first.
FEW_PAIRS = (
    "trajectory:global", "stat:stat", "trajectory:uniform", "stat:uniform", "default:uniform",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A model that selectors are tried on.

    Attributes:
        name: in `selectors_page`.
        dense: the model.
        data: of its task.
        sizes: shares kept.
        limit: samples (lines of a text) that are scored.
        pairs: selector:allocation.
        options: further ones of the probe.
    """

    name: str
    dense: Artifact
    data: str
    sizes: tuple[float, ...]
    limit: int
    pairs: tuple[str, ...]
    options: tuple[str, ...] = ()


def probe(context: Context, trial: Trial, calibration: Artifact | Out, *pairs: str) -> Run:
    """Run selectors_probe.py: rows of some pairs; with none only the calibration."""
    sizes = itertools.chain.from_iterable(("--size", str(size)) for size in trial.sizes)
    limit = ("--limit", str(context.few(trial.limit, 32)))
    few = ("--samples", "64", "--scored", "2", "--labelled", "16", "--seed", "1")
    return context.runner.run(
        "benchmarks/selectors_probe.py", trial.dense, calibration, Out(ROWS), *pairs,
        "--name", trial.name, "--data", trial.data, "--device", context.device, *sizes, *limit,
        *trial.options, *(few if context.is_quick else ()),
    )  # fmt: skip


def try_one(context: Context, make: Callable[[], Trial]) -> list[Path]:
    """Make a trial's model, and try its selectors side by side, each in a process of its own."""
    trial = make()
    measured = probe(context, trial, Out(CALIBRATION)).output(CALIBRATION)
    by_selector: dict[str, list[str]] = {}
    for pair in trial.pairs:
        by_selector.setdefault(pair.partition(":")[0], []).append(pair)
    calls = [partial(probe, context, trial, measured, *pairs) for pairs in by_selector.values()]
    return [run.folder / ROWS for run in context.runner.parallel(calls)]


def try_all(context: Context, makes: Sequence[Callable[[], Trial]]) -> list[Path]:
    """Try all selectors on several models; files of rows."""
    found = context.runner.parallel([partial(try_one, context, make) for make in makes])
    return list(itertools.chain.from_iterable(found))


def sst2(context: Context) -> Trial:
    """Train MiniLM on SST-2."""
    bert = chains(Path(context.data).resolve())[0]
    return Trial("sst2", dense_of(context, bert), str(bert.data), (0.7, 0.5), 1000, PAIRS)


def t5(context: Context) -> Trial:
    """Take the embedded T5."""
    dense = context.runner.run("download_model.py", "-m", "embedded", "-o", Out(MODEL))
    data = str(Path(context.data).resolve() / "multi30k")
    return Trial("t5", dense.output(MODEL), data, (0.8, 0.6), 300, PAIRS)


def smollm2(context: Context) -> Trial:
    """Take SmolLM2."""
    llama = chains(Path(context.data).resolve())[2]
    options = ("--metric", "layer-parameters", "--group", "16")
    dense = dense_of(context, llama)
    return Trial("smollm2", dense, str(llama.data), (0.8, 0.6), 400, FEW_PAIRS, options)


def measure(context: Context) -> Section:
    """Try all selectors on three models, the largest first."""
    found, *_ = merge(try_all(context, [partial(one, context) for one in (smollm2, t5, sst2)]))
    return selectors_section({name: found[name] for name in ("sst2", "t5", "smollm2")})
