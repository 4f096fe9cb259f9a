"""ViT and DeiT: encoders of image patches."""

from typing import Any

from composable.families.base import Family, Layers


def _image_tokens(config: Any) -> int:
    """Count the patches of an image, and the tokens before them."""
    height, width = (
        (side, side) if isinstance(side, int) else tuple(side)
        for side in (config.image_size, config.patch_size)
    )
    patches = (height[0] // width[0]) * (height[1] // width[1])
    return patches + (2 if config.model_type == "deit" else 1)


VIT = Family(
    name="ViT",
    model_types=("vit", "deit"),
    layers=(Layers(r"(?:\w+\.)?layers", "encoder", ("num_hidden_layers",)),),
    attention="attention",
    attention_parts=(("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")),
    head_size="head_dim",
    ffn="mlp",
    ffn_parts=(("up", "fc1"), ("down", "fc2")),
    activation="activation_fn",
    sizes=(
        ("neurons", "intermediate_size"),
        ("heads", "num_attention_heads"),
        ("head_size", "head_dim"),
    ),
    leftovers=r"(.+\.)?(position_ids|embeddings\.mask_token)",
    image_tokens=_image_tokens,
    image_processor="ViTImageProcessor",
)
