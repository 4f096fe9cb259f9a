"""Reads a model file, writes it again, and what the model answers to one text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataclasses import dataclass

from composable.commands import cli, options


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script."""

    model: Path = options.model("model.pth")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Copy a model: equal bytes say that all of it was read as it was."""
    import torch

    from composable.models import checkpoint

    loaded = checkpoint.load(settings.model)
    checkpoint.save(Path("copy.pth"), loaded)
    batch = loaded.tokenizer("a man sits in the house .", return_tensors="pt")
    start = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        answer = loaded.model(input_ids=batch.input_ids, decoder_input_ids=start).logits
    Path("logits.txt").write_text(repr(answer.flatten().tolist()))
    return {}


if __name__ == "__main__":
    main()
