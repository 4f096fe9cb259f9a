"""Training and evaluation against plain loops with transformers: how much per second."""

from pathlib import Path
from typing import Any

from benchmarks.context import Context
from benchmarks.page import Section, Table
from benchmarks.runs import Argument
from benchmarks.spread import number


def measure(context: Context) -> Section:
    """Run throughput.py and lay its rows out."""
    options: list[Argument] = ["--data", context.data]
    if context.is_quick:
        options += ["--threads", "1", "--repetitions", "2", "--pairs", "64", "--sentences", "32"]
    if context.device == "cuda":
        options += ["--device", "cuda", "--model", context.dense()]
    report = context.runner.run("benchmarks/throughput.py", *options, threads=2).report
    return Section("Throughput", [table(report["rows"])], notes(report), report)


def table(rows: list[dict[str, Any]]) -> Table:
    """Lay the rows out: ours, the plain loop's, the ratio; then what else a row says."""
    known = ("name", "unit", "ours", "theirs", "ratio", "spread")
    further = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    lines = [
        [
            row["name"],
            number(row["ours"]),
            number(row["theirs"]),
            f"{number(row['ratio'])} ({number(row['spread'][0])} to {number(row['spread'][1])})",
            *(str(row.get(key, "")) for key in further),
        ]
        for row in rows
    ]
    words = [key.replace("_", " ") for key in further]
    units = dict.fromkeys(f"{row['name'].partition(',')[0]} in {row['unit']}" for row in rows)
    title = f"{', '.join(units).capitalize()}."
    return Table(["what", "here", "plain loop", "ratio", *words], lines, title)


def notes(report: dict[str, Any]) -> list[str]:
    """Say how it was measured."""
    settings = report.get("settings", {})
    shown = ", ".join(
        f"{key.replace('_', ' ')} {Path(value).name if key == 'model' else value}"
        for key, value in settings.items()
        if not isinstance(value, dict | list) and key not in ("device", "torch")
    )
    return [
        "Wall seconds, both in turns in one process. Plain loop: the tokenizer called on every "
        "batch, batches of 64 in the order of the file, `model(**batch).loss` and "
        "`model.generate`, float32.",
        f"Settings: {shown}.",
    ]
