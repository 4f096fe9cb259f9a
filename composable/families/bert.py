"""BERT, what shares its layout (RoBERTa, XLM-R, CamemBERT, ELECTRA), and DistilBERT."""

from composable.families.base import Family, Layers

BERT = Family(
    name="BERT",
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers=(Layers(r"(?:\w+\.)?encoder\.layer", "encoder", ("num_hidden_layers",)),),
    attention="attention",
    # o lies beside the rest, and the attention adds its input and normalises
    attention_parts=(
        ("q", "self.query"),
        ("k", "self.key"),
        ("v", "self.value"),
        ("o", "output.dense"),
    ),
    core="self",
    head_size="attention_head_size",
    ffn="",
    ffn_parts=(("up", "intermediate.dense"), ("down", "output.dense")),
    activation="intermediate.intermediate_act_fn",
    sizes=(("neurons", "intermediate_size"),),
    leftovers=r"(.+\.)?(position_ids|embeddings\.token_type_ids)",
)

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
    sizes=(("neurons", "hidden_dim"),),
    leftovers=r"(.+\.)?position_ids",
)
