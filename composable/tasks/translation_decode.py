"""Greedy or beam translation of many sentences: sorted by length, batched by tokens."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from composable.linalg import kernels
from composable.progress import shows_progress
from composable.tasks.greedy import greedy, is_plain
from composable.tasks.samples import BATCH_TOKENS, length_batches, pad_texts

ENCODED_TOKENS = 1024
MAX_LENGTH = 80


def translate(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    num_beams: int = 1,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int = MAX_LENGTH,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Translate sentences without sampling.

    Args:
        model: a sequence-to-sequence model; it is moved to `device` and set to eval mode.
        tokenizer: the model's own; it appends the end token.
        sentences: source sentences, with the prefix the model expects.
        num_beams: 1 is greedy.
        batch_tokens: source tokens in a batch, padding included; a longer sentence goes alone.
        max_length: a translation ends after so many tokens at the latest.
        device: where to run.
        dtype: anything but float32 runs under autocast; the weights stay as they are.

    Returns:
        One line for each sentence, in the order of `sentences`.
    """
    if not sentences:
        return []
    model.to(device)
    model.eval()
    rows: list[list[int]] = tokenizer(list(sentences))["input_ids"]
    translations = [""] * len(rows)
    bar = tqdm(total=len(rows), desc="translate", unit="sentence", disable=not shows_progress())
    lengths = [len(row) for row in rows]
    with (
        bar,
        torch.inference_mode(),
        kernels.autocast(device, dtype),
        kernels.for_cpu(model, device, max(lengths)),
    ):
        for chosen in length_batches(lengths, batch_tokens):
            tokens = _generate(model, [rows[i] for i in chosen], num_beams, max_length, device)
            for i, text in zip(chosen, _decode(tokenizer, tokens), strict=True):
                translations[i] = text
            bar.update(len(chosen))
    return translations


def _generate(
    model: Any, rows: list[list[int]], num_beams: int, max_length: int, device: Any
) -> Tensor:
    """Translate rows of tokens, longest first."""
    pad = model.config.pad_token_id
    if num_beams == 1 and is_plain(model):
        # encoded in parts that stay in a CPU's cache
        size = ENCODED_TOKENS if torch.device(device).type == "cpu" else sys.maxsize
        parts = length_batches([len(row) for row in rows], size)
        batches = [_batch([rows[i] for i in part], pad, device) for part in parts]
        return greedy(model, batches, max_length)
    found: Tensor = model.generate(
        **_batch(rows, pad, device), num_beams=num_beams, do_sample=False, max_new_tokens=max_length
    )
    return found


def _batch(rows: list[list[int]], pad: int, device: Any) -> dict[str, Tensor]:
    batch = pad_texts([{"input_ids": row} for row in rows], pad)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _decode(tokenizer: Any, tokens: Tensor) -> list[str]:
    """Text of generated rows, each on one line so that a file of them keeps its line numbers."""
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]
