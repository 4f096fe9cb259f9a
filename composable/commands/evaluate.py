"""Measure a model: the scores of its task, speed, loss, parameters, zeros, MACs, file size."""

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from composable.commands import cli, options

#: Tokens of a sentence for which MACs are counted.
TRANSLATED = 32
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
    from composable.models import checkpoint, cost
    from composable.tasks.base import warn_if_far_worse

    files.check_writable(settings.output, settings.predictions)
    loaded = checkpoint.load(settings.model)
    task = tasks.by_name(loaded.info["task"])
    options.refuse(
        {"num_beams", "max_length"} - set(task.options),
        f"has no effect on {task.name}, the task of this model",
    )
    device = devices.select_device(settings.device)
    dtype = devices.select_dtype(settings.dtype, device, trains=False)
    how = asdict(settings) | {"device": device, "dtype": dtype}
    how["max_length"] = settings.max_length or task.answer_tokens
    corpus = task.read(settings.data, loaded.info.get("data"), settings.split, settings.limit)
    lengths = _lengths(task, loaded, how)
    dense = loaded.info.get("dense_parameters")
    if dtype == "float32":
        loaded.model.float()  # weights in bfloat16 would be computed with as they are
    lines, quality = task.evaluate(loaded, corpus, how)
    warn_if_far_worse(loaded.info, quality["loss"], quality["data"]["name"])
    written = [str(path) for path in (settings.predictions, settings.output) if path]
    report = {
        **({"wrote": written} if written else {}),
        "model": str(settings.model),
        "fingerprint": loaded.fingerprint,
        "task": task.name,
        "main": task.main,
        **quality,
        **cost.report(loaded.model, loaded.family, dense, *lengths),
        "file_bytes": settings.model.stat().st_size,
        "settings": {
            **{name: how[name] for name in (*task.options, *MACHINE)},
            "prefix": loaded.info.get("prefix", ""),
        },
        "versions": _versions(task),
    }
    if settings.predictions:
        files.write_text(settings.predictions, "".join(f"{line}\n" for line in lines))
    if settings.output:
        files.write_json(settings.output, report)
    return report


def _lengths(task: Any, loaded: Any, how: dict[str, Any]) -> tuple[int, int]:
    """Source and target tokens for the MACs; a model with one stack has one kind of tokens."""
    if len(loaded.family.stacks) == 2:
        return (how["length"] or TRANSLATED, how["length"] or TRANSLATED)
    tokens = how["length"] or how["max_length"] or task.length(loaded)
    return (tokens, 0) if "encoder" in loaded.family.stacks else (0, tokens)


def _versions(task: Any) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("composable", "torch", "transformers", *(["sacrebleu"] if task.main == "bleu" else []))
    return {name: str(importlib.import_module(name).__version__) for name in names}
