"""What a config.json may say: one line for each thing that cannot be built, before it is tried."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from composable.errors import UserError, as_user_error
from composable.models import checkpoint, export
from composable.models.pretrained import import_model
from tests import tiny
from tests.unit.models.test_pretrained import folder_of

ABSENT = object()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each of these models, which every test gives another config."""
    made = {}
    more: dict[str, Any] = {
        "bert": {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}},
        "llama": {"tie_word_embeddings": True},
    }
    for layout in ("bert", "gpt2", "llama", "qwen2", "vit"):
        folder = tmp_path_factory.mktemp(layout)
        made[layout] = folder_of(layout, folder, **more.get(layout, {}))
    made["t5"] = tmp_path_factory.mktemp("t5")
    tiny.t5().save_pretrained(made["t5"])
    tiny.tokenizer().save_pretrained(made["t5"])
    for folder in made.values():
        (folder / "config.json").rename(folder / "sound")
    return made


def refusal(folder: Path, **changes: Any) -> str:
    said = json.loads((folder / "sound").read_text()) | changes
    if "label2id" in changes:
        said["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    said = {key: value for key, value in said.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError) as caught:
        import_model(folder, "x")
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "FOLDER")


@pytest.mark.parametrize(
    ("layout", "key", "value", "said"),
    [
        ("bert", "dtype", "auto", "dtype is 'auto'; the name of a type such as \"float32\" was"),
        ("bert", "torch_dtype", 3, "torch_dtype is 3; the name of a type"),
        ("bert", "num_hidden_layers", "4", "num_hidden_layers is '4'; a number of layers"),
        ("bert", "num_hidden_layers", -1, "a number of layers from 1 to 10000 was"),
        ("bert", "num_hidden_layers", True, "num_hidden_layers is True; a number of layers"),
        ("bert", "num_hidden_layers", None, "'num_hidden_layers' expected int, got NoneType"),
        ("bert", "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000; a number of"),
        ("bert", "num_hidden_layers", 10**4, "num_hidden_layers is 10000, and the weights are 57"),
        ("t5", "num_decoder_layers", 10**4, "num_decoder_layers is 10000, and the weights are "),
        ("bert", "hidden_size", 32.0, "hidden_size is 32.0; a whole number from 1 to"),
        ("bert", "intermediate_size", 10**9, "a model of 195000017986 parameters, its weights"),
        ("gpt2", "n_positions", 10**12, "n_positions is 1000000000000; a whole number from 1 to"),
        ("bert", "num_attention_heads", 5, "not a multiple of the number of attention heads (5)"),
        ("llama", "num_attention_heads", 5, "not a multiple of the number of attention heads (5)"),
        ("llama", "num_key_value_heads", 3, "is of shape (32, 32), its config asks for (24"),
        ("bert", "vocab_size", 32, "is of shape (64, 32), its config asks for (32"),
        ("bert", "num_labels", 10**9, "num_labels is 1000000000; a whole number from 1 to 1000000"),
        ("bert", "pad_token_id", 9999, "Padding_idx must be within num_embeddings"),
        ("bert", "hidden_act", "foo", "(hidden_act 'foo' is not known)"),
        ("llama", "rope_parameters", {"rope_type": "foo"}, "(rope_type 'foo' is not known)"),
        ("llama", "rope_parameters", [1], "'rope_parameters' with value [1]"),
        ("llama", "mlp_bias", "yes", "'mlp_bias' expected bool, got str"),
        ("bert", "layer_norm_eps", "1e-5", "'layer_norm_eps' expected float, got str"),
        ("vit", "image_size", [8], "image_size is [8]; a whole number"),
        ("vit", "patch_size", 0, "patch_size is 0; a whole number from 1"),
        ("bert", "id2label", {"1": "a", "2": "b"}, "id2label is {'1': 'a', '2': 'b'}; an object"),
        ("bert", "id2label", ["a", "b"], "id2label is ['a', 'b']; an object with the name of"),
        ("bert", "id2label", {"0": "a", "1": None}, "a name for every output was expected"),
        ("bert", "label2id", {"LABEL_0": 1, "LABEL_1": 0}, "what id2label says of 'LABEL_0' was"),
        ("bert", "num_labels", 3, "num_labels is 3; 2, for so many names in id2label, was exp"),
        ("bert", "id2label", ABSENT, "label2id is {'neg': 1, 'pos': 0}; an id2label with the"),
        ("bert", "is_encoder_decoder", True, "is_encoder_decoder of its config is True, a BERT"),
        ("t5", "is_encoder_decoder", False, "is False, a T5 has encoder and decoder layers;"),
        ("bert", "attn_implementation", "flash_attention_2", "'flash_attention_2'; sdpa or eager"),
        ("llama", "tie_word_embeddings", ABSENT, "lack lm_head.weight; set tie_word_embeddings"),
        ("bert", "architectures", "X", "architectures is 'X'; a list with the name of a class"),
        ("bert", "architectures", [3], "architectures is [3]; a list with the name of a class"),
        ("bert", "model_type", 3, "model_type is 3; the name of a type was expected"),
        ("bert", "problem_type", 3, "problem_type is 3; one of regression, single_label"),
        ("t5", "decoder_start_token_id", ABSENT, "has no decoder_start_token_id, or not one below"),
        ("t5", "decoder_start_token_id", 64, "has no decoder_start_token_id, or not one below 64"),
        ("t5", "pad_token_id", None, "has no pad_token_id, or not one below"),
        ("t5", "task_specific_params", [1], "task_specific_params is [1]; an object was expected"),
        ("t5", "feed_forward_proj", "x-y-z", "x-y-z is not a valid activation function"),
        ("bert", "quantization_config", {"quant_method": "gptq"}, "quantised weights (gptq); "),
        ("bert", "quantization_config", [], "quantised weights (quantization_config); "),
        ("bert", "position_embedding_type", "relative_key", "'relative_key', which transformers"),
        ("bert", "position_embedding_type", "relative_key_query", "does not build here; give"),
        ("bert", "pruned_heads", {"0": [1]}, "pruned_heads is {'0': [1]}, which transformers"),
        ("bert", "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling is {'type'"),
        ("llama", "sliding_window", 8, "sliding_window is 8, which transformers"),
        ("llama", "is_causal", False, "is_causal is False, which transformers"),
        ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, which transformers"),
        ("llama", "return_dict", False, "return_dict is False; true was expected"),
        ("bert", "chunk_size_feed_forward", [1], "the model or its tokenizer does not work ("),
        ("bert", "initializer_range", -0.5, "cannot be kept (normal expects std >= 0.0, but"),
        ("qwen2", "layer_types", ["foo"] * 3, "`layer_types` entries must be in"),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 0.0}, "inv_freq holds"),
    ],
)  # fmt: skip
def test_one_line_each(
    layout: str, key: str, value: Any, said: str, folders: dict[str, Path]
) -> None:
    assert said in refusal(folders[layout], **{key: value})


