#!/usr/bin/env python3
"""Time the ranker trajectory beside a loop that masks one unit and runs the whole model.

python benchmarks/scoring_probe.py dense.pth --data FOLDER --repeats 6

The loop is the method as its paper describes it: a plain forward pass of transformers for every
unit, with hooks that zero the unit and keep the output of every ffn, and Gram matrices compared
directly. Both sides are timed on the same sample of units, in turns, in CPU seconds.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: Units of every module that one turn measures.
UNITS = {"attention": 2, "ffn": 5}
#: Units of every module that one turn of our own measures: it takes many at once, of MiniLM and
#: 140 tokens 14.
MANY = 252


class Loop:
    """One unit masked, one forward pass.

    Args:
        dense: an encoder.
        batch: without padding.
    """

    def __init__(self, dense: Any, batch: dict[str, Any]):
        self.model, self.batch = dense.model, batch
        modules = list(dense.family.modules(dense.model))
        self.layers = [m.name for m in modules if m.kind == "layer"]
        self.ffns = [m.output_path for m in modules if m.kind == "ffn"]
        features, self.logits = self._forward()
        self.grams = [self._gram(each) for each in features]

    def measure(self, module: Any, unit: int) -> tuple[list[float], float]:
        """Mask a unit, and compare with the dense model.

        Returns:
            Change of the features of every layer, 0 of those before the unit's, and of the logits;
            specification 1.1 to 1.3 over all tokens, over squared tokens and over samples.
        """
        size = module.head_size if module.kind == "attention" else 1

        def mask(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            zeroed = args[0].clone()
            zeroed[..., unit * size : (unit + 1) * size] = 0.0
            return (zeroed, *args[1:])

        hook = self.model.get_submodule(module.output_path).register_forward_pre_hook(mask)
        try:
            features, logits = self._forward()
        finally:
            hook.remove()
        own = next(i for i, name in enumerate(self.layers) if module.name.startswith(f"{name}."))
        wanted = [*range(own + 1, len(features))] or [own]
        changes = [
            float((gram - self._gram(each)).square().mean()) if z in wanted else 0.0
            for z, (gram, each) in enumerate(zip(self.grams, features, strict=True))
        ]
        old, new = self.logits.log_softmax(-1), logits.log_softmax(-1)
        return changes, float((old.exp() * (old - new)).sum()) / len(logits)

    def _forward(self) -> tuple[list[Any], Any]:
        """Run the model: what every ffn puts out, and the logits."""
        features: list[Any] = []
        with ExitStack() as hooks:
            for path in self.ffns:
                linear = self.model.get_submodule(path)
                keep = linear.register_forward_hook(lambda _, __, output: features.append(output))
                hooks.enter_context(keep)
            logits = self.model(**self.batch).logits
        return features, logits

    @staticmethod
    def _gram(features: Any) -> Any:
        """Cosines of all tokens with all others: (tokens, tokens)."""
        from torch.nn.functional import normalize

        rows = normalize(features.flatten(0, 1), dim=1)
        return rows @ rows.T


# The place that knows how the ranker works inside: it has no entry for some units alone.
def ours(dense: Any, texts: Any, tokens: int) -> Callable[[Any, list[int]], Any]:
    """Prepare the ranker; return (module, units) -> its changes of features and of logits."""
    import torch

    from composable.linalg import kernels
    from composable.ranking.trajectory import Measuring, TrajectoryOptions

    measuring = Measuring(dense, texts, TrajectoryOptions(), True)
    places = {module.name: layer for layer in measuring.runs.layers for module in layer.modules}
    inside = {
        layer.path: [measuring.runs.inside(run, layer) for run in measuring.runs.runs]
        for layer in measuring.runs.layers
    }

    def measure(module: Any, units: list[int]) -> tuple[Any, Any]:
        layer, size = places[module.name], module.head_size if module.kind == "attention" else 1
        columns = [unit * size + torch.arange(size) for unit in units]
        with kernels.for_cpu(dense.model, "cpu", tokens):
            found = [
                measuring._copies(layer, module, inside[layer.path], part)
                for part in measuring._chunks(columns)
            ]
        return torch.cat([md for md, _ in found]), torch.cat([kl for _, kl in found])

    return measure


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gives."""
    started = time.process_time()
    found = call()
    return time.process_time() - started, found


def turns(modules: list[Any], loop: Loop, fast: Any, repeats: int) -> dict[str, Any]:
    """Time both sides in turns on the modules of one kind, and compare what they find.

    Returns:
        Seconds a unit of every turn by side, how many units were measured by the loop, and the
        largest difference of a sum of changes, and of a change of the logits, over the largest.
    """
    kind, draw = modules[0].kind, random.Random(0)
    seconds: dict[str, list[float]] = {"loop": [], "trajectory": []}
    count = 0
    pairs: list[list[tuple[float, float]]] = [[], []]
    for _ in range(repeats):
        few = {m.name: draw.sample(range(m.units), min(UNITS[kind], m.units)) for m in modules}
        many = {
            m.name: [*few[m.name], *(u for u in range(m.units) if u not in few[m.name])][:MANY]
            for m in modules
        }
        spent, slow = timed(
            lambda few=few: {
                m.name: [loop.measure(m, unit) for unit in few[m.name]] for m in modules
            }
        )
        count += sum(map(len, few.values()))
        seconds["loop"].append(spent / sum(map(len, few.values())))
        spent, quick = timed(lambda many=many: {m.name: fast(m, many[m.name]) for m in modules})
        seconds["trajectory"].append(spent / sum(map(len, many.values())))
        for name, rows in slow.items():
            for place, (changes, diverged) in enumerate(rows):
                found = (float(quick[name][0][place].sum()), float(quick[name][1][place]))
                for side, value in enumerate((sum(changes), diverged)):
                    pairs[side].append((found[side], value))
    apart = [max(abs(a - b) for a, b in side) / max(abs(b) for _, b in side) for side in pairs]
    return {"seconds": seconds, "units": count, "difference": apart}


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Samples of one length, a folder of the model's task.")
@click.option("--repeats", type=int, default=6, help="Turns.")
@click.option("--whole/--sample", default=True, help="Rank all units once, too.")
def main(model: Path, data: str, repeats: int, whole: bool) -> None:
    """Print CPU seconds as JSON."""
    import torch

    import composable
    from composable.calibration.collect import calibration_set
    from composable.models import checkpoint

    dense = checkpoint.load(model)
    texts = calibration_set(dense, data, None)
    batches = texts.batches(rows=len(texts))
    batch = {k: v for k, v in batches[0].items() if k != "labels"}
    modules = [m for m in dense.family.modules(dense.model) if m.units]
    report: dict[str, Any] = {"tokens": int(batch["attention_mask"].sum())}
    with torch.inference_mode():
        loop, fast = Loop(dense, batch), ours(dense, texts, batch["input_ids"].shape[1])
        for kind in UNITS:
            some = [module for module in modules if module.kind == kind]
            report[kind] = turns(some, loop, fast, repeats) | {"all": sum(m.units for m in some)}
    if whole:
        rank = lambda: composable.rank(dense, "trajectory", data=data, device="cpu")  # noqa: E731
        report["whole"], _ = timed(rank)
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
