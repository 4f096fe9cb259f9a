"""Latency of pruned models in an ordinary forward pass, and what their making costs."""

from pathlib import Path

from benchmarks.context import MODEL, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import chains
from benchmarks.runs import Artifact, Out
from benchmarks.sizes import Family, seconds_of
from benchmarks.spread import of

SIZES = (0.7, 0.5)
BATCHES = (1, 32)
TOKENS = 32


def measure(context: Context) -> Section:
    """Time MiniLM, dense and at two sizes, side by side in one process."""
    bert = chains(Path(context.data).resolve())[0]
    dense = context.runner.run("download_model.py", *bert.source, "-o", Out(MODEL)).output(MODEL)
    family = Family(context, dense, str(bert.data), "macs", SIZES)
    sized, bundle = family.make("uniform")
    models: list[Artifact] = [
        dense,
        *(family.compose(sized, bundle, index) for index in range(len(SIZES))),
    ]
    report = context.runner.run(
        "benchmarks/probes.py", "latency", str(TOKENS), str(context.few(20, 3)), *models
    ).report
    rows = []
    for batch, times in zip(BATCHES, report["milliseconds"], strict=True):
        for index, values in enumerate(times):
            ratios = [mine / theirs for mine, theirs in zip(values, times[0], strict=True)]
            name = "dense" if not index else f"{SIZES[index - 1]:.0%} of the MACs"
            rows.append([str(batch), name, of(values).text(), of(ratios).text()])
    table = Table(
        ["batch", "model", "milliseconds", "of dense"], rows,
        title="**all-MiniLM-L6-v2**, 32 tokens a sentence, one thread: median of 20 (smallest to "
        "largest).",
        note=f"CPU seconds of the whole compression to both sizes: {seconds_of(family)}.",
    )  # fmt: skip
    notes = [
        "An ordinary forward pass of transformers in float32; the models take turns.",
        "Uniform sizes, calibrated on 65,536 tokens of SST-2, refitted by `--solver ls`.",
    ]
    return Section("Latency", [table], notes, {"ran": [], "milliseconds": report["milliseconds"]})
