"""Plain texts, one sample a line: text files, and JSON lines with the text under a key."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from composable import families
from composable.errors import FormatError, UserError
from composable.tasks.samples import (
    Samples,
    check_tokens,
    most_tokens,
    pad_texts,
    pad_token,
    with_positions,
)
from composable.tasks.splits import Corpus, share_of
from composable.tasks.text_files import json_lines, lines

#: Tokens of a text at most, if nothing else is said.
LONGEST = 1024
ENDINGS = (".txt", ".tokens", ".raw", ".jsonl")
OTHERS = (".json", ".parquet", ".arrow", ".zst")


@dataclass(frozen=True)
class PlainTexts(Corpus):
    """Samples without labels, and without the empty ones."""

    texts: list[str]

    @classmethod
    def of(cls, texts: Sequence[str], name: str = "", file: str = "") -> "PlainTexts":
        """Make a training split of some texts."""
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        return cls(name, "train", file, digest, list(texts))


def dataset(corpus: PlainTexts, checkpoint: Any) -> Samples:
    """Tokenise texts, with the special tokens of the tokenizer; each must have a token."""
    longest = most_tokens(checkpoint, LONGEST)
    found = checkpoint.tokenizer(corpus.texts, truncation=True, max_length=longest, verbose=False)
    check_tokens(found["input_ids"], f"{corpus.name or 'calibration set'}: text {{}}".format)
    return Samples([{"input_ids": ids} for ids in found["input_ids"]])


def collator(checkpoint: Any) -> Callable[[list[Any]], Mapping[str, Tensor]]:
    """Return what pads a list of samples, on the side that the tokenizer of a decoder names."""
    # an encoder sees the same whichever side is padded; its positions count from the left
    is_decoder = families.of(checkpoint.model).stacks == ("decoder",)
    is_left = is_decoder and checkpoint.tokenizer.padding_side == "left"
    pad = pad_token(checkpoint)
    return lambda items: with_positions(pad_texts(items, pad, is_left), checkpoint.model)


def is_plain(data: str | None) -> bool:
    """Tell whether it is a file of plain texts, not the data of a task."""
    return data is not None and Path(data).is_file() and _ending(data) in ENDINGS


def refuse_unknown(data: str | None) -> None:
    """Refuse files that a task would take for a text, but that hold something else."""
    if data is not None and Path(data).is_file() and _ending(data) in OTHERS:
        raise FormatError(
            f"{data}: {_ending(data)} is not read here; give a text a line ({ENDINGS[0]}), or an "
            "object a line (.jsonl)."
        )


def _ending(data: str) -> str:
    return Path(data.removesuffix(".gz")).suffix.lower()


def read_texts(path: Path, key: str = "text", limit: int | None = None) -> PlainTexts:
    """Read a file of texts.

    Args:
        path: a text a line, or .jsonl with an object a line; also .gz. Empty ones are left out.
            No more is read than `limit` needs.
        key: of the text in an object.
        limit: the first so many texts.

    Raises:
        FormatError: no such file, or no text in it.
    """
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        found = (_text_of(path, number, record, key) for number, record in json_lines(path))
    else:
        found = (line.strip() for line in lines(path))
    texts = list(itertools.islice((text for text in found if text.strip()), limit))
    if not texts:
        raise FormatError(f"{path}: no text in it; at least one line was expected.")
    return PlainTexts.of(texts, str(path), path.name)


def given_texts(texts: Sequence[str], split: str, limit: int | None = None) -> PlainTexts:
    """Make a split of texts from Python; every tenth, from the first, is of valid, not of train.

    Raises:
        UserError: something is no text, or none is left for the split.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"data: sample {i} is {text!r:.40}; expected a text that is not empty.")
    chosen = share_of(texts, split, limit)
    if not chosen:
        raise UserError(f"data: {len(texts)} texts leave none for {split}; give more.")
    return PlainTexts.of(chosen)


def _text_of(path: Path, number: int, record: Any, key: str) -> str:
    found = record.get(key) if isinstance(record, dict) else None
    if not isinstance(found, str):
        met = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        met = met if found is None else f"{str(found)[:40]!r} there"
        raise FormatError(
            f'{path}: line {number} has no text under the key "{key}" (has {met}); correct it, or '
            "give another key."
        )
    return found
