"""The next token of a text: perplexity of WikiText-2, Penn Treebank and plain text, in windows."""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from composable.errors import FormatError, UserError
from composable.tasks import scores, splits, text_files
from composable.tasks.base import Score, Task, report, signature
from composable.tasks.losses import sample_losses, training_functions
from composable.tasks.samples import (
    Samples,
    measure,
    pad_texts,
    pad_token,
    padded,
    positions,
)
from composable.tasks.splits import Corpus, Source

#: Most logits of a batch while measuring.
LOGITS = {"cpu": 2**26, "cuda": 2**30}
NAMES = {
    split: [f"{start}{name}" for start in ("", "wiki.", "ptb.") for name in names]
    for split, names in splits.NAMES.items()
}
ENDINGS = (".txt", ".tokens", ".raw")
WANTED = (
    "a text file (also .gz) or a folder with train, valid (val, dev, validation) and test as .txt, "
    ".tokens or .raw, also as wiki.train.tokens or ptb.train.txt"
)
_PARTS = {"all": "", "train": "[:90%]", "valid": "[90%:]"}


@dataclass(frozen=True)
class Stream(Corpus):
    """A text, all of it, as in the file."""

    text: str


def read_stream(data: str | None, default: str | None, split: str, limit: int | None) -> Stream:
    r"""Read a split as one text.

    The text is the file's own, decoded as UTF-8: every line with the `\n` (and `\r`) that ends it
    in the file, one directly after the other; nothing is put between them, taken off or replaced.

    Arguments and errors are those of `Task.read`; `limit` counts lines. Without a train file the
    first 90 % of the lines of the valid file are train and the others valid, and the same of the
    train file where there is none for valid; without a test file all of the valid file stands in.
    """
    find = functools.partial(splits.first_of, endings=ENDINGS)
    name, (place, *_) = splits.locate(data, default, split, NAMES, find, WANTED)
    text = _share(text_files.lines(place.path), place, limit)
    if not text.strip():
        raise FormatError(f"{place.path}: no text for {split}; at least a line was expected.")
    file, digest = place.path.name + _PARTS[place.share], hashlib.sha256(text.encode())
    return Stream(name, split, file, digest.hexdigest(), text)


def _share(lines: Iterator[str], place: Source, limit: int | None) -> str:
    """Take the first 90 % of the lines, or the rest; and of those the first few."""
    if place.share != "all":
        every = list(lines)
        cut = len(every) * 9 // 10
        lines = iter(every[:cut] if place.share == "train" else every[cut:])
    return "".join(itertools.islice(lines, limit))


def pad_windows(items: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Pad windows; the label of a token is the next one, -100 for the last of each window."""
    batch = pad_texts(items, pad)
    return batch | {"labels": padded([[*item["input_ids"][1:], -100] for item in items], -100)}


class Windows(Samples):
    """A text in windows that do not overlap; a single last token is left out.

    Attributes:
        tokens: of the whole text.
    """

    def __init__(self, ids: NDArray[np.int32], size: int):
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        super().__init__([{"input_ids": part} for part in parts if len(part) > 1])
        self.tokens = len(ids)


class LanguageModeling(Task):
    """The next token of a text."""

    name = "language_modeling"
    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    main = "perplexity"
    options = ("max_length",)
    batch_size = 8  # windows: a step of 64 would need gigabytes for the logits alone
    stacks = (("decoder",),)
    tokens = 512  # of a window
    read = staticmethod(read_stream)
    functions = staticmethod(training_functions)

    def label_texts(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Label every token with the next one, the last and padding with -100."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        labels = torch.full_like(ids, -100)
        has_next = mask[:, :-1] & mask[:, 1:]
        labels[:, :-1] = torch.where(has_next, ids[:, 1:], -100)
        return {**batch, "labels": labels}

    def dataset(
        self, corpus: Stream, checkpoint: Any, is_sorted: bool = False, window: int | None = None
    ) -> Windows:
        """Tokenise the text as a whole and cut it into windows that do not overlap.

        No special tokens are added, neither to the text nor to a window of so many tokens, by
        default `length`. The last window has the tokens that are left; a single one is left out,
        for nothing predicts it. A text without two tokens is a FormatError.
        """
        found = checkpoint.tokenizer(
            corpus.text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids = np.array(found["input_ids"], dtype=np.int32)
        windows = Windows(ids, window or self.length(checkpoint))
        if not len(windows):
            raise FormatError(f"{corpus.name}: {corpus.file} has less than 2 tokens; give more.")
        return windows

    def collator(self, checkpoint: Any) -> Any:
        """Return what pads windows; labels (batch, length) are the next tokens."""
        return functools.partial(pad_windows, pad=pad_token(checkpoint))

    def evaluate(
        self, checkpoint: Any, corpus: Stream, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Measure the perplexity, and bits per byte of the text as it is in the file."""
        window = _window(settings.get("max_length"), self.length(checkpoint), checkpoint)
        data = self.dataset(corpus, checkpoint, window=window)
        settings = settings | {"batch_tokens": _batch_tokens(checkpoint, settings)}
        found = measure(checkpoint, data, self.collator(checkpoint), sample_losses, settings)
        totals, counts = (torch.stack(side).double() for side in zip(*found.rows, strict=True))
        predicted, loss = int(counts.sum()), float(totals.sum() / counts.sum())
        tokens, size = data.tokens, len(corpus.text.encode())
        said = signature(
            corpus,
            len(data),
            tokens=tokens,
            predicted=predicted,
            window=window,
            stride=window,
            tokenizer=f"{type(checkpoint.tokenizer).__name__}-{len(checkpoint.tokenizer)}",
            special_tokens="none",
            dtype=settings["dtype"],
        )
        bits = scores.bits_per_byte(loss, tokens, size)
        both = {
            "perplexity": Score("perplexity", scores.perplexity(loss), said),
            "bits_per_byte": Score("bits per byte", bits, f"{said}|bytes:{size}"),
        }
        more = {"tokens": tokens, "predicted_tokens": predicted, "window": window, "bytes": size}
        return [f"{mean:.6f}" for mean in (totals / counts).tolist()], report(
            corpus, both, loss, len(data), found.seconds, **more
        )


def _window(asked: int | None, default: int, checkpoint: Any) -> int:
    """Tokens of a window: what was asked for, if the model has so many positions."""
    limit = positions(checkpoint)
    if asked and (asked < 2 or (limit and asked > limit)):
        raise UserError(
            f"window {asked}: expected 2 or more"
            + (f", and at most the {limit} positions of the model." if limit else ".")
        )
    return asked or default


def _batch_tokens(checkpoint: Any, settings: dict[str, Any]) -> int:
    """Tokens of a batch, so few that the logits of all of them fit into memory."""
    device = torch.device(settings["device"]).type
    most = LOGITS.get(device, LOGITS["cuda"]) // checkpoint.model.config.vocab_size
    return max(1, min(most, settings.get("batch_tokens") or most))


LANGUAGE_MODELING = LanguageModeling()
