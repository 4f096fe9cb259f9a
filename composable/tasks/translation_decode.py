"""Greedy or beam translation of many sentences: sorted by length, batched by tokens."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from composable.families.base import cache_name
from composable.linalg import kernels
from composable.progress import Stage
from composable.tasks.samples import BATCH_TOKENS, check_tokens, length_batches, pad_texts

ENCODED_TOKENS = 1024
MAX_LENGTH = 80
#: Settings of a generation config that say nothing about which token comes next.
HARMLESS = {
    "pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict_in_generate", "max_length",
    "max_new_tokens", "num_beams", "early_stopping", "length_penalty", "do_sample", "temperature",
    "top_k", "top_p", "_from_model_config", "transformers_version",
}  # fmt: skip
#: The batch is cut when this share of it, or less, is still unfinished; a cut copies the cache.
CUT = 0.85


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
    check_tokens(rows, "sentence {}".format)
    translations = [""] * len(rows)
    lengths = [len(row) for row in rows]
    with (
        Stage(None, "translate", len(rows), unit="sentences") as stage,
        torch.inference_mode(),
        kernels.autocast(device, dtype),
        kernels.for_cpu(model, device, max(lengths)),
    ):
        for chosen in length_batches(lengths, batch_tokens):
            tokens = generate(model, [rows[i] for i in chosen], num_beams, max_length, device)
            for i, text in zip(chosen, _decode(tokenizer, tokens), strict=True):
                translations[i] = text
            stage.update(len(chosen))
    return translations


def generate(
    model: Any, rows: list[list[int]], num_beams: int, max_length: int, device: Any
) -> Tensor:
    """Translate rows of tokens, longest first; the other arguments are those of `translate`.

    Returns:
        Token ids (rows, at most `max_length` and the start token), padded.
    """
    pad = model.config.pad_token_id
    if num_beams == 1 and is_plain(model):
        # encoded in parts that stay in a CPU's cache
        size = ENCODED_TOKENS if torch.device(device).type == "cpu" else sys.maxsize
        parts = length_batches([len(row) for row in rows], size)
        batches = [_batch([rows[i] for i in part], pad, device) for part in parts]
        return greedy(model, batches, max_length)
    found: Tensor = model.generate(
        **_batch(rows, pad, device),
        num_beams=num_beams,
        do_sample=False,
        return_dict_in_generate=False,
        max_new_tokens=max_length,
    )
    return found


def _batch(rows: list[list[int]], pad: int, device: Any) -> dict[str, Tensor]:
    batch = pad_texts([{"input_ids": row} for row in rows], pad)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _decode(tokenizer: Any, tokens: Tensor) -> list[str]:
    """Text of generated rows, each on one line so that a file of them keeps its line numbers."""
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def is_plain(model: Any) -> bool:
    """Tell whether a model's own settings leave greedy search as it is: the likeliest token."""
    settings = model.generation_config
    return (
        set(settings.to_diff_dict()) <= HARMLESS
        and isinstance(settings.eos_token_id, int)
        and isinstance(settings.decoder_start_token_id, int)
    )


@torch.inference_mode()
def greedy(model: Any, batches: Sequence[dict[str, Tensor]], max_length: int) -> Tensor:
    """Translate greedily; the same tokens as transformers' `generate` with one beam.

    Finished sentences leave the batch, so that no step is spent on them.

    Args:
        model: for which `is_plain` holds.
        batches: input_ids and attention_mask; encoded one by one and decoded together.
        max_length: most tokens of a translation.

    Returns:
        Token ids (sentences, at most `max_length`), without the start token, padded.
    """
    settings = model.generation_config
    hidden, mask = _encode(model, batches)
    found = mask.new_full((len(mask), max_length), settings.pad_token_id)
    alive = torch.arange(len(mask), device=mask.device)
    tokens = mask.new_full((len(mask), 1), settings.decoder_start_token_id)
    is_done, cache = torch.zeros_like(alive, dtype=torch.bool), None
    name = cache_name(model)
    for step in range(max_length):
        output = model(
            encoder_outputs=(hidden,),
            attention_mask=mask,
            decoder_input_ids=tokens,
            use_cache=True,
            **{name: cache},
        )
        cache = output[name]
        tokens = _likeliest(output.logits[:, -1:])
        found[alive, step] = tokens[:, 0].masked_fill(is_done, settings.pad_token_id)
        is_done |= tokens[:, 0] == settings.eos_token_id
        stay = (~is_done).nonzero()[:, 0]
        if len(stay) <= CUT * len(alive):
            if not len(stay):
                return found[:, : step + 1]
            cache.batch_select_indices(stay)
            hidden, mask, alive = hidden[stay], mask[stay], alive[stay]
            tokens, is_done = tokens[stay], is_done[stay]
    return found


def _likeliest(logits: Tensor) -> Tensor:
    """Index of the largest logit; block by block, since torch's argmax is 10 times its amax."""
    width = math.gcd(logits.shape[-1], 6400)  # 400 of 6000, 128 of 32128
    if width < 32:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, width))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.take_along_dim(block[..., None], -2).argmax(-1)
    return (block * width + inside)[..., 0]


def _encode(model: Any, batches: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Encode batch by batch, and put the results together."""
    encoder = model.get_encoder()
    masks = [batch["attention_mask"] for batch in batches]
    width = max(mask.shape[1] for mask in masks)
    states = [encoder(**batch).last_hidden_state for batch in batches]
    hidden = [functional.pad(each, (0, 0, 0, width - each.shape[1])) for each in states]
    wide = [functional.pad(mask, (0, width - mask.shape[1])) for mask in masks]
    return torch.cat(hidden), torch.cat(wide)
