"""Files of llama.cpp: what is computed, what is not used, and damaged ones."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from composable.errors import UserError
from composable.models.pretrained import import_model

gguf = pytest.importorskip("gguf")

HIDDEN, INNER, TOKENS = 32, 48, 64


def write(path: Path, tensors: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A model of one layer with random weights, and a tokenizer of nearly no words.

    `settings` have names such as rope__scaling__type.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(48)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"w{i}" for i in range(TOKENS - 5))])
    writer.add_token_merges(["a b"])
    for name, value in settings.items():
        key = f"llama.{name.replace('__', '.')}"
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    draw = np.random.default_rng(0).standard_normal
    shapes = {
        "token_embd": (TOKENS, HIDDEN), "output_norm": (HIDDEN,), "output": (TOKENS, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (16, HIDDEN),
        "blk.0.attn_v": (16, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    made = {f"{name}.weight": draw(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in (made | (tensors or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_computes_what_transformers_makes_of_it(tmp_path: Path) -> None:
    harmless: dict[str, Any] = {"rope__scaling__type": "none", "attention__key_length": 8}
    made = import_model(write(tmp_path / "m.gguf", **harmless), "m.gguf")
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, own(ids).logits)
    assert "unused" not in made.info


@pytest.mark.parametrize(
    ("tensors", "settings", "unused"),
    [
        (["blk.0.attn_q.bias"], {}, ["blk.0.attn_q.bias"]),
        (["rope_freqs.weight"], {}, ["rope_freqs.weight"]),
        (["blk.7.ffn_up.weight"], {}, ["blk.7.ffn_up.weight"]),
        ([], {"rope__scaling__type": "linear"}, ["llama.rope.scaling.type"]),
        ([], {"attention__sliding_window": 8}, ["llama.attention.sliding_window"]),
    ],
)
def test_what_transformers_leaves_out(
    tensors: list[str], settings: Any, unused: list[str], tmp_path: Path
) -> None:
    more = dict.fromkeys(tensors, np.ones(HIDDEN, np.float32))
    path = write(tmp_path / "m.gguf", more, **settings)
    with pytest.raises(UserError, match=rf"m\.gguf: .* does not use {unused[0]}, so"):
        import_model(path, "m.gguf")
    assert import_model(path, "m.gguf", ignore_unused=True).info["unused"] == unused


@pytest.mark.parametrize("spoil", ["cut", "array", "nested", "string", "count", "layers", "name"])
def test_damaged_files(spoil: str, tmp_path: Path) -> None:
    """The library's reader would go on for ever behind the end of the file."""
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes()
    start = content[:24]
    key = struct.pack("<Q", 1) + b"a"
    huge = struct.pack("<Q", 2**60)
    spoilt = {
        "cut": content[: len(content) // 2],
        "array": start[:16] + struct.pack("<Q", 1) + key + struct.pack("<II", 9, 4) + huge,
        "nested": start[:16] + struct.pack("<Q", 1) + key + struct.pack("<IIQ", 9, 9, 1) * 1100,
        "string": start[:16] + struct.pack("<Q", 1) + key + struct.pack("<I", 8) + huge,
        "count": start[:8] + huge + content[16:],
        "layers": content.replace(
            b"block_count" + struct.pack("<II", 4, 1), b"block_count" + struct.pack("<II", 4, 10**9)
        ),
        "name": content.replace(b"blk.0.attn_q", b"blk.0.attn\xff\xff"),
    }[spoil]
    path.write_bytes(spoilt)
    with pytest.raises(UserError, match=r"m\.gguf: ") as caught:
        import_model(path, "m.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_is_read_once_and_the_library_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_gguf_pytorch_utils as reading

    path, opened = write(tmp_path / "model.gguf"), []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: Any, *args: Any) -> None:
            opened.append(path)
            super().__init__(path, *args)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    before = gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm
    import_model(path, "x")
    assert opened == [path]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm) == before
