#!/usr/bin/env python3
"""Calibrate a random T5 of some geometry and solve one linear of each shape; prints JSON."""

import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.probes import measured, resident
from composable.commands import options

RATES = (0.3, 0.5, 0.7)


class Passes(logging.Handler):
    """Reads from the log how many passes a calibration took."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line."""
        if found := re.search(r"passes: (\d+)", record.getMessage()):
            self.count = int(found[1])


@click.command()
@click.argument("size")
@click.argument("data")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--sentences", type=int, default=128)
@click.option("--layers", type=int, help="Measure the linears of the first layers only.")
@click.option("--budget", type=options.BYTES, default="2G", help="As --memory-budget.")
@click.option("--solve/--no-solve", "solves", default=True)
def main(
    size: str,
    data: str,
    output: Path,
    sentences: int,
    layers: int | None,
    budget: int,
    solves: bool,
) -> None:
    """Measure the inputs of a random model of one of T5's geometries, then solve."""
    import torch

    from benchmarks import geometry
    from composable.calibration import obtain
    from composable.calibration.batching import Texts

    torch.manual_seed(0)
    dense = geometry.make_checkpoint(size, geometry.load_tokenizer(geometry.find_tokenizer()))
    dense.fingerprint = "0" * 64
    texts = corpora(data, sentences)
    names = linears(dense, layers)
    passes = Passes()
    logging.getLogger("composable").setLevel(logging.INFO)
    logging.getLogger("composable").addHandler(passes)
    found: list[Any] = []

    def calibrate(pair: tuple[Any, Any]) -> dict[str, Any]:
        found[:] = []
        parts = [Texts(dense, corpus) for corpus in pair]
        report = measured(
            lambda: found.append(obtain.measure(dense, parts, output, budget, linears=names))
        )
        tokens = (said["tokens"].values() for said in found[0].info.values())
        return report | {"tokens": sum(map(sum, tokens))}

    few = calibrate(corpora(data, max(4, sentences // 8)))
    report = calibrate(texts)
    slope = (report["seconds"] - few["seconds"]) / (report["tokens"] - few["tokens"])
    report |= {
        "seconds_per_token": slope,
        "fixed_seconds": few["seconds"] - slope * few["tokens"],
        "passes": passes.count,
        "linears": len(names),
        "file_bytes": output.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in dense.model.parameters()),
        "solves": solve_shapes(dense, found[0], names) if solves else {},
        "peak_of_process": resident("VmHWM"),
    }
    click.echo(json.dumps(report))


def corpora(data: str, sentences: int) -> tuple[Any, Any]:
    """Read calibration texts, and a quarter as many that are held out."""
    from composable.tasks import translation

    folder = translation.corpus_folder(data)
    sizes = {"train": sentences, "valid": max(1, sentences // 4)}
    found = [translation.read_corpus(folder, split, count) for split, count in sizes.items()]
    return found[0], found[1]


def linears(dense: Any, layers: int | None) -> list[str]:
    """Name all linears, or those of the first layers of either stack."""
    names = [m.name for m in dense.family.modules(dense.model) if m.kind == "linear"]
    return [n for n in names if layers is None or int(re.findall(r"\.(\d+)\.", n)[0]) < layers]


def solve_shapes(dense: Any, measured_inputs: Any, names: list[str]) -> dict[str, Any]:
    """Refit the first linear of each shape at three rates, the smallest weights masked.

    Returns:
        "rows x columns" -> CPU seconds, and how many linears of the whole model have that shape.
    """
    from composable.linalg import solver

    found: dict[str, Any] = {}
    for module in dense.family.modules(dense.model):
        if module.kind != "linear":
            continue
        weight = dense.model.get_submodule(module.name).weight.detach()
        key = f"{weight.shape[0]} x {weight.shape[1]}"
        if key in found:
            found[key]["count"] += 1
        elif module.name in names:
            gram = measured_inputs.inputs(module.name)
            ranked = weight.abs().flatten().sort().values
            masks = [weight.abs() >= ranked[int(rate * len(ranked))] for rate in RATES]
            started = time.process_time()
            solver.refit(gram.matrix, weight, masks)
            found[key] = {"seconds": round(time.process_time() - started, 3), "count": 1}
    return found


if __name__ == "__main__":
    main()
