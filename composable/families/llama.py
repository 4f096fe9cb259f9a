"""Llama, SmolLM2, Mistral, Qwen2 and Qwen3: rotary decoders, gated ffns, grouped queries."""

from composable.families.base import Family, Layers

LLAMA = Family(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers=(Layers(r"(?:\w+\.)?layers", "decoder", ("num_hidden_layers",), ("layer_types",)),),
    attention="self_attn",
    attention_parts=(("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")),
    head_size="head_dim",
    counters=(("num_key_value_groups", "per_group"),),
    ffn="mlp",
    ffn_parts=(("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")),
    activation="act_fn",
    sizes=(
        ("neurons", "intermediate_size"),
        ("heads", "num_attention_heads"),
        ("groups", "num_key_value_heads"),
        ("head_size", "head_dim"),
    ),
    leftovers=r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
)
