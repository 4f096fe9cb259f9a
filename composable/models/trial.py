"""A pretrained model is tried once: built as our files build it, and run on a few tokens."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig

from composable.errors import UserError, as_user_error
from composable.tasks.translation_decode import generate

TEXT = "A man runs in the street."
MOST_TOKENS = 8


def try_out(source: Path, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    """Refuse a model that could be read, but neither stored and read again nor used.

    Args:
        source: of the model, for messages.
        model: in eval mode, in the layout of our files.
        tokenizer: of a model of texts, else None.
        config: as the model file will hold it.

    Raises:
        UserError: it fails, or computes something that is not finite.
    """
    kept = as_user_error(f"{source}: what its config says cannot be kept")
    with kept, init_empty_weights(include_buffers=False):
        type(model)(AutoConfig.for_model(**config))
    with (
        as_user_error(f"{source}: the model or its tokenizer does not work"),
        torch.inference_mode(),
    ):
        found = next(iter(model(**_sample(model, tokenizer)).values()))
    if model.config.is_encoder_decoder:
        with (
            as_user_error(f"{source}: its settings of generate do not work"),
            torch.inference_mode(),
        ):
            rows = _sample(model, tokenizer)["input_ids"].tolist() * 2
            for beams in (1, 2):
                generate(model, rows, beams, MOST_TOKENS, "cpu")
    if not torch.isfinite(found).all():
        raise UserError(
            f"{source}: the model computes NaN or infinity; a sound checkpoint is needed."
        )


def _sample(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Make a batch of one sample: a few tokens, or a black image."""
    config = model.config
    if tokenizer is None:
        side = config.image_size
        size = (side, side) if isinstance(side, int) else side
        return {"pixel_values": torch.zeros(1, config.num_channels, *size, dtype=model.dtype)}
    ids = tokenizer(TEXT)["input_ids"][:MOST_TOKENS] or [0]
    batch = {"input_ids": torch.tensor([ids])}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[config.decoder_start_token_id]])
    return batch
