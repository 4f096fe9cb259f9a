#!/usr/bin/env python3
"""Time the analysis of layers, and a loop over samples and metrics; prints JSON."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import spread

#: Captions in a text.
TOGETHER = 6
SEVEN = (
    "angular_last", "angular_token:0", "angular_all", "bi_score", "relative_magnitude",
    "euclidean_last", "linear_approximation_last",
)  # fmt: skip


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", type=click.Path(path_type=Path))
@click.option("--repetitions", default=5)
@click.option("--samples", default=16)
@click.option("--max-length", default=128)
def main(model: Path, texts: Path, repetitions: int, samples: int, max_length: int) -> None:
    """Measure both in turns, CPU seconds of one thread."""
    import torch

    from composable import depth
    from composable.models import checkpoint

    torch.set_num_threads(1)
    dense = checkpoint.load(model)
    captions = texts.read_text(encoding="utf-8").splitlines()
    lines = [" ".join(captions[i * TOGETHER : (i + 1) * TOGETHER]) for i in range(samples)]
    settings = {"max_length": max_length, "limit": samples}

    def ours(*metrics: str) -> Any:
        return depth.analyse(dense.model, lines, dense.tokenizer, distances=metrics, **settings)

    def loop(metric: str) -> Any:
        return one_by_one(dense, lines, metric, max_length)

    found = ours(*SEVEN)
    difference = max(
        float(
            abs(found.blocks(None, name).values - loop(name)).max(where=~_unused(found), initial=0)
        )
        for name in ("bi_score", "angular_all", "angular_last")
        for ours_by_name in (found.blocks(None, name).values,)
    )
    sides: dict[str, Callable[[], float]] = {"one": lambda: clocked(lambda: ours("angular_last"))}
    sides["seven"] = lambda: clocked(lambda: ours(*SEVEN))
    for name in SEVEN:
        sides[name] = lambda name=name: clocked(lambda: loop(name))  # type: ignore[misc]
    seconds = spread.alternate(sides, repetitions)
    loops = [sum(values) for values in zip(*(seconds[name] for name in SEVEN), strict=True)]
    click.echo(json.dumps({
        "tokens": sum(
            min(max_length, len(dense.tokenizer(line)["input_ids"])) for line in lines
        ),
        "samples": len(lines),
        "seconds": {**{name: seconds[name] for name in ("one", "seven")},
                    "loop": seconds["angular_last"], "loops": loops},
        "difference": difference,
    }))  # fmt: skip


def clocked(call: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def _unused(found: Any) -> Any:
    import numpy as np

    return np.isnan(found.blocks().values)


def one_by_one(dense: Any, texts: list[str], metric: str, max_length: int) -> Any:
    """Distances of all blocks by one metric: a text at a time, a pair of states at a time."""
    import torch

    states: list[Any] = []

    def before(layer: Any, args: Any) -> None:
        states.append(args[0].clone())

    def after(layer: Any, args: Any, output: Any) -> None:
        states.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    layers = dense.model.model.layers
    hooks = [layers[0].register_forward_pre_hook(before)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for text in texts:
        states.clear()
        inputs = dense.tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        with torch.no_grad():
            dense.model(**inputs)
        for size in range(1, len(layers) + 1):
            for first in range(len(layers) - size + 1):
                value = distance(states[first][0], states[first + size][0], metric)
                total[size - 1, first] += value.item()
    for hook in hooks:
        hook.remove()
    return (total / len(texts)).numpy()


def distance(a: Any, b: Any, metric: str) -> Any:
    """One metric of the states (tokens, features) before and after a block."""
    import torch

    cosine = torch.nn.functional.cosine_similarity
    if metric.endswith("_last"):
        a, b = a[-1:], b[-1:]
    elif metric.endswith("token:0"):
        a, b = a[:1], b[:1]
    if metric.startswith("angular"):
        return torch.acos(cosine(a, b, dim=-1).clamp(-1, 1)).mean() / math.pi
    if metric == "bi_score":
        return 1 - cosine(a, b, dim=-1).mean()
    if metric == "relative_magnitude":
        return (b.norm(dim=-1) / ((a + b).norm(dim=-1) + 1e-6)).mean()
    if metric == "euclidean_last":
        return (a - b).norm()
    best = (a * b).sum() / a.square().sum()
    return torch.log((best * a - b).square().sum())


if __name__ == "__main__":
    main()
