#!/usr/bin/env python3
"""Measure once, keep the scores in a file, and cut several models out of one by them, from Python.

python examples/depth_in_steps.py path/or/hub-id texts.txt -n 1 3 5 -o out/steps
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from composable.commands import cli, options
from composable.commands.paths import NO_PATH


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script."""

    model: str = options.argument("model", NO_PATH, type=str)
    texts: Path = options.argument("texts", options.READ)
    counts: tuple[int, ...] = options.option(
        "-n", "--count", help="Layers to remove, of each model.", default=(1, 3), type=options.COUNT
    )
    output: Path = options.output("out/steps", "Folder to write.")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Analyse MODEL on the lines of TEXTS; write scores, their picture, and a folder for each N."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composable import depth
    from composable.formats import scores_file
    from composable.models import export
    from composable.reports import importance_plot

    model, output = settings.model, settings.output
    # 1. measure two distances in one pass, and keep them
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model)
    lines = [
        line for line in settings.texts.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    names = ("angular_all", "bi_score")
    found = depth.analyse(dense, lines, tokenizer, distances=names, limit=256, max_length=256)
    scores_file.save(output / "scores.npz", found)

    # 2. at any later time: read them, look at them
    scores = scores_file.load(output / "scores.npz")
    (output / "scores.png").write_bytes(importance_plot.png(scores, title=model))
    click.echo(depth.block_table(scores, threshold=0.3, distance="bi_score"), err=True)

    # 3. cut; each model from the dense one
    removed = {}
    for count in settings.counts:
        smaller = AutoModelForCausalLM.from_pretrained(model)
        removed[count] = depth.best_cut(scores, count)
        depth.cut(smaller, removed[count])
        export.save(smaller, output / f"without_{count}", tokenizer)
    return {"wrote": str(output), "removed": removed}


if __name__ == "__main__":
    main()