def test_a_tokenizer_with_more_ids_than_rows(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path)
    tokenizer = tiny.tokenizer()
    known = len(tokenizer)
    tokenizer.add_tokens([f"w{i}" for i in range(64 - known)])  # ids up to 63, as there are rows
    tokenizer.save_pretrained(folder)
    assert import_model(folder, "x").info["task"] == "text_classification"
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="has ids up to 64, the model embeds 64 tokens; the token"):
        import_model(folder, "x")


def test_special_tokens_beyond_the_rows_are_left_out(tmp_path: Path) -> None:
    """The first release of Llama 2: 32,000 rows, and <pad> is token 32000."""
    folder = folder_of("gpt2", tmp_path / "hf")
    tokenizer = tiny.tokenizer()
    known = len(tokenizer)
    tokenizer.add_tokens([f"w{i}" for i in range(64 - known)])
    before = tokenizer("a man runs w3").input_ids
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    checkpoint.save(tmp_path / "m.pth", import_model(folder, "x"))
    made = checkpoint.load(tmp_path / "m.pth")
    assert max(made.tokenizer.get_vocab().values()) == 63
    assert made.tokenizer("a man runs w3").input_ids == before
    assert (made.tokenizer.pad_token, made.tokenizer.mask_token) == (None, None)
    assert made.tokenizer.eos_token == "</s>"
    assert max(made.tokenizer("a [PAD] man").input_ids) < 64
    export.write(made, tmp_path / "m.pth", tmp_path / "back")
    assert import_model(tmp_path / "back", "x").stored_tokenizer.keys()


def test_a_tokenizer_that_fails_when_it_is_used(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(UserError, match=r"the model or its tokenizer does not work \(") as caught:
        import_model(folder, "x")
    assert "\n" not in str(caught.value)


def test_a_model_that_computes_infinity(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"].fill_(3e38)  # finite itself
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the model computes NaN or infinity; a sound"):
        import_model(folder, "x")


def test_harmless_values_stay_allowed(folders: dict[str, Path]) -> None:
    folder = folders["bert"]
    said = json.loads((folder / "sound").read_text())
    more = {"position_embedding_type": "absolute", "pruned_heads": {}, "rope_scaling": None,
            "is_causal": False, "torch_dtype": "float16", "quantization_config": None,
            "problem_type": "single_label_classification", "pretraining_tp": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said | more))
    made = import_model(folder, "x")
    own = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    batch = tiny.inputs(made)
    with torch.no_grad():
        assert torch.equal(made.model(**batch).logits, own(**batch).logits)


def test_settings_of_generate_are_not_lost(tmp_path: Path) -> None:
    """transformers goes on without a file that it cannot read, and generates otherwise."""
    tiny.t5().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    sound = path.read_bytes()
    for content, said in (
        (b"\xef\xbb\xbf" + sound, "not a JSON file"),
        (sound[:-5], "not a JSON file"),
        (b"[1]", "an object was expected"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"generation_config\.json: {said}"):
            import_model(tmp_path, "x")
    for setting, said in (
        ({"forced_bos_token_id": 999}, "index 999 is out of bounds"),
        ({"repetition_penalty": 0}, "`penalty` has to be a strictly positive float"),
        ({"stop_strings": ["a"]}, "There are one or more stop strings"),
        ({"constraints": [1]}, "Constrained Beam Search requires"),
    ):
        path.write_text(json.dumps(json.loads(sound) | setting))
        with pytest.raises(UserError, match=rf"its settings of generate do not work \(.*{said}"):
            import_model(tmp_path, "x")
    path.unlink()
    assert import_model(tmp_path, "x").model.generation_config.pad_token_id == 0


def test_weights_by_other_names_are_named(tmp_path: Path) -> None:
    """As torch.compile and DistributedDataParallel save them."""
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack lm_head\.weight, .*, and hold _orig_mod\.lm_head\."):
        import_model(folder, "x")


def test_a_library_that_panics_is_one_line_too() -> None:
    """The Rust part of tokenizers raises what is no Exception."""
    panic = type("PanicException", (BaseException,), {})
    unreadable = as_user_error("x: unreadable")
    with pytest.raises(UserError, match=r"x: unreadable \(two lines\)\."), unreadable:
        raise panic("two\nlines.")
    with pytest.raises(KeyboardInterrupt), as_user_error("x: unreadable"):
        raise KeyboardInterrupt
