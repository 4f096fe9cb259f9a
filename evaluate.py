#!/usr/bin/env python3
"""Measure a model: BLEU, speed, loss, parameters, zeros, multiply-accumulates, file size.

./evaluate.py                                         # model/finetuned.pth on the test split
./evaluate.py -m model/t5-small.pth --split valid --limit 64 -o eval.json
./evaluate.py -m model/composed.pth --num-beams 4 --output-translations composed.de
"""

from pathlib import Path
from typing import Any

import click

from composable import cli

POSITIVE = click.IntRange(min=1)


@cli.command()
@click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path),
    default=Path("model/finetuned.pth"),
    help="Model file, dense or composed.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the report here, too.")
@click.option(
    "--split", type=click.Choice(["valid", "test"]), default="test", help="Which split is measured."
)
@click.option("--num-beams", type=POSITIVE, default=1, help="1 is greedy.")
@click.option("--batch-tokens", type=POSITIVE, default=8192, help="Source tokens in a batch.")
@click.option("--max-length", type=POSITIVE, default=80, help="Most tokens of a translation.")
@click.option(
    "--output-translations",
    "translations",
    type=click.Path(path_type=Path),
    help="Write one translation per line here, in the order of the corpus.",
)
@click.option("--source-length", type=POSITIVE, default=32, help="Source tokens, for the MACs.")
@click.option("--target-length", type=POSITIVE, default=32, help="Target tokens, for the MACs.")
@cli.data_options
def main(
    model: Path, output: Path | None, translations: Path | None, **options: Any
) -> dict[str, object]:
    """Translate a split of the corpus and report quality, speed and cost as one JSON object.

    bleu is sacreBLEU with its signature; bleu_thesis is torchtext's BLEU on whitespace tokens,
    for comparison with the thesis only. docs/costs.md holds the formula of the MACs.
    """
    from composable import checkpoint, cost, files, tasks, train

    files.check_writable(output, translations)
    options["device"] = train.select_device(options["device"])
    options["dtype"] = train.select_dtype(options["dtype"], options["device"], trains=False)
    loaded = checkpoint.load(model)
    task = tasks.by_name(loaded.info["task"])
    data = loaded.info.get("data")
    corpus = task.read(options["data"], data, options["split"], options["limit"])
    lengths = options["source_length"], options["target_length"]
    dense = loaded.info.get("dense_parameters")
    lines, quality = task.evaluate(loaded, corpus, options)
    report = {
        "model": str(model),
        "fingerprint": loaded.fingerprint,
        **quality,
        **cost.report(loaded.model, loaded.family, dense, *lengths),
        "file_bytes": model.stat().st_size,
        "settings": _settings(options, loaded.info["prefix"]),
        "versions": _versions(),
    }
    if translations:
        files.write_text(translations, "".join(f"{line}\n" for line in lines))
    if output:
        files.write_json(output, report)
    return report


def _settings(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = ("num_beams", "batch_tokens", "max_length", "limit", "device", "dtype")
    return {name: options[name] for name in names} | {"prefix": prefix}


def _versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import sacrebleu
    import torch
    import transformers

    import composable

    packages = (composable, torch, transformers, sacrebleu)
    return {package.__name__: str(package.__version__) for package in packages}


if __name__ == "__main__":
    main()
