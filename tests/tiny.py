"""Tiny random models of all families, and tiny corpora: no download, milliseconds."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from composable.checkpoint import Checkpoint, config_dict, fingerprint_of

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
