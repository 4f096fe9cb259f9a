"""DistilBERT: half of BERT's layers, under other names."""

from composable.families.base import Family, Layers

DISTILBERT = Family(
    name="DistilBERT",
    model_types=("distilbert",),
    layers=(Layers(r"(?:\w+\.)?transformer\.layer", "encoder", ("num_hidden_layers",)),),
    attention="attention",
    attention_parts=(("q", "q_lin"), ("k", "k_lin"), ("v", "v_lin"), ("o", "out_lin")),
    head_size="attention_head_size",
    ffn="ffn",
    ffn_parts=(("up", "lin1"), ("down", "lin2")),
    activation="activation",
)
