"""Fetch a pretrained model and write it as one model file."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from composable.commands import cli, options
from composable.commands.paths import Use


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    source: str = options.path(
        "-m",
        "--model",
        use=Use(reads=True, inside=r".*(?<!\.pth)"),
        type=str,
        default="google-t5/t5-small",
        help='Hub id (owner/name), Hugging Face folder on this disk, .gguf file, or "embedded": a '
        "small translation model that comes with this program.",
    )
    output: Path = options.output("model/dense.pth", "The model file to write.")
    revision: str | None = options.option(
        "--revision", help="Branch, tag or commit of a hub id. [default: its main branch]"
    )
    prefix: str | None = options.option(
        "--prefix",
        help="Text that the model expects before every source sentence. [default: the model's own]",
    )
    task: str | None = options.option(
        "--task",
        help="What the model is for: translation, text_classification, text_similarity, "
        "question_answering, language_modeling or image_classification. [default: as its "
        "architecture says]",
    )
    labels: int | None = options.option(
        "--labels", help="Number of classes of a fresh head. [default: 2]", type=options.COUNT
    )
    max_length: int | None = options.option(
        "--max-length",
        help="Tokens of a text at most; of a language model, the tokens of a window. [default: "
        "the task's]",
        type=click.IntRange(min=2),
    )
    dtype: str = options.option(
        "--dtype",
        help="Number type of the weights in the file.",
        default="float32",
        type=click.Choice(["float32", "bfloat16"]),
    )
    ignore_unused: bool = options.option(
        "--ignore-unused",
        is_flag=True,
        default=False,
        help="Go on where the model does not use all weights of the checkpoint; the file keeps "
        "their names.",
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Fetch a pretrained model and write it as one model file.

    The hub's own cache is used, so a second run needs no network. Only safetensors and GGUF weights
    are read: pickled ones (.bin) can run code. With --task a checkpoint that lacks the head of the
    task gets a fresh one, to be trained by baseline_finetuning.py. An adapter beside the weights is
    merged into them. Weights that the model does not use are refused, but for other tasks' heads.
    """
    from composable import files
    from composable.models import hub

    files.check_writable(settings.output)
    folder, commit = hub.resolve_model(settings.source, settings.revision)

    from composable import families
    from composable.models import checkpoint, pretrained

    model_file = pretrained.import_model(
        folder,
        settings.source,
        commit,
        settings.prefix,
        task=settings.task,
        labels=settings.labels,
        max_length=settings.max_length,
        dtype=settings.dtype,
        ignore_unused=settings.ignore_unused,
    )
    checkpoint.save(settings.output, model_file)
    model = model_file.model
    modules = families.of(model).modules(model)
    return {
        "wrote": str(settings.output),
        "source": settings.source,
        "revision": commit,
        "fingerprint": model_file.fingerprint,
        "task": model_file.info["task"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": dict(Counter(module.kind for module in modules)),
    }
