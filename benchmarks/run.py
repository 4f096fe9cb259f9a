#!/usr/bin/env python3
"""Run benchmarks, keep their results as JSON and write them into docs/benchmarks.md.

python benchmarks/run.py                        # all of them
python benchmarks/run.py bundle growth          # two; the other sections stay as they are
python benchmarks/run.py module_level --quick   # does it work? The figures mean nothing
python benchmarks/run.py --device cuda --model out/bench/t5_small.pth
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, page
from benchmarks.context import Context
from benchmarks.runs import Runner, print_step
from composable import files
from composable.commands import cli, options
from composable.commands.paths import BOTH, NO_PATH

#: in the order of the page
#: file of each benchmark where it has another name
FILES = {"throughput": "throughput_page", "selectors": "selectors_runs"}
NAMES = (
    *("module_level", "composed_quality", "composability", "throughput"),
    *("bundle", "growth", "analysis"),
)
#: those that a GPU is of interest for
ON_GPU = NAMES[:4]
PAGE = machine.ROOT / "docs" / "benchmarks.md"
#: have a page of their own, and run only when they are named
REAL = (
    *("unit_choice", "unit_choice_small", "sizes", "sizes_small", "latency"),
    *("permuted", "selectors", "vit_sizes", "scoring_speed", "real_chains", "depth"),
)
RESULTS = machine.ROOT / "docs" / "results.md"


def keys() -> list[str]:
    """All sections that the page may have, in its order."""
    return [*NAMES, *(f"{name}_cuda" for name in ON_GPU)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script."""

    names: tuple[str, ...] = options.argument("names", NO_PATH, (), nargs=-1, type=str)
    is_quick: bool = options.option(
        "--quick", help="Very little data; no page is written.", is_flag=True, default=False
    )
    device: str = options.option(
        "--device", help="Where to compute.", type=click.Choice(["cpu", "cuda"]), default="cpu"
    )
    model: str = options.option(
        "--model", help="As of download_model.py, or a model file.", default="embedded"
    )
    data: str = options.option("--data", help="As of the commands.", default="multi30k")
    dtype: str = options.option(
        "--dtype", help="Autocast of all trainings.",
        type=click.Choice(["float32", "bfloat16"]), default="bfloat16",
    )  # fmt: skip
    jobs: int | None = options.option(
        "--jobs", help="Side by side. [default: 2 on a CPU, 1 on a GPU]", type=options.COUNT
    )
    is_fresh: bool = options.option(
        "--fresh", help="Measure again what is there already.", is_flag=True, default=False
    )
    page: Path | None = options.path(
        "--page",
        use=options.WRITTEN,
        help="The page. [default: docs/benchmarks.md; of those on real models docs/results.md]",
    )
    output: Path = options.path(
        "-o",
        "--out",
        use=BOTH,
        default=Path("out/bench"),
        help="Results, and the runs behind them.",
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Run benchmarks by NAME, all of them by default.

    An interrupted benchmark goes on where it was: every finished run of a script is kept.
    """
    device, is_quick = settings.device, settings.is_quick
    chosen = settings.names or (NAMES if device == "cpu" else ON_GPU)
    check_names(chosen)
    # relative to the caller; the scripts run in the repository's root
    out = settings.output.resolve() / "quick" if is_quick else settings.output.resolve()
    model = settings.model
    model = str(Path(model).resolve()) if Path(model).is_file() else model
    made: set[str] | None = set() if settings.is_fresh else None
    jobs = settings.jobs or (2 if device == "cpu" else 1)
    written = []
    for name in chosen:
        runner = Runner(out / "runs", jobs, device, made)
        context = Context(runner, model, settings.data, device, settings.dtype, is_quick)
        print_step(name)
        section = module_of(name).measure(context)
        section.facts, section.seconds = runner.facts(), runner.seconds()
        key = f"{name}_cuda" if device == "cuda" and name not in REAL else name
        usual = RESULTS if name in REAL else PAGE
        place = settings.page or (out / usual.name if is_quick else usual)
        keep(out, key, section, place)
        written.append(f"{place.name}: {key}")
    return {"wrote": written}


def check_names(names: tuple[str, ...]) -> None:
    """Refuse names of benchmarks that do not exist."""
    for name in names:
        if name not in (*NAMES, *REAL):
            known = ", ".join((*NAMES, *REAL))
            raise click.UsageError(f"unknown benchmark {name!r}; known: {known}.")


def keep(out: Path, key: str, section: page.Section, target: Path) -> None:
    """Write a result: its JSON, its picture, and its section of the page."""
    is_real = key in REAL
    picture = f"benchmark_{key}.png" if section.picture else None
    if section.picture:
        with files.atomic_write(target.with_name(str(picture))) as file:
            file.write(section.picture)
    files.write_json(out / f"{key}.json", section.to_json(picture))
    stored, picture = page.Section.from_json(json.loads((out / f"{key}.json").read_text()))
    text = page.markdown(key, stored, picture)
    present = target.read_text(encoding="utf-8") if target.is_file() else ""
    order, intro = (["embedded", *REAL], page.RESULTS) if is_real else (keys(), page.INTRO)
    files.write_text(target, page.replace(present, {key: text}, order, intro))
    if is_real:  # what the table of docs/support.md goes by
        path = target.with_suffix(".json")
        before = files.read_json(path) if path.is_file() else []
        ran = {files.canonical_json(one): one for one in (*before, *stored.figures["ran"])}
        files.write_json(path, [ran[key] for key in sorted(ran)])


def module_of(name: str) -> Any:
    """Import the file of a benchmark."""
    return importlib.import_module(f"benchmarks.{FILES.get(name, name)}")


if __name__ == "__main__":
    main()
