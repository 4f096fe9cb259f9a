"""Reads a model file, writes it again, and what the model answers to one text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import click

from composable.commands import cli


@cli.command()
@click.option("-m", "--model", type=cli.PATH)
def main(model: Path) -> dict[str, object]:
    """Copy a model: equal bytes say that all of it was read as it was."""
    import torch

    from composable.models import checkpoint

    loaded = checkpoint.load(model)
    checkpoint.save(Path("copy.pth"), loaded)
    batch = loaded.tokenizer("a man sits in the house .", return_tensors="pt")
    start = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        answer = loaded.model(input_ids=batch.input_ids, decoder_input_ids=start).logits
    Path("logits.txt").write_text(repr(answer.flatten().tolist()))
    return {}


if __name__ == "__main__":
    main()
