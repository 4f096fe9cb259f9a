"""Greedy decoding of a batch that finished sentences leave, so that no step is spent on them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Settings of a generation config that say nothing about which token comes next.
HARMLESS = {
    "pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict_in_generate", "max_length",
    "max_new_tokens", "num_beams", "early_stopping", "length_penalty", "do_sample", "temperature",
    "top_k", "top_p", "_from_model_config", "transformers_version",
}  # fmt: skip
#: The batch is cut when this share of it, or less, is still unfinished; a cut copies the cache.
CUT = 0.85


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
    for step in range(max_length):
        output = model(
            encoder_outputs=(hidden,),
            attention_mask=mask,
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
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
    hidden = [pad(each, (0, 0, 0, width - each.shape[1])) for each in states]
    return torch.cat(hidden), torch.cat([pad(mask, (0, width - mask.shape[1])) for mask in masks])
