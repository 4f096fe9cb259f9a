#!/usr/bin/env python3
"""Training and evaluation throughput against plain loops with transformers, side by side.

python benchmarks/throughput.py > throughput.json
python benchmarks/throughput.py --threads 1 --repetitions 3 --pairs 320

The plain loops are what a user would write: the tokenizer called on every batch, batches of 64 in
the order of the file, `model(**batch).loss`, `model.generate`, float32. Both sides start from the
same weights, see the same sentences in the same number of steps, and step the same optimizer.
"""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("COMPOSABLE_PROGRESS", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BATCH, MAX_LENGTH, LR = 64, 80, 1e-3
#: what is timed: target tokens or sentences, of how many there are, per second
Rate = Callable[[], float]


def batches(items: list[Any]) -> Iterator[list[Any]]:
    """Cut a list into batches in its order."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def plain_training(model: Any, tokenizer: Any, corpus: Any) -> tuple[float, float]:
    """One epoch as a user would write it.

    Returns:
        Target tokens and seconds.
    """
    from transformers.optimization import Adafactor

    model.train()
    optimizer = Adafactor(model.parameters(), lr=LR, scale_parameter=True, relative_step=False)
    tokens, started = 0, time.perf_counter()
    for source, target in zip(batches(corpus.source), batches(corpus.target), strict=True):
        batch = tokenizer(source, text_target=target, padding=True, return_tensors="pt")
        labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((labels != -100).sum())
    return tokens, time.perf_counter() - started


def plain_evaluation(model: Any, tokenizer: Any, sentences: list[str]) -> list[str]:
    """Translate greedily as a user would write it."""
    import torch

    model.eval()
    lines: list[str] = []
    with torch.no_grad():
        for source in batches(sentences):
            batch = tokenizer(source, padding=True, return_tensors="pt")
            found = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=1,
                do_sample=False,
                max_new_tokens=MAX_LENGTH,
            )
            lines += tokenizer.batch_decode(found, skip_special_tokens=True)
    return lines


def our_training(
    made: Any, corpora: tuple[Any, Any], dtype: str, folder: str
) -> tuple[float, float]:
    """One epoch of `train.run` as the scripts call it, tokenising included."""
    from composable import tasks, train

    options = train.Options(
        epochs=1, batch_size=BATCH, lr=LR, early_stop=0, device="cpu", dtype=dtype, clip=1.0,
        resume=False, checkpoint_dir=Path(folder),
    )  # fmt: skip
    started = time.perf_counter()
    data = train.data_of(made, corpora)
    tokenising = time.perf_counter() - started
    functions = tasks.by_name(made.info["task"]).functions()
    outcome = train.run(made.model, {}, data, functions, options, {})
    outcome.clean_up()
    tokens = sum(len(item["labels"]) for item in data[0].items)
    return tokens, tokenising + outcome.rows[-1]["training_seconds"]


def our_evaluation(made: Any, sentences: list[str], dtype: Any) -> list[str]:
    """Translate greedily as `evaluate.py` does."""
    from composable.tasks.translation_decode import translate

    return translate(made.model, made.tokenizer, sentences, max_length=MAX_LENGTH, dtype=dtype)


def embedded() -> Any:
    """The model that comes along: d 192, 3+3 layers, 6,000 tokens."""
    from composable import checkpoint, files

    return checkpoint.import_pretrained(files.assets("embedded"), "embedded")


def row(name: str, ours: list[float], theirs: list[float], unit: str) -> dict[str, Any]:
    """One comparison: medians per second, the their ratio, the smallest and largest ratio."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "unit": unit,
        "ours": round(medians[0], 1),
        "theirs": round(medians[1], 1),
        "ratio": round(medians[0] / medians[1], 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def measure(
    threads: tuple[int, ...] = (1, 2),
    repetitions: int = 5,
    pairs: int = 640,
    sentences: int = 320,
    data: str = "embedded",
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """Compare throughput.

    Args:
        threads: numbers of CPU threads to measure with.
        repetitions: of each side, in turns; the first turn of both is thrown away.
        pairs: training pairs of an epoch.
        sentences: to translate.
        data: the `--data` option.
        dtypes: of our side; theirs is float32.

    Returns:
        `rows`, a list of dicts with name, unit, ours, theirs, ratio, spread (of the ratio,
        pair by pair); and the settings.
    """
    import torch

    from composable import tasks

    made = embedded()
    task = tasks.by_name(made.info["task"])
    corpora = tuple(
        task.read(data, None, split, n) for split, n in (("train", pairs), ("valid", 8))
    )
    texts = task.read(data, None, "test", sentences).source
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            rows += _training_rows(made, corpora, dtypes, repetitions, count)
            rows += _evaluation_rows(made, texts, dtypes, repetitions, count)
    finally:
        torch.set_num_threads(before)
    settings = {
        "repetitions": repetitions, "pairs": len(corpora[0].source), "sentences": len(texts),
        "batch": BATCH, "max_length": MAX_LENGTH, "data": corpora[0].name,
        "versions": {"torch": torch.__version__},
    }  # fmt: skip
    return {"rows": rows, "settings": settings}


def _training_rows(
    made: Any, corpora: Any, dtypes: tuple[str, ...], repetitions: int, threads: int
) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {side: [] for side in ("theirs", *dtypes)}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(repetitions + 1):
            for side in rates:
                mine = copy.copy(made)
                mine.model = copy.deepcopy(made.model)
                if side == "theirs":
                    tokens, seconds = plain_training(mine.model, made.tokenizer, corpora[0])
                else:
                    tokens, seconds = our_training(mine, corpora, side, folder)
                if repetition:
                    rates[side].append(tokens / seconds)
    unit = "target tokens per second"
    return [
        row(f"training, {dtype}, {threads} threads", rates[dtype], rates["theirs"], unit)
        for dtype in dtypes
    ]


def _evaluation_rows(
    made: Any, texts: list[str], dtypes: tuple[str, ...], repetitions: int, threads: int
) -> list[dict[str, Any]]:
    import torch

    rates: dict[str, list[float]] = {side: [] for side in ("theirs", *dtypes)}
    lines = {}
    for repetition in range(repetitions + 1):
        for side in rates:
            started = time.perf_counter()
            if side == "theirs":
                lines[side] = plain_evaluation(made.model, made.tokenizer, texts)
            else:
                lines[side] = our_evaluation(made, texts, getattr(torch, side))
            if repetition:
                rates[side].append(len(texts) / (time.perf_counter() - started))
    return [
        row(f"evaluation, {dtype}, {threads} threads", rates[dtype], rates["theirs"],
            "sentences per second")
        | {"equal_lines": sum(a == b for a, b in zip(lines[dtype], lines["theirs"], strict=True))}
        for dtype in dtypes
    ]  # fmt: skip


@click.command()
@click.option("--threads", type=int, multiple=True, default=(1, 2), help="Numbers of CPU threads.")
@click.option("--repetitions", default=5, help="Of each side, in turns.")
@click.option("--pairs", default=640, help="Training pairs.")
@click.option("--sentences", default=320, help="Sentences to translate.")
@click.option("--data", default="embedded", help="As of the scripts.")
def main(**options: Any) -> None:
    """Print the comparison as JSON."""
    click.echo(json.dumps(measure(**options), indent=1))


if __name__ == "__main__":
    main()
