#!/usr/bin/env python3
"""Score selectors of units with every corrector, in one process: the rows of docs/results.md.

python benchmarks/selectors_probe.py dense.pth calibration.npy rows.json l1:global l1:uniform
    --data FOLDER --size 0.7 --size 0.5

A selector says which units go, an allocation how many of each module, a corrector what is done to
the weights that stay. Every row is written as soon as it is there, so an interrupted run loses one.
"""

import inspect
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PATH = click.Path(path_type=Path)
#: As pruned; one scale a unit; least squares.
CORRECTORS = ("none", "tuned", "ls")
#: Rankers that look at a few samples, and those that look at `--labelled` ones.
FEW, MANY = ("trajectory", "logit_kl"), ("fisher",)
#: Rankers that take `--group`.
GROUPED = ("trajectory", "logit_kl")
#: Chosen by methods, module by module, without scores of a ranker; the default ones are those of
#: prune.py.
BY_METHOD: dict[str, dict[str, str]] = {
    "unit_wanda": {"attention": "unit_wanda", "ffn": "unit_wanda"},
    "default": {},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script, as below."""

    data: str
    scoring: str | None
    scored: int | None
    labelled: int
    sizes: tuple[float, ...]
    metric: str
    group: int
    grid: int
    seeds: tuple[int, ...]
    limit: int | None
    samples: int | None
    device: str


@dataclass
class Rows:
    """What was measured so far, in a file that is always whole."""

    path: Path
    found: dict[str, Any]
    started: float = field(default_factory=time.perf_counter)

    def add(self, **row: Any) -> None:
        """Append a row."""
        from composable import files

        self.found["rows"].append(row)
        files.write_json(self.path, self.found)
        shown = [str(row[key]) for key in ("selector", "allocation", "size", "corrector", "score")]
        self.say(" ".join(shown))

    def say(self, text: str) -> None:
        """Print a step, with the seconds since the start."""
        seconds = time.perf_counter() - self.started
        print(f"{seconds:7.1f} s {text}", file=sys.stderr, flush=True)  # noqa: T201


class Trial:
    """A dense model with its statistics, on which selectors are tried.

    Args:
        model: model file.
        calibration: read if it exists, else measured and written.
        settings: of the script.
        rows: where results go.
    """

    def __init__(self, model: Path, calibration: Path, settings: Settings, rows: Rows):
        from composable.calibration.collect import calibrate
        from composable.models import checkpoint

        self.settings, self.rows, self.calibration = settings, rows, calibration
        self.dense = checkpoint.load(model)
        self.found, self.texts = calibrate(
            self.dense, calibration, settings.data, settings.samples, 8 << 30, settings.device
        )
        self.dense.model.cpu()
        info = self.found.info["train"]
        self.lengths = {key: count / info["samples"] for key, count in info["tokens"].items()}
        rows.say("calibrated")

    def scores(self, selector: str, seed: int) -> tuple[Any, float]:
        """Rank all units; sizes are of samples of the calibration's mean length.

        Returns:
            Scores (of l1, for their lengths alone, where a method chooses), and seconds.
        """
        import composable
        from composable.formats.scores import TextsRead

        ours, options = self.settings, {}
        if selector in (*FEW, *MANY):
            is_few = selector in FEW
            options = {
                "data": (ours.scoring if is_few else None) or ours.data,
                "limit": ours.scored if is_few else ours.labelled,
            }
        if selector == "stat":
            options = {"data": ours.data, "limit": ours.samples}
            options["calibration"] = str(self.calibration)
        if selector in GROUPED and ours.group > 1:
            options["group"] = ours.group
        if selector == "random":
            options["seed"] = seed
        started = time.perf_counter()
        name = "l1" if selector in BY_METHOD else selector
        scores = composable.rank(self.dense, name, device=ours.device, **options)
        seconds = time.perf_counter() - started
        info = self.found.info["train"]
        texts = TextsRead("calibration", info["identity"], info["samples"], info["tokens"])
        self.rows.say(f"{selector}: ranked in {seconds:.1f} s")
        return replace(scores, origin=replace(scores.origin, texts=texts)), seconds

    def configurations(self, scores: Any, allocation: str) -> list[dict[str, Any]]:
        """Divide every size among the modules."""
        import composable

        ours = self.settings
        takes = inspect.signature(composable.configuration).parameters
        grid = {"grid": ours.grid} if "grid" in takes and allocation == "global" else {}
        return [
            composable.configuration(
                self.dense, size=size, metric=ours.metric, scores=scores, allocation=allocation,
                **grid,
            )
            for size in ours.sizes
        ]  # fmt: skip

    def variants(self, selector: str, scores: Any, wanted: list[dict[str, Any]]) -> list[Any]:
        """Cut all modules as the configurations say."""
        import composable

        ours = self.settings
        if selector in BY_METHOD:
            reading = {"data": ours.data, "limit": ours.samples, "calibration": self.calibration}
            chosen: dict[str, Any] = {**BY_METHOD[selector], **reading}
        else:
            chosen = {"attention": "ranked", "ffn": "ranked", "scores": scores}
        return list(composable.prune(self.dense, wanted, device="cpu", **chosen).variants)

    def correct(self, variants: list[Any]) -> dict[str, tuple[list[Any], float, int]]:
        """Apply all correctors: name -> variants, seconds, modules that stayed untuned."""
        from benchmarks import tuned_masks
        from composable.variants import least_squares

        started = time.perf_counter()
        tuned, untuned = tuned_masks.tune(self.dense, variants, self.found.inputs)
        between = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            how = least_squares.Settings(solver="ls", device=self.settings.device)
            fitted = least_squares.tune(
                self.dense, variants, self.found, self.texts, how, Path(folder)
            ).variants
        ended = time.perf_counter()
        return {
            "none": (variants, 0.0, 0),
            "tuned": (tuned, between - started, untuned),
            "ls": (list(fitted), ended - between, 0),
        }

    def score(self, model: Any) -> Any:
        """Measure a model on the first samples of the test split."""
        import composable

        ours = self.settings
        where = {"limit": ours.limit, "device": ours.device, "dtype": "float32"}
        return composable.evaluate(model, data=ours.data, **where).report

    def kept(self, variants: Sequence[Any], configuration: dict[str, Any]) -> dict[str, list[int]]:
        """Count the units that every attention and ffn keeps."""
        counts = {
            (v.module, v.entry.rate): len(v.kept_units)
            for v in variants
            if v.kept_units is not None
        }
        found: dict[str, list[int]] = {"attention": [], "ffn": []}
        for module in self.dense.family.modules(self.dense.model):
            if module.kind in found and module.units:
                entry = configuration.get(module.name, 0)
                rate = entry["rate"] if isinstance(entry, dict) else entry
                found[module.kind].append(counts.get((module.name, rate), module.units))
        return found

    def costs(self, configuration: dict[str, Any]) -> dict[str, float]:
        """Say which share of every metric a configuration keeps."""
        from composable.formats import config
        from composable.variants.planned_costs import planned_costs

        modules = {m.name: m for m in self.dense.family.modules(self.dense.model)}
        parsed = config.parse_configuration(configuration, "configuration", modules, ["ranked"])
        ours, whole = (
            planned_costs(self.dense, one, self.lengths) for one in (parsed, {})
        )  # fmt: skip
        return {name: round(ours[name] / whole[name], 5) for name in ours}

    def follow(self, selector: str, allocations: Sequence[str]) -> None:
        """Measure a selector with every allocation, size and corrector."""
        for seed in self.settings.seeds if selector == "random" else (0,):
            scores, seconds = self.scores(selector, seed)
            for allocation in allocations:
                wanted = self.configurations(scores, allocation)
                variants = self.variants(selector, scores, wanted)
                corrected = self.correct(variants)
                for size, one in zip(self.settings.sizes, wanted, strict=True):
                    about = {
                        "selector": selector, "allocation": allocation, "size": size, "seed": seed,
                        "rank_seconds": round(seconds, 2), "shares": self.costs(one),
                        "kept": self.kept(variants, one),
                    }  # fmt: skip
                    for corrector, (made, spent, untuned) in corrected.items():
                        self.rows.add(
                            **about, corrector=corrector, **self.result(made, one),
                            seconds=round(spent, 2), untuned=untuned,
                        )  # fmt: skip

    def result(self, variants: list[Any], configuration: dict[str, Any]) -> dict[str, float]:
        """Put a model together, and score it."""
        import composable
        from composable.formats.bundle import Bundle

        bundle = Bundle(self.dense.fingerprint, variants, {"reading": self.dense.reading})
        report = self.score(composable.compose(self.dense, bundle, configuration))
        return {"score": report[report["main"]]["value"], "loss": report["loss"]}


def able(pairs: Sequence[str], say: Any) -> dict[str, list[str]]:
    """Sort pairs by selectors; those that this version does not know are left out, and said."""
    from composable import ranking
    from composable.formats.config import ALLOCATIONS

    rankers = [ranker.name for ranker in ranking.RANKERS]
    found: dict[str, list[str]] = {}
    for pair in pairs:
        selector, _, allocation = pair.partition(":")
        if selector not in (*rankers, *BY_METHOD) or allocation not in ALLOCATIONS:
            say(f"{pair}: unknown here, left out")
        else:
            found.setdefault(selector, []).append(allocation)
    return found


@click.command()
@click.argument("model", type=PATH)
@click.argument("calibration", type=PATH)
@click.argument("output", type=PATH)
@click.argument("pairs", nargs=-1)
@click.option("--name", default="", help="Of the model, in selectors_page.py.")
@click.option("--data", required=True, help="Of the model's task.")
@click.option("--scoring", help="Texts that trajectory and logit_kl look at.  [default: --data]")
@click.option("--scored", type=int, help="How many of them.  [default: 512 tokens]")
@click.option("--labelled", type=int, default=512, help="Samples that fisher looks at.")
@click.option("--size", "sizes", type=float, multiple=True, help="Shares that stay.")
@click.option("--metric", default="macs", help="Of which they are shares.")
@click.option("--group", default=1, help="Neurons that are scored together.")
@click.option("--grid", default=16, help="Widths of the allocation global.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(1, 2, 3), help="Of random.")
@click.option("--limit", type=int, help="Scored samples, or lines of a text.")
@click.option("--samples", type=int, help="Calibration samples.  [default: that of prune.py]")
@click.option("--device", default="cpu", help="Where models run and linears are solved.")
def main(
    model: Path, calibration: Path, output: Path, pairs: tuple[str, ...], name: str, **options: Any
) -> None:
    """Try PAIRS, selector:allocation; with none only calibrate."""
    from benchmarks import machine
    from composable import files

    settings = Settings(**options)
    rows = Rows(output, {"name": name, "facts": machine.describe(settings.device), "rows": []})
    trial = Trial(model, calibration, settings, rows)
    if pairs:
        report = trial.score(trial.dense)
        named = {key: report[report["main"]][key] for key in ("name", "value", "signature")}
        rows.found["dense"] = {**named, "loss": report["loss"]}
        rows.found |= {"lengths": trial.lengths, "settings": vars(settings) | {"data": ""}}
        rows.say(f"dense {named['value']:.2f}")
        for selector, allocations in able(pairs, rows.say).items():
            trial.follow(selector, allocations)
    rows.found["seconds"] = round(time.perf_counter() - rows.started, 1)
    files.write_json(output, rows.found)
    click.echo(json.dumps({"rows": len(rows.found["rows"]), "seconds": rows.found["seconds"]}))


if __name__ == "__main__":
    main()
