"""English to German: reading parallel text, tokenising it once, and the cross-entropy."""

import dataclasses
import hashlib
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composable import files
from composable.errors import FormatError, UserError
from composable.linalg import kernels
from composable.progress import MOMENT, Stage
from composable.tasks import metrics, multi30k, text_files
from composable.tasks.base import Task, measured
from composable.tasks.losses import sample_losses, training_functions
from composable.tasks.samples import Samples, check_tokens, pad_texts, padded
from composable.tasks.splits import first_of, short_name
from composable.tasks.translation_decode import MAX_LENGTH, translate

#: Names a split may have as a file, the first that exists is read.
SPLITS = {"train": ("train",), "valid": ("val", "valid"), "test": ("test_2016_flickr", "test")}
MAX_TOKENS = 256


@dataclass(frozen=True)
class Corpus:
    """Parallel sentences.

    Attributes:
        name: folder they came from.
        split: train, valid or test.
        source: one sentence an entry.
        target: its translations, in the same order.
        sha256: of the source and target text that was read.
    """

    name: str
    split: str
    source: list[str]
    target: list[str]
    sha256: str


def corpus_folder(data: str | None, default: str | None = None) -> Path:
    """Find the folder of the data.

    Args:
        data: `embedded`, `multi30k` (downloaded to data/multi30k when absent) or a folder.
        default: what the model file asks for where the option is not given.

    Raises:
        UserError: no such folder.
    """
    name = data or default or "multi30k"
    if name == "embedded":
        return files.assets("captions")
    if name == "multi30k":
        folder = Path("data/multi30k")
        multi30k.fetch_multi30k(folder)
        return folder
    if not Path(name).is_dir():
        raise UserError(
            f"data {name}: no such folder; give one with train.en, train.de, val.en, ..., or "
            '"multi30k", or "embedded".'
        )
    return Path(name)


def read_corpus(folder: Path, split: str, limit: int | None = None) -> Corpus:
    """Read one split of a folder of line-aligned text files, plain or .gz.

    Args:
        folder: holds e.g. train.en and train.de; files named as in Multi30K must be Multi30K.
        split: train, valid or test.
        limit: read the first so many pairs only.

    Raises:
        FormatError: unequal line counts, an empty file, or not the text its name promises.
        UserError: no such split.
    """
    found = first_of(folder, SPLITS[split], [".en"])
    if found is None:
        raise UserError(f"{folder}: no {' or '.join(f'{s}.en(.gz)' for s in SPLITS[split])}.")
    stem = found.name.removesuffix(".gz").removesuffix(".en")
    source, sources = _read_lines(folder, f"{stem}.en", limit)
    target, targets = _read_lines(folder, f"{stem}.de", limit)
    if sources != targets or not sources:
        raise FormatError(
            f"{folder}: {stem}.en has {sources} lines and {stem}.de has {targets}; equal numbers "
            "above 0 were expected."
        )
    digest = hashlib.sha256("\n".join([*source, "", *target]).encode()).hexdigest()
    return Corpus(str(folder), split, source, target, digest)


def _read_lines(folder: Path, name: str, limit: int | None) -> tuple[list[str], int]:
    """Read the first lines of a file, without white space around them, and count all of them."""
    found = first_of(folder, [name], [""])
    if found is None:
        raise UserError(f"{folder / name}(.gz): no such file.")
    is_multi30k = name in multi30k.MULTI30K and first_of(folder, ["test_2016_flickr.en"], [""])
    if is_multi30k and (fault := multi30k.fault_of_file(name, found)):
        raise FormatError(
            f"{found}: not Multi30K's ({fault}); delete it and fetch it again, or rename "
            "test_2016_flickr to test if this is a corpus of your own."
        )
    lines = (line.strip() for line in text_files.lines(found))
    first = list(itertools.islice(lines, limit))
    return first, len(first) + sum(1 for _ in lines)


class Pairs(Samples):
    """A corpus as token ids, tokenised once, longest first where `is_sorted`.

    Attributes:
        items: input_ids and labels of every pair.
        sizes: tokens of target and source of every pair.
        lengths: their sums.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, prefix: str, is_sorted: bool = False):
        source = tokenizer([prefix + text for text in corpus.source], **_TOKENS)["input_ids"]
        target = tokenizer(text_target=corpus.target, **_TOKENS)["input_ids"]
        for rows, language in ((source, "source"), (target, "target")):
            check_tokens(rows, f"{corpus.name}: {language}, line {{}}".format)
        items = [
            {"input_ids": ids, "labels": labels} for ids, labels in zip(source, target, strict=True)
        ]
        if is_sorted:
            items.sort(key=lambda item: -(len(item["input_ids"]) + len(item["labels"])))
        super().__init__(items)
        self.sizes = [(len(item["labels"]), len(item["input_ids"])) for item in self.items]
        self.lengths = [sum(pair) for pair in self.sizes]


_TOKENS = {"truncation": True, "max_length": MAX_TOKENS, "return_attention_mask": False}


class Collator:
    """Pad a list of pairs to a batch.

    The batch has input_ids and attention_mask (batch, source length), labels (batch, target
    length) with -100 for padding, and decoder_input_ids, the labels shifted right.
    """

    def __init__(self, pad_token_id: int, decoder_start_token_id: int):
        self.pad, self.start = pad_token_id, decoder_start_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad `items`, each with lists input_ids and labels."""
        labels = padded([item["labels"] for item in items], -100)
        shifted = labels.new_full(labels.shape, self.start)
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.pad)
        return {**pad_texts(items, self.pad), "labels": labels, "decoder_input_ids": shifted}


