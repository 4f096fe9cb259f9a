"""Weights that a model does not use, quantised weights, and files that lie about what they hold."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from composable.errors import FormatError, UserError
from composable.models import hub
from composable.models.pretrained import import_model
from tests import tiny
from tests.unit.models.test_checkpoint import folder_of as t5_folder
from tests.unit.models.test_pretrained import folder_of


def change(folder: Path, more: dict[str, Any] | None = None, **config: Any) -> Path:
    """Add tensors to a folder's weights, and settings to its config."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    tensors = load_file(folder / "model.safetensors") | (more or {})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(made: Any, folder: Path, auto_class: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What our model computes, and transformers' own of the same folder."""
    own = getattr(transformers, auto_class).from_pretrained(folder).eval()
    batch = tiny.inputs(made)
    with torch.no_grad():
        return made.model(**batch).logits, own(**batch).logits


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    folder = change(folder_of("llama", tmp_path, attention_bias=True), attention_bias=False)
    with pytest.raises(
        UserError, match=r"does not use model\.layers\.0\.self_attn\.k_proj\.bias.* and 9 more, so"
    ):
        import_model(folder, "x")
    made = import_model(folder, "x", ignore_unused=True)
    assert len(made.info["unused"]) == 12  # q, k, v and o of three layers
    found, own = logits(made, folder, "AutoModelForCausalLM")
    assert torch.equal(found, own)
    change(folder, attention_bias=True)
    whole = import_model(folder, "x")
    assert "unused" not in whole.info
    found, own = logits(whole, folder, "AutoModelForCausalLM")
    assert torch.equal(found, own)
    assert not torch.allclose(found, made.model(**tiny.inputs(made)).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("layout", "name", "config"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.distance_embedding.weight", {}),
        ("bert", "bert.embeddings.extra", {}),
        ("bert", "classifier.dense.weight", {}),  # of its own head
        ("gpt2", "lm_head.bias", {}),
        ("gpt2", "transformer.h.7.attn.c_attn.bias", {}),  # fits a pattern of what is not reported
        ("llama", "layers.0.mlp.up_proj.weight", {}),  # under its other name it is there, too
        ("llama", "model.layers.2.mlp.up_proj.weight", {"num_hidden_layers": 2}),
        ("vit", "vit.layers.9.mlp.fc1.bias", {}),
    ],
)
def test_weights_of_the_trunk_are_used(layout: str, name: str, config: Any, tmp_path: Path) -> None:
    folder = folder_of(layout, tmp_path)
    more = {} if config else {name: torch.ones((48, 32) if "up_proj" in name else 3)}
    with pytest.raises(UserError, match="does not use ") as caught:
        import_model(change(folder, more, **config), "x")
    unused = import_model(folder, "x", ignore_unused=True).info["unused"]
    assert name in unused
    assert unused[0] in str(caught.value)


def test_leftovers_and_heads_of_other_tasks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What checkpoints of older versions hold, and what pretraining leaves."""
    many, one = torch.ones(1, 1, 48, 48, dtype=torch.uint8), torch.ones(1)
    cases = {
        "bert": {"bert.embeddings.position_ids": torch.arange(48)[None]},
        "distilbert": {"distilbert.embeddings.position_ids": torch.arange(48)[None]},
        "gpt2": {"transformer.h.0.attn.bias": many, "transformer.h.0.attn.masked_bias": one},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "vit": {"vit.embeddings.mask_token": torch.ones(1, 1, 32)},
    }  # fmt: skip
    for layout, more in cases.items():
        made = import_model(change(folder_of(layout, tmp_path / layout), more), "x")
        assert "unused" not in made.info
    assert "not used" not in caplog.text
    with caplog.at_level("INFO", "composable"):
        folder = change(tmp_path / "bert", {"cls.predictions.bias": torch.ones(64)})
        made = import_model(folder, "x")
    assert "not used, of heads for other tasks: cls.predictions.bias" in caplog.text
    assert "unused" not in made.info


def test_the_position_bias_that_old_t5_checkpoints_have_in_vain(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path / "t5")
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert "unused" not in import_model(change(folder, {name: torch.ones(8, 4)}), "x").info
    other = {name.replace("block.0", "block.1"): torch.ones(8, 4)}
    with pytest.raises(UserError, match=r"does not use decoder\.block\.1\..*_bias\.weight, so"):
        import_model(change(folder, other), "x")


def test_a_checkpoint_without_names_of_a_trunk(tmp_path: Path) -> None:
    """A head is known by its name there; what is not is taken for a part of the model."""
    folder = folder_of("bert", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    bare["cls.predictions.bias"] = torch.ones(64)
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    found, own = logits(import_model(folder, "x"), folder, "AutoModelForSequenceClassification")
    assert torch.equal(found, own)
    with pytest.raises(UserError, match=r"does not use embeddings_project\.weight, so"):
        import_model(change(folder, {"embeddings_project.weight": torch.ones(3)}), "x")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)}, "I8"),
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).to(torch.float8_e4m3fn)}, "F8"),
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, "weight_scale_inv"),
        ({"model.layers.0.mlp.up_proj.SCB": torch.ones(48)}, "SCB"),
        ({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)}, "qweight"),
    ],
)
def test_codes_are_not_taken_for_weights(more: Any, said: str, tmp_path: Path) -> None:
    folder = change(folder_of("llama", tmp_path), more)
    with pytest.raises(UserError, match=rf"its weights are quantised \(.*{said}.*not quantised"):
        import_model(folder, "x", ignore_unused=True)


def header(value: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
        header({"a": tensor([-2], 0, 8)}, bytes(8)),
        header({"a": tensor([2**62, 4], 0, 8)}, bytes(8)),
        header({"a": tensor([2], 0, 2**40)}, bytes(8)),
        header({"a": tensor([2], 8, 0)}, bytes(8)),
        header(b"[" * 100_000),
        header({"a": {"dtype": "F32"}}),
        header({"a": [1]}),
    ],
)
def test_crafted_headers(content: bytes, tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    for read in (lambda: hub.resolve_model(str(folder)), lambda: import_model(folder, "x")):
        with pytest.raises(FormatError, match=r"model\.safetensors: damaged or cut off") as caught:
            read()
        assert "\n" not in str(caught.value)


def split(folder: Path, names: list[str]) -> list[dict[str, torch.Tensor]]:
    """Divide a folder's weights into two files, and write their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = sorted(tensors)[: len(tensors) // 2]
    parts = [{n: tensors[n] for n in half}, {n: tensors[n] for n in tensors if n not in half}]
    places = {n: file for file, part in zip(names, parts, strict=True) for n in part}
    for file, part in zip(names, parts, strict=True):
        save_file(part, folder / Path(file).name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parts


def test_shards_are_called_as_the_index_says(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path)
    whole = import_model(folder, "x").fingerprint
    first, second = split(folder, ["weights-a.safetensors", "rest [2].safetensors"])
    assert import_model(folder, "x").fingerprint == whole
    save_file({**second, **dict(list(first.items())[:1])}, folder / "rest [2].safetensors")
    with pytest.raises(FormatError, match="as another file does"):
        import_model(folder, "x")


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = folder_of("bert", tmp_path / "a" / "b")
    split(folder, ["one.safetensors", "../two.safetensors"])
    with pytest.raises(FormatError, match=r"names the file '\.\./two\.safetensors'; the name of a"):
        hub.resolve_model(str(folder))
