"""OPT: decoders with learned positions; the ffn's linears lie in the layer itself."""

from composable.families.base import Family, Layers

OPT = Family(
    name="OPT",
    model_types=("opt",),
    layers=(Layers(r"(?:\w+\.)?decoder\.layers", "decoder", ("num_hidden_layers",)),),
    attention="self_attn",
    attention_parts=(("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")),
    head_size="head_dim",
    counters=(("num_heads", "heads"),),
    ffn="",
    ffn_parts=(("up", "fc1"), ("down", "fc2")),
    activation="activation_fn",
    sizes=(("neurons", "ffn_dim"),),
    leftovers=r"(.+\.)?decoder\.version",
)
