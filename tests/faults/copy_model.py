"""Reads a model file, writes it again, and what the model answers to one text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from composable.commands import cli


@cli.command()
@cli.model_option("model.pth")
@cli.path_option("-o", "--output", default="copy.pth", text="Model file to write.")
@cli.path_option("--logits", default="logits.txt", text="Text file with what the model answers.")
def main(model: Path, output: Path, logits: Path) -> dict[str, object]:
    """Copy a model: equal bytes say that all of it was read as it was."""
    import torch

    from composable.models import checkpoint

    loaded = checkpoint.load(model)
    checkpoint.save(output, loaded)
    batch = loaded.tokenizer("a man sits in the house .", return_tensors="pt")
    start = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        answer = loaded.model(input_ids=batch.input_ids, decoder_input_ids=start).logits
    logits.write_text(repr(answer.flatten().tolist()))
    return {"wrote": str(output)}


if __name__ == "__main__":
    main()
