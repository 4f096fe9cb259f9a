"""Measure a model: the scores of its task, speed, loss, parameters, zeros, MACs, file size."""

import importlib
from pathlib import Path
from typing import Any

import click

from composable.commands import cli

#: Options that only some tasks have (`Task.options`).
OF_TASKS = ("num_beams", "max_length", "target_length", "window", "null_threshold")


@cli.command()
@cli.model_option("model/finetuned.pth", "Model file, dense or composed.")
@cli.path_option("-o", "--output", use=cli.WRITTEN, text="Write the report here, too.")
@click.option(
    "--split", type=click.Choice(["valid", "test"]), default="test", help="Which split is measured."
)
@click.option(
    "--batch-tokens",
    type=cli.COUNT,
    default=8192,
    help="Tokens in a batch (of the source, in translation), at most.",
)
@cli.path_option(
    "--output-predictions",
    "--output-translations",
    "predictions",
    use=cli.WRITTEN,
    text="Write the model's answer to each sample here, one a line, in the order of the data: a "
    "translation, class, number, answer, or loss of a window.",
)
@click.option("--num-beams", type=cli.COUNT, default=1, help="Translation: 1 is greedy.")
@click.option(
    "--max-length", type=cli.COUNT, default=80, help="Translation: most tokens of a translation."
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Language modelling: tokens of a window.  [default: what the model file says, else 512]",
)
@click.option(
    "--null-threshold",
    type=cli.Finite(),
    default=0.0,
    help="Question answering: by how much no answer must beat the best span to be the answer.",
)
@click.option(
    "--source-length",
    type=cli.COUNT,
    default=32,
    help="Tokens, for the MACs. Other tasks than translation: by default the most that the model "
    "reads of a sample.",
)
@click.option(
    "--target-length", type=cli.COUNT, default=32, help="Translation: target tokens, for the MACs."
)
@cli.data_options
def main(
    model: Path, output: Path | None, predictions: Path | None, **options: Any
) -> dict[str, object]:
    """Run a model on a split of its task's data; report quality, speed and cost as JSON.

    In translation, bleu is sacreBLEU with its signature; bleu_thesis is torchtext's BLEU on
    whitespace tokens, for comparison with the thesis only. docs/formats.md lists the scores of the
    other tasks; docs/costs.md holds the formula of the MACs.
    """
    from composable import devices, files, tasks
    from composable.models import checkpoint, cost
    from composable.tasks.base import warn_if_far_worse

    files.check_writable(output, predictions)
    options["device"] = devices.select_device(options["device"])
    options["dtype"] = devices.select_dtype(options["dtype"], options["device"], trains=False)
    loaded = checkpoint.load(model)
    task = tasks.by_name(loaded.info["task"])
    _refuse_foreign(task)
    data = loaded.info.get("data")
    corpus = task.read(options["data"], data, options["split"], options["limit"])
    lengths = _lengths(task, loaded, options)
    dense = loaded.info.get("dense_parameters")
    if options["dtype"] == "float32":
        loaded.model.float()  # weights in bfloat16 would be computed with as they are
    lines, quality = task.evaluate(loaded, corpus, options)
    warn_if_far_worse(loaded.info, quality["loss"], quality["data"]["name"])
    report = {
        "model": str(model),
        "fingerprint": loaded.fingerprint,
        "task": task.name,
        "main": task.main,
        **quality,
        **cost.report(loaded.model, loaded.family, dense, *lengths),
        "file_bytes": model.stat().st_size,
        "settings": _settings(task, options, loaded.info.get("prefix", "")),
        "versions": _versions(task),
    }
    if predictions:
        files.write_text(predictions, "".join(f"{line}\n" for line in lines))
    if output:
        files.write_json(output, report)
    return report


def _refuse_foreign(task: Any) -> None:
    """Refuse options that were given, and that the task of the model does not have."""
    for name, flag in cli.given_options().items():
        if name in OF_TASKS and name not in task.options:
            raise click.UsageError(
                f"{flag} has no meaning for {task.name}, the task of this model; leave it out.",
                click.get_current_context(),
            )


def _lengths(task: Any, loaded: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Source and target tokens for the MACs; a model with one stack has one kind of tokens."""
    if "target_length" in task.options:
        return options["source_length"], options["target_length"]
    is_given = "source_length" in cli.given_options()
    tokens = options["source_length"] if is_given else options["window"] or task.length(loaded)
    return (tokens, 0) if "encoder" in loaded.family.stacks else (0, tokens)


def _settings(task: Any, options: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = [name for name in OF_TASKS if name in task.options and name != "target_length"]
    names += ["batch_tokens", "limit", "device", "dtype"]
    return {name: options[name] for name in names} | {"prefix": prefix}


def _versions(task: Any) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("composable", "torch", "transformers", *(["sacrebleu"] if task.main == "bleu" else []))
    return {name: str(importlib.import_module(name).__version__) for name in names}
