#!/usr/bin/env python3
"""Fetch a pretrained model and write it as one model file.

./download_model.py                                  # google-t5/t5-small from the hub
./download_model.py -m embedded                      # the small model that comes with the program
./download_model.py -m path/to/folder -o model/mine.pth
"""

from collections import Counter
from pathlib import Path

import click

from composable import cli


@cli.command()
@click.option(
    "-m",
    "--model",
    "source",
    default="google-t5/t5-small",
    help='Hub id (owner/name), local Hugging Face folder, or "embedded".',
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("model/t5-small.pth"),
    help="Model file to write.",
)
@click.option("--revision", help="Branch, tag or commit of a hub id.  [default: its main branch]")
@click.option(
    "--prefix",
    help="Text that the model expects before a source sentence.  [default: the model's own]",
)
def main(source: str, output: Path, revision: str | None, prefix: str | None) -> dict[str, object]:
    """Fetch a pretrained model and write it as one model file.

    The hub's own cache is used, so a second run needs no network. Only safetensors weights are
    read: pickled ones (.bin) can run code.
    """
    from composable import files, hub

    files.check_writable(output)
    folder, commit = hub.resolve_model(source, revision)

    from composable import checkpoint, families

    model_file = checkpoint.import_pretrained(folder, source, commit, prefix)
    checkpoint.save(output, model_file)
    model = model_file.model
    modules = families.of(model).modules(model)
    return {
        "wrote": str(output),
        "source": source,
        "revision": commit,
        "fingerprint": model_file.fingerprint,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": dict(Counter(module.kind for module in modules)),
    }


if __name__ == "__main__":
    main()
