#!/usr/bin/env python3
"""Make the task "are four words of this caption permuted?" and train its dense model.

python benchmarks/train_permuted.py --data FOLDER -o out/bench/permuted/dense.pth
python benchmarks/train_permuted.py --data FOLDER -o out/try/dense.pth --steps 20 --limit 200

FOLDER is that of Multi30K. Beside the model are written data/ (train, valid and test) and scoring/
(ten training captions of one length, for rank_importance.py). Pruning without training is measured
with it: what a model knows of word order is spread over its layers, and is lost step by step.
"""

import itertools
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.real_chains import MINILM
from composable.commands import cli, options

WINDOW = 4
CLASSES = ("original", "permuted")
#: Captions that the scores are measured on, and how many tokens each has.
SCORED, SCORED_TOKENS = 10, 14
BATCH, WARMUP = 32, 40
SPLITS = ("train", "valid", "test")
Example = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script."""

    data: str = options.option("--data", help="Folder of Multi30K.", default="multi30k")
    output: Path = options.output("out/bench/permuted/dense.pth", "The model file to write.")
    model: str = options.option("--model", help="all-MiniLM-L6-v2.", default=MINILM)
    steps: int = options.option("--steps", help="Of 32 captions.", type=options.COUNT, default=800)
    limit: int | None = options.limit("Captions of each split, to try the script.")
    seed: int = options.seed("Of the data, the head and the training.")
    device: str = options.option(
        "--device", help="Where to train.", type=click.Choice(["cpu", "cuda"]), default="cpu"
    )


def words_of(caption: str) -> list[str]:
    """Lower the case of a caption, and drop its final full stop."""
    return caption.strip().lower().removesuffix(".").split()


def permuted(words: Sequence[str], draw: random.Random) -> list[str]:
    """Put a random window of consecutive words into another order."""
    starts = [*range(len(words) - WINDOW + 1)]
    start = draw.choice([s for s in starts if len(set(words[s : s + WINDOW])) > 1])
    window = (*words[start : start + WINDOW],)
    others = sorted({*itertools.permutations(window)} - {window})
    return [*words[:start], *draw.choice(others), *words[start + WINDOW :]]


def examples(captions: Iterable[str], seed: int, trains: bool) -> list[Example]:
    """Give every usable caption one of the classes, and write its text.

    Args:
        captions: as in Multi30K.
        seed: of the classes and windows.
        trains: whether each class is drawn by itself, of captions with more words than a window
            (28,976 of the 29,000); else both are equally frequent, and a window is enough.
    """
    draw = random.Random(seed)
    usable = [words for words in map(words_of, captions) if len(words) >= WINDOW + trains]
    numbers = [draw.randrange(2) if trains else i % 2 for i in range(len(usable))]
    draw.shuffle(numbers)
    return [
        (" ".join(permuted(words, draw) if number else words), CLASSES[number])
        for words, number in zip(usable, numbers, strict=True)
    ]


def write(path: Path, rows: Sequence[Example]) -> None:
    """Write a table that the task text_classification reads."""
    from composable import files

    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    files.write_text(path, "\n".join(lines) + "\n")


def write_data(folder: Path, settings: Settings) -> dict[str, int]:
    """Write the three splits; return how many examples each has."""
    from composable.tasks import translation

    source, counts = translation.corpus_folder(settings.data), {}
    for number, split in enumerate(SPLITS):
        captions = translation.read_corpus(source, split, settings.limit).source
        rows = examples(captions, settings.seed + number, trains=split == "train")
        write(folder / f"{split}.tsv", rows)
        counts[split] = len(rows)
    return counts


def scoring_texts(dense: Any, rows: Sequence[Example]) -> list[Example]:
    """Take the first examples of `SCORED_TOKENS` tokens, equally many of both classes."""
    fitting = [row for row in rows if len(dense.tokenizer(row[0]).input_ids) == SCORED_TOKENS]
    each = ([row for row in fitting if row[1] == name][: SCORED // 2] for name in CLASSES)
    return [row for pair in zip(*each, strict=True) for row in pair]


def train(dense: Any, data: Path, settings: Settings) -> None:
    """Train all but the embeddings, in place."""
    import torch
    import transformers
    from torch.utils.data import DataLoader

    from composable import tasks
    from composable.training.callbacks import LengthSampler

    task = tasks.by_name(dense.info["task"])
    corpus = task.read(str(data), None, "train", None)
    dense.info |= task.learned(dense, corpus)
    samples = task.dataset(corpus, dense)

    class Trainer(transformers.Trainer):
        """Trainer whose batches are of captions about equally long."""

        def get_train_dataloader(self) -> DataLoader[Any]:
            sampler = LengthSampler(samples.sizes, BATCH, settings.seed)
            return DataLoader(samples, batch_sampler=sampler, collate_fn=task.collator(dense))

    args = transformers.TrainingArguments(
        output_dir=str(settings.output.parent / "trainer"), max_steps=settings.steps,
        per_device_train_batch_size=BATCH, learning_rate=1.5e-4, warmup_steps=WARMUP,
        lr_scheduler_type="linear", weight_decay=0.01, max_grad_norm=1.0, seed=settings.seed,
        save_strategy="no", report_to="none", use_cpu=settings.device == "cpu", disable_tqdm=True,
        logging_steps=100, remove_unused_columns=False,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    dense.model.base_model.embeddings.requires_grad_(False)
    dense.model.train()
    trainer = Trainer(model=dense.model, args=args, train_dataset=samples)
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
    trainer.train()
    dense.model.requires_grad_(True).cpu().eval()


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Write the data, train the dense model, and say how good it is."""
    import composable
    from composable.models import checkpoint

    output, data = settings.output, settings.output.parent / "data"
    counts = write_data(data, settings)
    dense = composable.load(settings.model, task="text_classification", labels=2)
    train(dense, data, settings)
    dense.info["history"].append({"permuted": {"steps": settings.steps, "seed": settings.seed}})
    dense.fingerprint = checkpoint.fingerprint_of(dense.config, dense.model.state_dict())
    checkpoint.save(output, dense)
    lines = (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = scoring_texts(dense, [(line.split("\t")[0], line.split("\t")[1]) for line in lines])
    for split in ("train", "valid"):  # with no valid.tsv a part of train.tsv would be held out
        write(output.parent / "scoring" / f"{split}.tsv", rows)
    report = composable.evaluate(dense, data=str(data), dtype="float32", device="cpu")
    return {"wrote": str(output), "examples": counts, "scored": len(rows), "test": report.report}


if __name__ == "__main__":
    main()
