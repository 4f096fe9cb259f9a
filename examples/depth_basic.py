#!/usr/bin/env python3
"""Remove the layers of a language model that change their input least, in one go, from Python.

python examples/depth_basic.py path/or/hub-id texts.txt -n 3 -o out/smaller
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
    count: int = options.option("-n", "--count", help="Layers to remove.", default=3)
    limit: int = options.option("--limit", help="Texts to look at.", default=256)
    output: Path = options.output("out/smaller", "Folder to write.")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Read MODEL, look at what its layers do to the lines of TEXTS, write what is left of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composable import depth
    from composable.models import export

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    dense = AutoModelForCausalLM.from_pretrained(settings.model, device_map="auto")
    # any iterable of texts or of dicts will do, a streamed dataset of `datasets` as well
    lines = (line for line in settings.texts.open(encoding="utf-8") if line.strip())
    scores = depth.analyse(dense, lines, tokenizer, limit=settings.limit)
    click.echo(depth.block_table(scores), err=True)
    layers = depth.best_cut(scores, settings.count)
    export.save(depth.cut(dense, layers), settings.output, tokenizer)
    return {"wrote": str(settings.output), "removed": layers}


if __name__ == "__main__":
    main()
