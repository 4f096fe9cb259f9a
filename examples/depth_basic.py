#!/usr/bin/env python3
"""Remove the layers of a language model that change their input least, in one go, from Python.

python examples/depth_basic.py path/or/hub-id texts.txt -n 3 -o out/smaller
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from composable.commands import cli


@cli.command()
@click.argument("model")
@click.argument("texts", type=click.Path(path_type=Path))
@click.option("-n", "--count", default=3, help="Layers to remove.")
@click.option("--limit", default=256, help="Texts to look at.")
@click.option("-o", "--output", default=Path("out/smaller"), type=click.Path(path_type=Path))
def main(model: str, texts: Path, count: int, limit: int, output: Path) -> dict[str, object]:
    """Read MODEL, look at what its layers do to the lines of TEXTS, write what is left of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from composable import depth
    from composable.models import export

    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model, device_map="auto")
    # any iterable of texts or of dicts will do, a streamed dataset of `datasets` as well
    lines = (line for line in texts.open(encoding="utf-8") if line.strip())
    scores = depth.analyse(dense, lines, tokenizer, limit=limit)
    click.echo(depth.block_table(scores), err=True)
    layers = depth.best_cut(scores, count)
    export.save(depth.cut(dense, layers), output, tokenizer)
    return {"wrote": str(output), "removed": layers}


if __name__ == "__main__":
    main()
