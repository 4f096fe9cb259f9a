"""Models as they are on the hub: what their configs and weights say beside what is needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from composable.models import checkpoint, export
from composable.models.pretrained import import_model
from tests import tiny
from tests.unit.models.test_pretrained import folder_of

#: What configs of a family say on the hub; sizes are the tiny model's.
BERT = {
    "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "position_embedding_type": "absolute", "type_vocab_size": 2,
    "directionality": "bidi", "pooler_fc_size": 768, "pooler_type": "first_token_transform",
    "transformers_version": "4.6.0.dev0", "use_cache": True,
}  # fmt: skip
OLD_BERT = {
    "finetuning_task": "sst-2", "id2label": None, "num_labels": 2, "output_past": True,
    "pruned_heads": {}, "torchscript": False, "use_bfloat16": False, "is_decoder": False,
    "length_penalty": 1.0, "max_length": 20, "eos_token_ids": None, "do_sample": False,
}  # fmt: skip
LLAMA = {
    "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "max_sequence_length": 2048,
}  # fmt: skip
LLAMA_3 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "mlp_bias": False,
    "eos_token_id": [1, 60, 61], "rope_theta": 500000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "pretraining_tp": 1,
    "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"},
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
MISTRAL = {"rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16"}
QWEN = {
    "attention_dropout": 0.0, "max_window_layers": 24, "rope_theta": 1000000.0,
    "sliding_window": 32768, "use_mrope": False, "use_sliding_window": False,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "max_position_embeddings": 32768,
}  # fmt: skip
LOUD = {"output_attentions": True, "output_hidden_states": True}
OPT_350M = {
    "_name_or_path": "opt-350m", "_remove_final_layer_norm": False, "do_layer_norm_before": False,
    "word_embed_proj_dim": 16, "layerdrop": 0.0, "prefix": "</s>", "torch_dtype": "float16",
    "init_std": 0.02, "activation_dropout": 0.0,
}  # fmt: skip
GPT2 = {
    "n_ctx": 48, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "_num_labels": 1,
}  # fmt: skip
IMAGENET = {  # two of its classes have one name
    "encoder_stride": 16, "qkv_bias": True, "torch_dtype": "float32",
    "id2label": {"0": "tench, Tinca tinca", "1": "crane", "2": "crane"},
    "label2id": {"tench, Tinca tinca": 0, "crane": 2},
}  # fmt: skip
CHAT = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1, "pad_token_id": 0}


def with_positions(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}embeddings.position_ids": torch.arange(48)[None]}


def rotary() -> dict[str, Tensor]:
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}


def triangles() -> dict[str, Tensor]:
    ones = torch.ones(48, 48, dtype=torch.uint8).tril()[None, None]
    masks = {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    return {f"h.{i}.attn.bias": ones.clone() for i in range(3)} | masks


#: Layout, what the config says, what generation_config.json says, tensors beside, the start of
#: names that the weights lack.
MODELS: dict[str, tuple[str, dict[str, Any], Any, dict[str, Tensor], str]] = {
    "finbert": ("bert", BERT | {"id2label": {"0": "neg", "1": "pos"}, "label2id": None}, None,
                with_positions("bert."), ""),
    "bert-sst-2": ("bert", BERT | OLD_BERT, None, with_positions("bert."), ""),
    "numbers": ("bert", {"id2label": {"0": 0, "1": 1}, "label2id": {"0": 0, "1": 1},
                         "problem_type": None}, None, {}, ""),
    "strings": ("roberta", {"id2label": {"0": "normal", "1": "nsfw"},
                            "label2id": {"normal": "0", "nsfw": "1"}}, None,
                with_positions("roberta.") | {"roberta.pooler.dense.bias": torch.ones(32)}, ""),
    "regression": ("bert", {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
                            "sbert_ce_default_activation_function": "torch.nn.Identity"},
                   None, {}, ""),
    "outputs": ("bert", BERT | LOUD, None, {}, ""),
    "llama-2": ("llama", LLAMA, CHAT | {"eos_token_id": 2, "max_length": 4096}, rotary(), ""),
    "llama-1": ("llama", LLAMA | {"pad_token_id": -1},
                {"_from_model_config": True, "pad_token_id": -1}, rotary(), ""),
    "llama-3.2": ("llama_gqa", LLAMA_3, CHAT | {"eos_token_id": [1, 60, 61]}, {}, ""),
    "mistral-0.1": ("mistral", MISTRAL, {"_from_model_config": True}, {}, ""),
    "mistral-0.3": ("mistral", MISTRAL | {"sliding_window": None, "head_dim": 8}, None, {}, ""),
    "qwen2.5": ("qwen2", QWEN, CHAT | {"eos_token_id": [1, 2], "top_k": 20}, {}, ""),
    "qwen3": ("qwen3", QWEN | {"sliding_window": None, "rope_scaling": None}, CHAT, {}, ""),
    "opt-350m": ("opt", OPT_350M, {"forced_eos_token_id": [1, 2]},
                 {"decoder.version": torch.ones(1)}, "model."),
    "distilgpt2": ("gpt2", GPT2, None, triangles(), "transformer."),
    "vit": ("vit", IMAGENET, None, {"vit.pooler.dense.bias": torch.ones(32)}, ""),
}  # fmt: skip
WIDTH = {"opt-350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False}}
OUTPUTS = {"vit": {"num_labels": 3}, "regression": {"num_labels": 1}}
TIED = ("llama-3.2", "qwen2.5", "qwen3", "opt-350m", "distilgpt2")


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    layout, says, generation, beside, lacks = MODELS[name]
    tied = {"tie_word_embeddings": True} if name in TIED else {}
    folder = folder_of(layout, tmp_path, **WIDTH.get(name, {}), **OUTPUTS.get(name, {}), **tied)
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "rope_parameters", "id2label", "label2id", "layer_types"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | says))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    dtype = getattr(torch, says.get("torch_dtype", "float32"))
    weights = {
        key.removeprefix(lacks): tensor.to(dtype)
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights | beside, folder / "model.safetensors", {"format": "pt"})
    checkpoint.save(tmp_path / "m.pth", import_model(folder, name))
    made = checkpoint.load(tmp_path / "m.pth")
    assert "unused" not in made.info
    own = getattr(transformers, tiny.LAYOUTS[layout][1]).from_pretrained(
        folder, dtype=torch.float32
    )
    batch = tiny.inputs(made, samples=1)
    with torch.no_grad():
        found = made.model(**batch)
        torch.testing.assert_close(found.logits, own(**batch).logits)
    assert "attentions" not in found
    export.write(made, tmp_path / "m.pth", tmp_path / "back")
