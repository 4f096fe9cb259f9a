"""Exported folders: transformers' own classes compute from them what the composed model does."""

import copy
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from composable.errors import MismatchError
from composable.families import Module
from composable.models import export
from composable.models.checkpoint import Checkpoint
from composable.models.structure import Edit, ordered
from composable.models.surgery import apply_structure
from tests import tiny

#: A module and its number among those of its kind -> ids of the units that stay; None: all.
Choice = Callable[[Module, int], tuple[int, ...] | None]
ALL = [*tiny.ALL]
NO_HEADS = ("bert", "roberta", "electra", "distilbert", "opt", "gpt2")


def composed(layout: str, choice: Choice, gone: tuple[str, ...] = (), **changes: Any) -> Checkpoint:
    """A tiny model that has lost units of its modules, and whole layers."""
    made = tiny.dense(layout, **changes)
    edits = [Edit(name, "remove") for name in gone]
    counts = {"attention": 0, "ffn": 0}
    for module in made.family.modules(made.model):
        if module.kind in counts and not module.name.startswith(tuple(f"{it}." for it in gone)):
            kept = choice(module, counts[module.kind])
            counts[module.kind] += 1
            if kept is not None:
                edits.append(Edit(module.name, "keep" if kept else "remove", kept))
    made.structure = ordered(edits)
    apply_structure(made.model, made.family, made.structure)
    return made


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def exported(made: Checkpoint, folder: Path, pad: bool = False) -> tuple[Any, float]:
    """Export, load with plain transformers, and return it and the relative error of its logits."""
    batch = tiny.inputs(made)
    expected = logits(made.model, batch)
    export.write(copy.deepcopy(made), Path("m.pth"), folder, pad)
    auto = getattr(transformers, made.config["architectures"][0])
    again, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    off = (logits(again.eval(), batch) - expected).abs().max() / expected.abs().max()
    return again, float(off)


def half_of_heads(module: Module) -> tuple[int, ...]:
    """The same number of query heads of every key/value head."""
    per_group = module.units // module.groups
    if per_group == 1:
        return tuple(range(1, module.units, 2))
    return tuple(head for head in range(module.units) if head % per_group < per_group // 2)


@pytest.mark.parametrize("layout", ALL)
def test_equal_sizes_are_sizes_of_the_config(layout: str, tmp_path: Path) -> None:
    def choice(module: Module, number: int) -> tuple[int, ...] | None:
        if module.kind == "ffn":
            return tuple(range(number, number + 40))
        return None if layout in NO_HEADS else half_of_heads(module)

    made = composed(layout, choice)
    again, off = exported(made, tmp_path / "folder")
    assert off < 1e-6
    assert sum(p.numel() for p in again.parameters()) == sum(
        p.numel() for p in made.model.parameters()
    ) - (0 if not layout.startswith("t5") else 2 * 32 * 2)  # the table loses what nobody reads


@pytest.mark.parametrize("layout", ALL)
def test_zeros_fill_up_what_is_narrower(layout: str, tmp_path: Path) -> None:
    """Unequal heads and neurons, other ids in every layer, an attention and an ffn are gone."""

    def choice(module: Module, number: int) -> tuple[int, ...] | None:
        if number == 1:
            return ()
        if module.kind == "ffn":
            return tuple(range(number, 30 - number))
        return half_of_heads(module) if number == 0 else None

    made = composed(layout, choice)
    with pytest.raises(MismatchError, match=r'm\.pth: ".*" has .* left; .*: .* fill up'):
        exported(made, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert list(tmp_path.iterdir()) == []
    _, off = exported(made, tmp_path / "folder", pad=True)
    assert off < 1e-6


def test_layers_go_with_heads_and_neurons(tmp_path: Path) -> None:
    for layout, gone in (("t5", "decoder.block.0"), ("llama_gqa", "model.layers.1")):
        made = composed(
            layout,
            lambda module, _: half_of_heads(module) if module.kind == "attention" else (3, 4, 9),
            (gone,),
        )
        again, off = exported(made, tmp_path / layout)
        assert off < 1e-6
        stack, number = "decoder", int(gone[-1])
        assert again.config.depth_pruning[stack]["removed"] == [number]
        ids = tiny.inputs(made)["input_ids"].clamp(min=3)
        settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        made.model.generation_config.update(pad_token_id=0)
        assert torch.equal(
            again.generate(ids, **settings), made.model.generate(ids, use_cache=False, **settings)
        )


def test_groups_of_queries_leave_as_a_whole(tmp_path: Path) -> None:
    """And in another layer one of every group: both get the larger number of each."""
    made = composed("llama_gqa", lambda module, _: (0, 1, 2, 3) if module.groups else None)
    again, off = exported(made, tmp_path / "equal")
    assert off < 1e-6
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (4, 1)
    mixed: Choice = lambda module, number: ((4, 5, 6, 7), (2, 5), None)[number]  # noqa: E731
    made = composed("llama_gqa", lambda m, n: mixed(m, n) if m.groups else None)
    _, off = exported(made, tmp_path / "mixed", pad=True)
    assert off < 1e-6
    made = composed("llama_gqa", lambda module, _: (2, 5) if module.groups else None)
    again, off = exported(made, tmp_path / "two")
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 2)
    assert off < 1e-6


def test_a_number_of_heads_that_a_config_refuses(tmp_path: Path) -> None:
    """Llama wants one that divides the hidden size; zeros make it so."""
    made = composed("llama", lambda module, _: (0, 1, 3) if module.groups else None)
    with pytest.raises(MismatchError, match="3 of 4 heads left; transformers builds Llama"):
        exported(made, tmp_path / "refused")
    again, off = exported(made, tmp_path / "folder", pad=True)
    assert again.config.num_attention_heads == 4
    assert off < 1e-6


@pytest.mark.parametrize(
    ("layout", "heads", "message"),
    [
        (
            "t5",
            ((0, 1), (0, 2)),
            "share their position biases: all have to keep the same heads, and",
        ),
        (
            "bert",
            ((0, 1), (0, 1)),
            "4 heads in every attention: their config cannot say other",
        ),
        ("qwen2", ((0, 2), None), "give all of them one rate that leaves a number"),
    ],
)
def test_what_could_be_done_instead(
    layout: str, heads: tuple[Any, Any], message: str, tmp_path: Path
) -> None:
    made = composed(
        layout, lambda module, number: heads[number % 2] if module.kind == "attention" else None
    )
    with pytest.raises(MismatchError, match=message):
        exported(made, tmp_path / "refused")


def chat_model() -> Checkpoint:
    """As chat models come: a temperature, and nothing that says that it is used."""
    made = tiny.dense("llama")
    made.model.generation_config = transformers.GenerationConfig(temperature=0.6, top_p=0.9)
    return made


def test_settings_of_generate_stay_as_they_came(tmp_path: Path) -> None:
    export.write(chat_model(), Path("m.pth"), tmp_path / "folder")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "folder")
    assert (again.temperature, again.top_p) == (0.6, 0.9)
    assert not again.do_sample
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folder")


def test_how_a_gguf_file_was_stored_is_left_out(tmp_path: Path) -> None:
    made = tiny.dense("llama")
    made.config["quantization_config"] = {"quant_method": "gguf"}
    export.write(made, Path("m.pth"), tmp_path / "folder")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("room", [100, 1500, 4000, 20000])
def test_a_full_disk(room: int, tmp_path: Path) -> None:
    """Wherever it gets full: config, weights (written by Rust), tokenizer (by Rust, too)."""
    made, limit = chat_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            export.write(made, Path("m.pth"), tmp_path / "folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
