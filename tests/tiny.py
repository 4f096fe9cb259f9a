"""Tiny random models of all families, and tiny corpora: no download, milliseconds."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from composable import families
from composable.models.checkpoint import Checkpoint, config_dict, fingerprint_of
from composable.tasks import images

#: Methods for plain rates that look at nothing but weights.
BY_WEIGHTS = {"attention": "head_l1", "ffn": "neuron_l1"}
WORDS = (
    "a the man woman dog cat child street house red blue green runs sits plays sleeps in on with "
    "and . ein eine der die mann frau hund katze kind straße haus rot blau grün läuft sitzt "
    "spielt schläft auf mit und"
).split()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with T5's special tokens."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def t5(
    seed: int = 0, gated: bool = False, attention: str = "sdpa", mt5: bool = False, **changes: Any
) -> Any:
    """A T5 of 2+2 layers with 4 heads of 8 and random weights that are far from zero."""
    settings = {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
        "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        "tie_word_embeddings": not gated,
        **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    config, architecture = (
        (MT5Config, MT5ForConditionalGeneration) if mt5 else (T5Config, T5ForConditionalGeneration)
    )
    model = architecture(config(**settings))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(0, 0.25)
        if gated:  # T5 v1.1, Flan and mT5 have their own vocabulary projection
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.25)
            model.all_tied_weights_keys.pop("lm_head.weight")
    return model.eval()


def checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    """The tiny T5 as a dense checkpoint."""
    model = t5(seed, **changes)
    config = config_dict(model)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer(),
        config=config,
        fingerprint=fingerprint_of(config, model.state_dict()),
        info={
            "source": "tiny", "revision": None, "task": "translation", "prefix": "",
            "languages": ["en", "de"], "data": None, "history": [],
            "dense_parameters": sum(p.numel() for p in model.parameters()),
        },
    )  # fmt: skip


def corpus(folder: Path, pairs: int = 60, seed: int = 0) -> Path:
    """Write train, val and test of a word-for-word language into `folder`."""
    generator = torch.Generator().manual_seed(seed)
    english = (
        ["man", "woman", "dog", "cat", "child"],
        ["runs", "sits", "plays", "sleeps"],
        ["street", "house"],
    )
    german = (
        ["mann", "frau", "hund", "katze", "kind"],
        ["läuft", "sitzt", "spielt", "schläft"],
        ["straße", "haus"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (
        ("train", pairs),
        ("val", max(8, pairs // 4)),
        ("test", max(8, pairs // 4)),
    ):
        source, target = [], []
        for _ in range(count):
            picks = [int(torch.randint(len(words), (), generator=generator)) for words in english]
            e, g = (
                [words[i] for words, i in zip(side, picks, strict=True)]
                for side in (english, german)
            )
            source.append(f"a {e[0]} {e[1]} in the {e[2]} .")
            target.append(f"ein {g[0]} {g[1]} auf der {g[2]} .")
        (folder / f"{split}.en").write_text("\n".join(source) + "\n")
        (folder / f"{split}.de").write_text("\n".join(target) + "\n")
    return folder


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1,
}  # fmt: skip
#: Name -> config class, architecture, settings that differ from SMALL's.
LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", {}),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {}),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {"embedding_size": 16}),
    "distilbert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 48, "seq_classif_dropout": 0.1},
    ),
    "opt": (
        "OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_positions": 48, "n_inner": 48}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama_gqa": (
        "LlamaConfig", "LlamaForCausalLM",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
         "tie_word_embeddings": True},
    ),
    "mistral": (
        "MistralConfig", "MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "vit": (
        "ViTConfig", "ViTForImageClassification",
        {"image_size": 8, "patch_size": 4, "num_channels": 1},
    ),
    "deit": (
        "DeiTConfig", "DeiTForImageClassification",
        {"image_size": 8, "patch_size": 4, "num_channels": 3},
    ),
}  # fmt: skip
TASKS = {
    "SequenceClassification": "text_classification",
    "ImageClassification": "image_classification",
    "ForCausalLM": "language_modeling",
    "LMHeadModel": "language_modeling",
}


def build(layout: str, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """A model of 3 layers of some family, as transformers makes it, with random weights."""
    config, architecture, settings = LAYOUTS[layout]
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**(SMALL | settings | changes))
    model = getattr(transformers, architecture)(made)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() or "ln_" in name
            parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.25)
    return model.eval()


def dense(layout: str, seed: int = 0, **changes: Any) -> Checkpoint:
    """A tiny model of some family as a dense checkpoint; "t5" and "t5_gated" as well."""
    if layout.startswith("t5"):
        return checkpoint(seed, gated=layout == "t5_gated", **changes)
    model = build(layout, seed, **changes)
    family = families.of(model)
    if family.prepare is not None:
        family.prepare(model)
    config = config_dict(model)
    task = next(task for end, task in TASKS.items() if type(model).__name__.endswith(end))
    is_image = family.image_tokens is not None
    return Checkpoint(
        model=model,
        tokenizer=None if is_image else tokenizer(),
        config=config,
        fingerprint=fingerprint_of(config, model.state_dict()),
        info={
            "source": layout, "revision": None, "task": task, "prefix": "", "data": None,
            "history": [], "dense_parameters": sum(p.numel() for p in model.parameters()),
            "max_length": 24,
            **({"labels": ["0", "1"]} if "classification" in task else {}),
            **({"image_processor": images.default_settings(model.config, family)}
               if is_image else {}),
        },
    )  # fmt: skip


def inputs(made: Checkpoint, samples: int = 3, length: int = 9, seed: int = 0) -> dict[str, Any]:
    """A batch for `made.model(**batch)`, with padding where there is text."""
    generator = torch.Generator().manual_seed(seed)
    config = made.model.config
    if made.family.image_tokens is not None:
        shape = (samples, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, samples):
        mask[row, length - row :] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, : length - 2]
    return batch


ALL = ("t5", "t5_gated", *LAYOUTS)
