"""T5 v1.0 (relu), v1.1, Flan and mT5 (gated): names, and the position bias all layers share."""

from typing import TYPE_CHECKING, Any

from composable.families.base import Family, Layers

if TYPE_CHECKING:
    from torch import nn


def _adapt_attention(attention: "nn.Module", kept_heads: list[int] | None) -> None:
    """Let an attention take its own rows of the position bias."""
    from composable.families.t5_attention import adapt_attention

    adapt_attention(attention, kept_heads)


def _hand_over_bias(layers: "nn.ModuleList", removed: set[int]) -> None:
    """Move the position bias table to the first layer that stays."""
    from composable.families.t5_attention import hand_over_bias

    hand_over_bias(layers, removed)


def _replay(
    args: Any, kwargs: dict[str, Any], output: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a variant the position bias that the dense attention used (it hands on all heads)."""
    return tuple(args), {**kwargs, "position_bias": output[1], "past_key_values": None}


def _run_trunk(model: Any, batch: dict[str, Any]) -> None:
    """Run encoder and, where there is a target, decoder."""
    mask = batch["attention_mask"]
    encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    target = batch.get("decoder_input_ids")
    if target is None and "labels" in batch:
        target = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    if target is not None:
        model.decoder(
            input_ids=target,
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            use_cache=False,
        )


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
    default_prefix="translate English to German: ",
    adapt_attention=_adapt_attention,
    before_layer_removal=_hand_over_bias,
    replay=_replay,
    run_trunk=_run_trunk,
    layer_output=_layer_output,
)
