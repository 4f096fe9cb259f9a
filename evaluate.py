#!/usr/bin/env python3
"""Measure a model: BLEU, speed, loss, parameters, zeros, multiply-accumulates, file size.

./evaluate.py                                         # model/finetuned.pth on the test split
./evaluate.py -m model/t5-small.pth --split valid --limit 64 -o eval.json
./evaluate.py -m model/composed.pth --num-beams 4 --output-translations composed.de
"""

import hashlib
import time
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
    "--data", help='Folder of the corpus, or "embedded".  [default: what the model was made for]'
)
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", help="Part of it.")
@click.option("--limit", type=POSITIVE, help="Use only so many sentences, the first ones.")
@click.option("--num-beams", type=POSITIVE, default=1, help="1 is greedy.")
@click.option("--batch-tokens", type=POSITIVE, default=4096, help="Source tokens in a batch.")
@click.option("--max-length", type=POSITIVE, default=128, help="Most tokens of a translation.")
@click.option(
    "--output-translations",
    "translations",
    type=click.Path(path_type=Path),
    help="Write one translation per line here, in the order of the corpus.",
)
@click.option("--source-length", type=POSITIVE, default=32, help="Source tokens, for the MACs.")
@click.option("--target-length", type=POSITIVE, default=32, help="Target tokens, for the MACs.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="Other than float32: autocast; the weights stay as they are.",
)
def main(
    model: Path, output: Path | None, translations: Path | None, **options: Any
) -> dict[str, object]:
    """Translate a split of the corpus and report quality, speed and cost as one JSON object.

    bleu is sacreBLEU with its signature; bleu_thesis is torchtext's BLEU on whitespace tokens,
    for comparison with the thesis only. docs/costs.md holds the formula of the MACs.
    """
    from composable import checkpoint, cost, files, train
    from composable.tasks import translation

    files.check_writable(output, translations)
    options["device"] = train.select_device(options["device"])
    loaded = checkpoint.load(model)
    folder = translation.corpus_folder(options["data"], loaded.info.get("data"))
    corpus = translation.read_corpus(folder, options["split"], options["limit"])
    lengths = options["source_length"], options["target_length"]
    dense = loaded.info.get("dense_parameters")
    lines, quality = _quality(loaded, corpus, options)
    report = {
        "model": str(model),
        "fingerprint": loaded.fingerprint,
        **quality,
        **cost.report(loaded.model, loaded.family, dense, *lengths),
        "file_bytes": model.stat().st_size,
        "data": _data(corpus),
        "settings": _settings(options, loaded.info["prefix"]),
        "versions": _versions(),
    }
    if translations:
        files.write_text(translations, "".join(f"{line}\n" for line in lines))
    if output:
        files.write_json(output, report)
    return report


def _quality(loaded: Any, corpus: Any, options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Translate the corpus; return the lines and what they and the reference losses say."""
    import torch

    from composable.tasks import metrics, translation
    from composable.tasks.translation_decode import autocast, translate

    device, dtype = options["device"], getattr(torch, options["dtype"])
    sources = [loaded.info["prefix"] + line for line in corpus.source]
    sizes = (options[name] for name in ("num_beams", "batch_tokens", "max_length"))
    started = time.perf_counter()
    lines = translate(loaded.model, loaded.tokenizer, sources, *sizes, device, dtype)
    seconds = time.perf_counter() - started
    with autocast(device, dtype):
        loss = translation.cross_entropy(loaded, corpus, device=device)
    return lines, {
        "bleu": metrics.sacrebleu_score(lines, corpus.target).to_json(),
        "bleu_thesis": metrics.thesis_bleu(lines, corpus.target).to_json(),
        "loss": round(loss, 6),
        "sentences": len(lines),
        "sentences_per_second": round(len(lines) / seconds, 2),
    }


def _data(corpus: Any) -> dict[str, Any]:
    """Say which text it was; the reference's hash is that of a file with every line ended."""
    text = "".join(f"{line}\n" for line in corpus.target)
    return {
        "name": corpus.name,
        "split": corpus.split,
        "count": len(corpus.target),
        "sha256": corpus.sha256,
        "reference_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


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
