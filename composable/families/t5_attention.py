"""T5 attentions with any number of heads: each takes its own rows of the one position bias."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache


class PrunedAttention:
    """Mixin over a T5 attention that has lost heads, or whose neighbours have.

    Block 0 computes the position bias for all heads of the dense model and every layer hands on
    what it was given, so the bias is sliced for the own use only. Cross-attentions have no bias;
    zeros of one head broadcast over any number. An attention without heads adds nothing but
    still writes the cache, since generation reads the length of the text from layer 0.

    Attributes:
        kept_heads: ascending ids of the heads that stayed, in the numbering of the dense model.
    """

    kept_heads: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the attention on (batch, length, width); return output, full bias, weights."""
        is_cross = key_value_states is not None
        if key_value_states is not None:
            # not of size 1: kernels of GPUs that give gradients want a last dimension in memory
            queries, keys = hidden_states.shape[1], key_value_states.shape[1]
            position_bias = hidden_states.new_zeros(1, 1, queries, keys)
        elif position_bias is None:
            position_bias = self._full_bias(hidden_states, past_key_values)
        if self.kept_heads.numel() == 0:
            source = key_value_states if key_value_states is not None else hidden_states
            self._write_empty_cache(source, past_key_values, is_cross)
            return torch.zeros_like(hidden_states), position_bias, None
        own = position_bias if is_cross else position_bias[:, self.kept_heads].contiguous()
        output, _, weights = super().forward(  # type: ignore[misc]
            hidden_states, mask, key_value_states, own, past_key_values, **kwargs
        )
        return output, position_bias, weights

    def _full_bias(self: Any, hidden_states: Tensor, cache: Any) -> Tensor:
        """Compute the bias of all heads, (1, dense heads, queries, keys)."""
        queries = hidden_states.shape[1]
        past, keys = 0, queries
        if cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            past = cache.get_seq_length(self.layer_idx)
            keys = own.get_mask_sizes(queries, self.layer_idx)[0]
        return self.compute_bias(queries, keys, hidden_states.device, past)

    def _write_empty_cache(self: Any, source: Tensor, cache: Any, is_cross: bool) -> None:
        """Enter the length of `source` into the cache, with one head of width one."""
        if cache is None:
            return
        own = cache
        if isinstance(cache, EncoderDecoderCache):
            if is_cross and cache.is_updated.get(self.layer_idx):
                return
            own = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        empty = source.new_zeros(len(source), 1, source.shape[1], 1)
        own.update(empty, empty, self.layer_idx)
        if is_cross and isinstance(cache, EncoderDecoderCache):
            cache.is_updated[self.layer_idx] = True


@functools.cache
def pruned_class(dense: Any) -> type[nn.Module]:
    """Make the class of a pruned attention from the dense one (T5Attention, MT5Attention)."""
    return type(f"Pruned{dense.__name__}", (PrunedAttention, dense), {})


def adapt_attention(attention: nn.Module, kept_heads: list[int] | None) -> None:
    """Turn a T5 attention into one that slices the shared bias for itself.

    Args:
        attention: a T5 attention whose q, k, v, o may already have fewer heads.
        kept_heads: ids of its heads in the dense model; None where it keeps what it has.
    """
    if not isinstance(attention, PrunedAttention):
        dense: Any = type(attention)
        attention.__class__ = pruned_class(dense)
        heads = list(range(int(attention.n_heads)))  # type: ignore[arg-type]
        kept_heads = heads if kept_heads is None else kept_heads
    if kept_heads is not None:
        ids = torch.tensor(kept_heads, dtype=torch.long, device="cpu")
        attention.register_buffer("kept_heads", ids, persistent=False)


def hand_over_bias(blocks: nn.ModuleList, removed: set[int]) -> None:
    """Move the position bias table from block 0, if it is to go, to the first block that stays."""
    stays = next(index for index in range(len(blocks)) if index not in removed)
    old: Any = blocks[0].get_submodule("layer.0.SelfAttention")
    new: Any = blocks[stays].get_submodule("layer.0.SelfAttention")
    if old is not new:
        new.relative_attention_bias = old.relative_attention_bias
        new.has_relative_attention_bias = True
