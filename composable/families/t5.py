"""T5 v1.0 (relu), v1.1, Flan and mT5 (gated): names, and the position bias all layers share."""

import functools
from typing import TYPE_CHECKING, Any

from composable.families.base import Call, Family, Layers, cache_of, without_cache

if TYPE_CHECKING:
    from torch import Tensor, nn


class PrunedAttention:
    """Mixin over a T5 attention that has lost heads, or whose neighbours have.

    Block 0 computes the position bias for all heads of the dense model and every layer hands on
    what it was given, so the bias is sliced for the own use only. Cross-attentions have no bias;
    zeros of one head broadcast over any number. An attention without heads adds nothing but
    still writes the cache, since generation reads the length of the text from layer 0.

    Attributes:
        kept_heads: ascending ids of the heads that stayed, in the numbering of the dense model.
    """

    kept_heads: "Tensor"

    def forward(
        self,
        hidden_states: "Tensor",
        mask: "Tensor | None" = None,
        key_value_states: "Tensor | None" = None,
        position_bias: "Tensor | None" = None,
        **kwargs: Any,
    ) -> tuple["Tensor", "Tensor", "Tensor | None"]:
        """Run the attention on (batch, length, width); return output, full bias, weights."""
        is_cross = key_value_states is not None
        if key_value_states is not None:
            # not of size 1: kernels of GPUs that give gradients want a last dimension in memory
            queries, keys = hidden_states.shape[1], key_value_states.shape[1]
            position_bias = hidden_states.new_zeros(1, 1, queries, keys)
        elif position_bias is None:
            position_bias = self._full_bias(hidden_states, cache_of(kwargs))
        if self.kept_heads.numel() == 0:
            source = hidden_states if key_value_states is None else key_value_states
            self._write_empty_cache(source, cache_of(kwargs), is_cross)
            return hidden_states.new_zeros(hidden_states.shape), position_bias, None
        own = position_bias if is_cross else position_bias[:, self.kept_heads].contiguous()
        output, _, weights = super().forward(  # type: ignore[misc]
            hidden_states, mask, key_value_states, own, **kwargs
        )
        return output, position_bias, weights

    def _full_bias(self: Any, hidden_states: "Tensor", cache: Any) -> "Tensor":
        """Compute the bias of all heads, (1, dense heads, queries, keys)."""
        queries = hidden_states.shape[1]
        past, keys = 0, queries
        if cache is not None:
            own = getattr(cache, "self_attention_cache", cache)
            past = cache.get_seq_length(self.layer_idx)
            keys = own.get_mask_sizes(queries, self.layer_idx)[0]
        return self.compute_bias(queries, keys, hidden_states.device, past)

    def _write_empty_cache(self: Any, source: "Tensor", cache: Any, is_cross: bool) -> None:
        """Enter the length of `source` into the cache, with one head of width one."""
        is_updated = getattr(cache, "is_updated", {})
        if cache is None or (is_cross and is_updated.get(self.layer_idx)):
            return
        name = "cross_attention_cache" if is_cross else "self_attention_cache"
        empty = source.new_zeros(len(source), 1, source.shape[1], 1)
        getattr(cache, name, cache).update(empty, empty, self.layer_idx)
        if is_cross:
            is_updated[self.layer_idx] = True


@functools.cache
def _pruned_class(dense: Any) -> type["nn.Module"]:
    """Make the class of a pruned attention from the dense one (T5Attention, MT5Attention)."""
    return type(f"Pruned{dense.__name__}", (PrunedAttention, dense), {})


def _adapt_attention(attention: Any, kept_heads: list[int] | None) -> None:
    """Turn a T5 attention into one that takes its own rows of the position bias."""
    import torch

    if not isinstance(attention, PrunedAttention):
        kept_heads = list(range(attention.n_heads)) if kept_heads is None else kept_heads
        dense: Any = type(attention)
        attention.__class__ = _pruned_class(dense)
    if kept_heads is not None:
        ids = torch.tensor(kept_heads, dtype=torch.long, device="cpu")
        attention.register_buffer("kept_heads", ids, persistent=False)


def _hand_over_bias(blocks: "nn.ModuleList", removed: set[int]) -> None:
    """Move the position bias table from block 0, if it is to go, to the first block that stays."""
    stays = next(index for index in range(len(blocks)) if index not in removed)
    old: Any = blocks[0].get_submodule("layer.0.SelfAttention")
    new: Any = blocks[stays].get_submodule("layer.0.SelfAttention")
    if old is not new:
        new.relative_attention_bias = old.relative_attention_bias
        new.has_relative_attention_bias = True


def _replay(args: Any, kwargs: dict[str, Any], output: Any) -> Call:
    """Give a variant the position bias that the dense attention used (it hands on all heads)."""
    return tuple(args), {**without_cache(kwargs), "position_bias": output[1]}


def _run_trunk(model: Any, batch: dict[str, Any]) -> None:
    """Run encoder and, where there is a target, decoder."""
    mask = batch["attention_mask"]
    encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    target = batch.get("decoder_input_ids")
    if target is None and "labels" in batch:
        target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    if target is not None:
        states = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
        model.decoder(input_ids=target, **states, use_cache=False)


def _layer_output(states: Any, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Hand on the position biases that the layer was given."""
    return states, args[2], args[5]


T5 = Family(
    name="T5",
    model_types=("t5", "mt5"),
    layers=(
        Layers(r"encoder\.block", "encoder", ("num_layers",)),
        # generate takes the length of its caches from decoder_layers; without it from num_layers,
        # and fails as soon as the decoder has more layers than the encoder
        Layers(r"decoder\.block", "decoder", ("num_decoder_layers", "decoder_layers")),
    ),
    attention=r"layer\.\d+\.(SelfAttention|EncDecAttention)",
    cross_attention=r"layer\.\d+\.EncDecAttention",
    attention_parts=(("q", "q"), ("k", "k"), ("v", "v"), ("o", "o")),
    head_size="key_value_proj_dim",
    ffn=r"layer\.\d+\.DenseReluDense",
    ffn_parts=(("up", "wi"), ("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")),
    activation="act",
    sizes=(("neurons", "d_ff"), ("heads", "num_heads"), ("head_size", "d_kv")),
    head_table="relative_attention_bias",
    leftovers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    default_prefix="translate English to German: ",
    adapt_attention=_adapt_attention,
    before_layer_removal=_hand_over_bias,
    replay=_replay,
    run_trunk=_run_trunk,
    layer_output=_layer_output,
)