def cross_entropy(
    checkpoint: Any, corpus: Corpus, batch_size: int = 64, device: str = "cpu"
) -> float:
    """Mean cross-entropy per target token of a model on a corpus, teacher forced, in nats."""
    model = checkpoint.model.to(device)
    pairs = Pairs(corpus, checkpoint.tokenizer, checkpoint.info["prefix"], is_sorted=True)
    collate = collator_for(checkpoint)
    total, tokens = 0.0, 0
    with torch.inference_mode(), kernels.for_cpu(model, device, max(map(max, pairs.sizes))):
        starts = range(0, len(pairs), batch_size)
        for start in Stage(starts, "evaluate loss", unit="batches", delay=MOMENT):
            batch = collate(pairs.items[start : start + batch_size])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            losses, counts = sample_losses(model, batch)
            total += float(losses.double().sum())
            tokens += int(counts.sum())
    return total / tokens


def collator_for(checkpoint: Any) -> Collator:
    """Make the collator for a checkpoint's special tokens."""
    config = checkpoint.model.config
    return Collator(checkpoint.tokenizer.pad_token_id, config.decoder_start_token_id)


class Translation(Task):
    """English to German, scored by BLEU."""

    name = "translation"
    auto_class = "AutoModelForSeq2SeqLM"
    # the second: what configs of 2019 and 2020 say
    heads = ("ForConditionalGeneration", "WithLMHeadModel")
    main = "bleu"
    stacks = (("encoder", "decoder"),)
    has_length = False
    options = ("num_beams", "max_length")
    answer_tokens = MAX_LENGTH
    functions = staticmethod(training_functions)
    collator = staticmethod(collator_for)

    def knows(self, config: Any) -> dict[str, Any]:
        """Return the languages."""
        return {"languages": ["en", "de"]}

    def read(self, data: str | None, default: str | None, split: str, limit: int | None) -> Corpus:
        """Read a split, see `corpus_folder` and `read_corpus`."""
        corpus = read_corpus(corpus_folder(data, default), split, limit)
        is_embedded = (data or default) == "embedded"
        return dataclasses.replace(corpus, name="embedded") if is_embedded else corpus

    def dataset(self, corpus: Corpus, checkpoint: Any, is_sorted: bool = False) -> Pairs:
        """Tokenise; the prefix of the source belongs to the model."""
        return Pairs(corpus, checkpoint.tokenizer, checkpoint.info["prefix"], is_sorted)

    def length(self, checkpoint: Any) -> int:
        """Return the most tokens that are read of a sentence."""
        return MAX_TOKENS

    def evaluate(
        self, checkpoint: Any, corpus: Corpus, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Translate, and score by sacreBLEU, the thesis's BLEU and the cross-entropy."""
        dtype = getattr(torch, settings["dtype"])
        sources = [checkpoint.info["prefix"] + line for line in corpus.source]
        keys = ("num_beams", "batch_tokens", "max_length", "device")
        chosen = {key: settings[key] for key in keys} | {"dtype": dtype}
        started = time.perf_counter()
        lines = translate(checkpoint.model, checkpoint.tokenizer, sources, **chosen)
        seconds = time.perf_counter() - started
        reference = "".join(f"{line}\n" for line in corpus.target)  # as in a file
        with kernels.autocast(settings["device"], dtype):
            loss = cross_entropy(checkpoint, corpus, device=settings["device"])
        scores = {
            "bleu": metrics.sacrebleu_score(lines, corpus.target),
            "bleu_thesis": metrics.thesis_bleu(lines, corpus.target),
        }
        return lines, {
            **measured(scores, loss),
            "sentences": len(lines),
            "sentences_per_second": round(len(lines) / seconds, 2),
            "data": {
                "name": short_name(corpus.name),
                "split": corpus.split,
                "count": len(corpus.target),
                "sha256": corpus.sha256,
                "reference_sha256": hashlib.sha256(reference.encode()).hexdigest(),
            },
        }


TRANSLATION = Translation()
