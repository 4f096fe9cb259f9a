#!/usr/bin/env python3
"""Make, refit and score the variants of one kind of module by one method, in one process."""

import copy
import dataclasses
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=PATH)
@click.argument("calibration", type=PATH)
@click.argument("kind", type=click.Choice(["attention", "ffn"]))
@click.argument("method")
@click.argument("rates", type=float, nargs=-1)
@click.option("--data", required=True, help="Of the model's task, for calibration and scoring.")
@click.option("--samples", type=int, help="Calibration samples.  [default: that of prune.py]")
@click.option("--limit", type=int, help="Scored samples, or lines of a text.")
@click.option("--device", default="cpu", help="Where models are scored; the rest is on the CPU.")
def main(
    model: Path, calibration: Path, kind: str, method: str, rates: tuple[float, ...], data: str,
    samples: int | None, limit: int | None, device: str,
) -> None:  # fmt: skip
    """Print the scores at every rate, as pruned and refitted, errors and CPU seconds as JSON."""
    from composable import tasks
    from composable.calibration.collect import calibrate
    from composable.formats.config import Entry
    from composable.methods.random import seed_of
    from composable.models import checkpoint
    from composable.variants import least_squares, pruning
    from composable.variants.compose import compose

    dense = checkpoint.load(model)
    found, texts = calibrate(
        dense, calibration, data, limit=samples, memory_budget=2 << 30, device="cpu"
    )
    names = [m.name for m in dense.family.modules(dense.model) if m.kind == kind and m.units]
    scheme = {name: [Entry(rate, method) for rate in rates] for name in names}
    started = time.process_time()
    sources = pruning.Sources(inputs=found.inputs, seed=functools.partial(seed_of, 42))
    variants = pruning.make_variants(dense, scheme, sources=sources)
    chosen = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = least_squares.Settings(solver="ls")
        fitted = least_squares.tune(dense, variants, found, texts, settings, Path(folder)).variants
    solved = time.process_time()
    task = tasks.by_name(dense.info["task"])
    corpus = task.read(data, dense.info.get("data"), "test", limit)

    def scored(some: list[Any], rate: float) -> dict[str, Any]:
        model = copy.deepcopy(dense.model)
        parts = [variant for variant in some if variant.entry.rate == rate]
        composed = compose(dataclasses.replace(dense, model=model), parts)
        usual = {"num_beams": 1, "max_length": 80, "batch_tokens": 8192, "window": None}
        _, report = task.evaluate(composed, corpus, {**usual, "device": device, "dtype": "float32"})
        return {"score": report[task.main]["value"], "loss": report["loss"]}

    def error(key: str, rate: float) -> float:
        values = [v.stats[key] for v in fitted if v.entry.rate == rate]
        return sum(values) / len(values)

    by_rate = [
        {
            "rate": rate,
            "kept": sum(len(v.kept_units or ()) for v in variants if v.entry.rate == rate),
            "pruned": scored(variants, rate),
            "ls": scored(fitted, rate),
            "error_before": error("error_before", rate),
            "error_after": error("error_after", rate),
        }
        for rate in rates
    ]
    seconds = {"choice": round(chosen - started, 2), "refit": round(solved - chosen, 2)}
    tokens = found.info["train"]["tokens"]
    click.echo(json.dumps({"rates": by_rate, "seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
