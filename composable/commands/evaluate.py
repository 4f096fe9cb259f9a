"""Measure a model: the scores of its task, speed, loss, parameters, zeros, MACs, file size."""

from dataclasses import dataclass
from pathlib import Path

import click

from composable.commands import cli, options

#: Settings that a score may depend on, whatever the task.
MACHINE = ("batch_tokens", "limit", "device", "dtype")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/finetuned.pth", "The model file, dense or composed.")
    output: Path | None = options.output(None, "Also write the report to this file.")
    predictions: Path | None = options.path(
        "--predictions",
        use=options.WRITTEN,
        help="Write the model's answer to each sample to this file, one a line, in the order of "
        "the data: a translation, class, number, answer, or loss of a window.",
    )
    data: str | None = options.data()
    limit: int | None = options.limit("Read the first N samples only (lines, of a text).")
    split: str = options.option(
        "--split",
        help="Which split is measured.",
        default="test",
        type=click.Choice(["valid", "test"]),
    )
    num_beams: int = options.option(
        "--num-beams",
        help="Beams of the search for a translation; 1 is greedy.",
        default=1,
        type=options.COUNT,
    )
    max_length: int | None = options.option(
        "--max-length",
        help="Tokens of a translation at most; of a language model, the tokens of a window. "
        "[default: 80; the window that the model file names, else 512]",
        type=click.IntRange(min=2),
    )
    length: int | None = options.option(
        "--length",
        help="Tokens of a text for which the MACs are counted; in translation of the source and "
        "of the target. [default: 32 in translation, else the most that the model reads of a "
        "sample]",
        type=options.COUNT,
    )
    batch_tokens: int = options.option(
        "--batch-tokens",
        help="Tokens of a batch (of the source, in translation) at most.",
        default=8192,
        type=options.COUNT,
        group=options.MACHINE,
    )
    device: str = options.device()
    dtype: str = options.dtype(trains=False)


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Run a model on a split of its task's data; report quality, speed and cost as JSON.

    In translation, bleu is sacreBLEU with its signature; bleu_thesis is torchtext's BLEU on
    whitespace tokens, for comparison with the thesis only. docs/formats.md lists the scores of the
    other tasks; docs/costs.md holds the formula of the MACs.
    """
    from composable import devices, files, tasks
    from composable.models import checkpoint
    from composable.reports import evaluation
    from composable.tasks.base import warn_if_far_worse

    files.check_writable(settings.output, settings.predictions)
    loaded = checkpoint.load(settings.model)
    task = tasks.by_name(loaded.info["task"])
    options.refuse(
        {"num_beams", "max_length"} - set(task.options),
        f"has no effect on {task.name}, the task of this model",
    )
    device = devices.select_device(settings.device)
    names = (*task.options, *MACHINE)
    how = {name: getattr(settings, name) for name in names} | {"device": device}
    how["dtype"] = devices.select_dtype(settings.dtype, device, trains=False)
    if "max_length" in how:
        how["max_length"] = settings.max_length or task.answer_tokens
    corpus = task.read(settings.data, loaded.info.get("data"), settings.split, settings.limit)
    found = evaluation.evaluate(loaded, corpus, how, settings.length)
    warn_if_far_worse(loaded.info, found.report["loss"], found.report["data"]["name"])
    written = [str(path) for path in (settings.predictions, settings.output) if path]
    report = {
        **({"wrote": written} if written else {}),
        "model": str(settings.model),
        "file_bytes": settings.model.stat().st_size,
        **found.report,
    }
    if settings.predictions:
        lines = "".join(f"{line}\n" for line in found.predictions)
        files.write_text(settings.predictions, lines)
    if settings.output:
        files.write_json(settings.output, report)
    return report
