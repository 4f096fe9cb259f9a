"""GPT-2: decoders whose q, k and v are one matrix, which is split, and stored transposed."""

from typing import TYPE_CHECKING

from composable.families.base import Family, Layers

if TYPE_CHECKING:
    from torch import nn


def _prepare(model: "nn.Module") -> None:
    """Turn the fused, transposed linears into plain ones."""
    from composable.families.gpt2_linears import split

    split(model)


def _restore(model: "nn.Module") -> None:
    """Turn plain linears into the fused, transposed ones."""
    from composable.families.gpt2_linears import join

    join(model)


GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    layers=(Layers(r"(?:transformer\.)?h", "decoder", ("num_hidden_layers",)),),
    attention="attn",
    attention_parts=(("q", "c_attn.q"), ("k", "c_attn.k"), ("v", "c_attn.v"), ("o", "c_proj")),
    head_size="head_dim",
    counters=(("num_heads", "heads"), ("split_size", "width")),
    ffn="mlp",
    ffn_parts=(("up", "c_fc"), ("down", "c_proj")),
    activation="act",
    sizes=(("neurons", "n_inner"),),
    leftovers=r"(.+\.)?h\.\d+\.(attn|crossattention)\.(bias|masked_bias)",  # triangles of ones
    prepare=_prepare,
    restore=_restore,
)
