"""Fetch a pretrained model and write it as one model file."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from composable.commands import cli
from composable.commands.paths import Use


@cli.command()
@cli.path_option(
    "-m",
    "--model",
    "source",
    use=Use(reads=True, inside=r".*(?<!\.pth)"),
    type=str,
    default="google-t5/t5-small",
    text='Hub id (owner/name), local Hugging Face folder, .gguf file, or "embedded".',
)
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="model/t5-small.pth", text="Model file to write."
)
@click.option("--revision", help="Branch, tag or commit of a hub id.  [default: its main branch]")
@click.option(
    "--prefix",
    help="Text that the model expects before a source sentence.  [default: the model's own]",
)
@click.option("--task", help="What the model is for.  [default: as its architecture says]")
@click.option("--labels", type=cli.COUNT, help="Classes of a fresh head.  [default: 2]")
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Tokens of a text at most; of a language model, the window.  [default: the task's]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Of the weights in the file.",
)
@click.option("--seed", type=cli.SEED, default=42, help="Of a fresh head.")
@click.option(
    "--ignore-unused",
    is_flag=True,
    help="Go on where the model does not use all of the weights; the file keeps their names.",
)
def main(
    source: str, output: Path, revision: str | None, prefix: str | None, **options: Any
) -> dict[str, object]:
    """Fetch a pretrained model and write it as one model file.

    The hub's own cache is used, so a second run needs no network. Only safetensors and GGUF weights
    are read: pickled ones (.bin) can run code. With --task a checkpoint that lacks the head of the
    task gets a fresh one, to be trained by baseline_finetuning.py. An adapter beside the weights is
    merged into them. Weights that the model does not use are refused, but for other tasks' heads.
    """
    from composable import files
    from composable.models import hub

    files.check_writable(output)
    folder, commit = hub.resolve_model(source, revision)

    from composable import families
    from composable.models import checkpoint, pretrained

    model_file = pretrained.import_model(folder, source, commit, prefix, **options)
    checkpoint.save(output, model_file)
    model = model_file.model
    modules = families.of(model).modules(model)
    return {
        "wrote": str(output),
        "source": source,
        "revision": commit,
        "fingerprint": model_file.fingerprint,
        "task": model_file.info["task"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": dict(Counter(module.kind for module in modules)),
    }
