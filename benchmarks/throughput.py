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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("COMPOSABLE_PROGRESS", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BATCH, MAX_LENGTH, LR = 64, 80, 1e-3


def batches(items: list[Any]) -> Iterator[list[Any]]:
    """Cut a list into batches in its order."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def plain_training(model: Any, tokenizer: Any, corpus: Any, device: str = "cpu") -> float:
    """Train for an epoch as a user would write it, and return the seconds."""
    from transformers.optimization import Adafactor

    model.to(device).train()
    optimizer = Adafactor(model.parameters(), lr=LR, scale_parameter=True, relative_step=False)
    started = time.perf_counter()
    for source, target in zip(batches(corpus.source), batches(corpus.target), strict=True):
        batch = tokenizer(source, text_target=target, padding=True, return_tensors="pt").to(device)
        labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss.item()  # a GPU may still be at work
    return time.perf_counter() - started


def plain_evaluation(
    model: Any, tokenizer: Any, sentences: list[str], device: str = "cpu"
) -> list[str]:
    """Translate greedily as a user would write it."""
    import torch

    model.to(device).eval()
    lines: list[str] = []
    with torch.no_grad():
        for source in batches(sentences):
            batch = tokenizer(source, padding=True, return_tensors="pt").to(device)
            found = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=1,
                do_sample=False,
                max_new_tokens=MAX_LENGTH,
            )
            lines += tokenizer.batch_decode(found, skip_special_tokens=True)
    return lines


def our_training(made: Any, corpora: tuple[Any, Any], dtype: str, device: str = "cpu") -> float:
    """Train for an epoch as the scripts do; the seconds of the steps and of tokenising."""
    from composable import tasks
    from composable.training import train
    from composable.training.options import Options

    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            epochs=1, batch_size=BATCH, lr=LR, early_stop=0, device=device, dtype=dtype,
            resume=False, checkpoint_dir=Path(folder),
        )  # fmt: skip
        started = time.perf_counter()
        data = train.data_of(made, corpora)
        tokenising = time.perf_counter() - started
        functions = tasks.by_name(made.info["task"]).functions()
        outcome = train.run(made.model, {}, data, functions, options, {})
    seconds: float = outcome.rows[-1]["training_seconds"]
    return tokenising + seconds


def our_evaluation(made: Any, sentences: list[str], dtype: str, device: str = "cpu") -> list[str]:
    """Translate greedily as `evaluate.py` does."""
    import torch

    from composable.tasks.translation_decode import translate

    return translate(
        made.model,
        made.tokenizer,
        sentences,
        max_length=MAX_LENGTH,
        device=device,
        dtype=getattr(torch, dtype),
    )


def load(model: Path | None = None) -> Any:
    """Load a model file; without one the embedded model: d 192, 3+3 layers, 6,000 tokens."""
    from composable import files
    from composable.models import checkpoint, pretrained

    if model:
        return checkpoint.load(model)
    return pretrained.import_model(files.assets("embedded"), "embedded")


def measure(
    threads: Sequence[int] = (1, 2),
    repetitions: int = 5,
    pairs: int = 640,
    sentences: int = 1000,
    data: str = "embedded",
    model: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compare throughput.

    Args:
        threads: numbers of CPU threads to measure with.
        repetitions: of each side, in turns, after a turn that does not count.
        pairs: training pairs of an epoch.
        sentences: to translate, at most.
        data: the `--data` option.
        model: model file; the embedded model without.
        device: cpu or cuda.

    Returns:
        `rows`, a list of dicts with name, unit, ours, theirs (medians), ratio (of the medians),
        spread (smallest and largest ratio of a turn); and `settings`.
    """
    import torch

    from composable import tasks

    made = load(model)
    task = tasks.by_name(made.info["task"])
    corpora = task.read(data, None, "train", pairs), task.read(data, None, "valid", BATCH)
    texts = task.read(data, None, "test", sentences).source
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            for dtype in ("float32", "bfloat16"):
                name = f"{dtype}, {count} thread{'s' * (count > 1)}"
                rows.append(_training(made, corpora, dtype, device, repetitions, name))
                rows.append(_evaluation(made, texts, dtype, device, repetitions, name))
    finally:
        torch.set_num_threads(before)
    settings = {
        "model": str(model or "embedded"), "device": device, "data": corpora[0].name,
        "training_pairs": len(corpora[0].source), "sentences": len(texts), "batch": BATCH,
        "max_length": MAX_LENGTH, "repetitions": repetitions, "torch": torch.__version__,
    }  # fmt: skip
    rows.sort(key=lambda row: row["name"].startswith("evaluation"))
    return {"rows": rows, "settings": settings}


def _training(
    made: Any, corpora: Any, dtype: str, device: str, repetitions: int, name: str
) -> dict[str, Any]:
    def copied() -> Any:
        mine = copy.copy(made)
        mine.model = copy.deepcopy(made.model)
        return mine

    ours, theirs = in_turns(
        lambda: our_training(copied(), corpora, dtype, device),
        lambda: plain_training(copied().model, made.tokenizer, corpora[0], device),
        repetitions,
    )
    tokens = sum(map(len, made.tokenizer(text_target=corpora[0].target)["input_ids"]))
    return row(f"training, {name}", "target tokens per second", tokens, ours, theirs)


def _evaluation(
    made: Any, texts: list[str], dtype: str, device: str, repetitions: int, name: str
) -> dict[str, Any]:
    lines: dict[str, list[str]] = {}

    def timed(side: str, translate: Callable[[], list[str]]) -> float:
        started = time.perf_counter()
        lines[side] = translate()
        return time.perf_counter() - started

    ours, theirs = in_turns(
        lambda: timed("ours", lambda: our_evaluation(made, texts, dtype, device)),
        lambda: timed(
            "theirs", lambda: plain_evaluation(made.model, made.tokenizer, texts, device)
        ),
        repetitions,
    )
    equal = sum(
        a == " ".join(b.split()) for a, b in zip(lines["ours"], lines["theirs"], strict=True)
    )
    found = row(f"evaluation, {name}", "sentences per second", len(texts), ours, theirs)
    return found | {"equal_translations": f"{equal} of {len(texts)}"}


def in_turns(
    first: Callable[[], float], second: Callable[[], float], repetitions: int
) -> tuple[list[float], list[float]]:
    """Take the seconds of two things in turns, after a turn that does not count."""
    turns = [(first(), second()) for _ in range(repetitions + 1)][1:]
    return [turn[0] for turn in turns], [turn[1] for turn in turns]


def row(
    name: str, unit: str, amount: int, ours: list[float], theirs: list[float]
) -> dict[str, Any]:
    """Make a row out of the seconds that two sides took for an amount."""
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "unit": unit,
        "ours": round(amount / medians[0], 1),
        "theirs": round(amount / medians[1], 1),
        "ratio": round(medians[1] / medians[0], 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


@click.command()
@click.option("--threads", type=int, multiple=True, default=(1, 2), help="Numbers of CPU threads.")
@click.option("--repetitions", default=5, help="Of each side, in turns.")
@click.option("--pairs", default=640, help="Training pairs.")
@click.option("--sentences", default=1000, help="Sentences to translate, at most.")
@click.option("--data", default="embedded", help="As of the scripts.")
@click.option("--model", type=click.Path(path_type=Path), help="Model file.  [default: embedded]")
@click.option("--device", default="cpu", help="cpu or cuda.")
def main(**options: Any) -> None:
    """Print the comparison as JSON."""
    click.echo(json.dumps(measure(**options), indent=1))


if __name__ == "__main__":
    main()
