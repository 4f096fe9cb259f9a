"""Depth pruning from Python: analysis, cuts, and plain folders."""

import copy
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload

from composable import depth, families
from composable.errors import ConfigError, UserError
from composable.models import export, in_memory
from composable.tasks.samples import pad_texts
from tests import tiny
from tests.paths import ROOT

SENTENCES = ["the man runs", "a dog in the street .", "the red house", "a woman plays with a cat"]

PLAIN = [layout for layout in tiny.ALL if layout != "t5_gated"]


def plain(layout: str, **changes: Any) -> Any:
    """A model as transformers has it."""
    return tiny.t5(**changes) if layout == "t5" else tiny.build(layout, **changes)


def test_a_stream_is_read_to_its_limit_and_no_further() -> None:
    taken = []

    def stream() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield {"content": SENTENCES[number % 4]}

    model, tokenizer = plain("llama"), tiny.tokenizer()
    scores = depth.analyse(model, stream(), tokenizer, key="content", limit=6, batch_size=4)
    assert len(taken) == 6
    assert scores.blocks().samples == 6
    texts = [SENTENCES[i % 4] for i in range(6)]
    other = depth.analyse(model, texts, tokenizer)
    np.testing.assert_allclose(other.blocks().values, scores.blocks().values, atol=1e-6)
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    for is_left in (True, False):
        third = depth.analyse(model, [pad_texts(rows, 0, is_left)])
        np.testing.assert_allclose(third.blocks().values, scores.blocks().values, atol=1e-5)


def test_samples_of_a_tokenised_dataset() -> None:
    """As `datasets` gives them with set_format("torch"): without a batch dimension."""
    model, tokenizer = plain("llama"), tiny.tokenizer()
    rows = [{"input_ids": torch.tensor(tokenizer(text)["input_ids"])} for text in SENTENCES]
    scores = depth.analyse(model, rows, distances="bi_score")
    other = depth.analyse(model, SENTENCES, tokenizer, distances=["bi_score"])
    np.testing.assert_allclose(scores.blocks().values, other.blocks().values, atol=1e-6)


def test_texts_are_cut_at_their_length() -> None:
    model, tokenizer = plain("opt"), tiny.tokenizer()
    long = " ".join(SENTENCES * 20)
    a = depth.analyse(model, [long], tokenizer)  # 48 positions, so no more tokens
    b = depth.analyse(model, [" ".join(long.split()[:200])], tokenizer, max_length=48)
    np.testing.assert_array_equal(a.blocks().values, b.blocks().values)
    c = depth.analyse(model, [long], tokenizer, max_length=4)
    assert abs(a.blocks().values[0, 0] - c.blocks().values[0, 0]) > 1e-6


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "the calibration set is empty"),
        ([{"content": "a"}], {}, r'no text under the key "text" \(it has content\)'),
        ([{"text": 3}], {}, 'no text under the key "text"'),
        ([3], {}, r"no text .* \(it has int\)"),
        (["a"], {"distances": ["nearness"]}, 'unknown distance "nearness"'),
        (["a dog", ""], {}, "calibration set: text 2: the text has no token"),
        (["a"], {"limit": -1}, "limit is -1; expected a number from 1"),
        (["a"], {"batch_size": 0}, "batch_size is 0; expected"),
        (["a"], {"max_length": 0}, "max_length is 0; expected"),
        (["a"], {"distances": ()}, "no distance was asked for"),
        ("a dog", {}, "the calibration set is one text; expected an iterable"),
        ({"train": ["a"]}, {}, "the calibration set is a dict, perhaps of splits"),
    ],
)
def test_bad_calibration_sets(dataset: Any, options: Any, message: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # so that nothing is nothing
    with pytest.raises(UserError, match=message):
        depth.analyse(plain("llama"), dataset, tokenizer, **options)
    with pytest.raises(UserError, match="no batches of tensors; give a tokenizer"):
        depth.analyse(plain("llama"), ["a"])


def test_a_model_is_analysed_where_it_is() -> None:
    """Its weights are on another device than it computes on, and fetched layer by layer."""
    model, tokenizer = plain("llama_gqa"), tiny.tokenizer()
    scores = depth.analyse(model, SENTENCES, tokenizer)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    again = depth.analyse(model, SENTENCES, tokenizer)
    np.testing.assert_array_equal(again.blocks().values, scores.blocks().values)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_model_of_several_devices(tmp_path: Path) -> None:
    model, tokenizer = plain("llama", num_hidden_layers=4), tiny.tokenizer()
    scores = depth.analyse(model, SENTENCES, tokenizer)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.rotary_emb": "cpu"}  # fmt: skip
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    parted = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert {p.device.type for p in parted.parameters()} == {"cpu", "meta"}
    again = depth.analyse(parted, SENTENCES, tokenizer)
    np.testing.assert_array_equal(again.blocks().values, scores.blocks().values)
    assert again.origin.fingerprint == scores.origin.fingerprint  # type: ignore[union-attr]
    batch = tiny.inputs(tiny.dense("llama"))
    wanted = outputs(depth.cut(model, [2]), batch)
    torch.testing.assert_close(outputs(depth.cut(parted, [2]), batch), wanted)


@pytest.mark.parametrize("layout", PLAIN)
def test_scores_are_of_the_model_file(layout: str, tmp_path: Path) -> None:
    """The fingerprint is that of the file, wherever the weights are; the model stays as it is."""
    model, made = plain(layout), tiny.dense(layout)
    names = set(model.state_dict())
    batch = {k: v for k, v in tiny.inputs(made).items() if k != "decoder_input_ids"}
    origin = depth.analyse(model, [batch]).origin
    assert origin is not None
    assert (origin.fingerprint, set(model.state_dict())) == (made.fingerprint, names)
    assert [(m.name, m.kind, m.units) for m in origin.modules if m.kind != "linear"] == [
        (m.name, m.kind, 1 if m.kind == "layer" else m.units)
        for m in made.family.modules(made.model) if m.kind != "linear"
    ]  # fmt: skip
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert in_memory.describe(model).fingerprint == made.fingerprint
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with torch.no_grad():
        made.model.get_parameter(next(iter(dict(made.model.named_parameters())))).view(-1)[0] += 1
    assert in_memory.describe(made.model).fingerprint != made.fingerprint


def test_training_mode_is_put_back() -> None:
    model, tokenizer = plain("opt"), tiny.tokenizer()
    scores = depth.analyse(model, SENTENCES, tokenizer)
    model.train()
    again = depth.analyse(model, SENTENCES, tokenizer)
    assert model.training
    np.testing.assert_array_equal(again.blocks().values, scores.blocks().values)


def test_the_steps_of_the_original() -> None:
    model, tokenizer = plain("llama", num_hidden_layers=5), tiny.tokenizer()
    scores = depth.analyse(model, SENTENCES, tokenizer, distances=("bi_score", "angular_last"))
    values = scores.blocks().values
    first = int(np.nanargmin(values[1]))
    assert depth.best_cut(scores, 2) == [first, first + 1]
    table = depth.block_table(scores)
    assert f"| 2 | {first}-{first + 1} | {values[1, first]:.3f} |" in table
    assert len(depth.block_table(scores, threshold=-1.0).splitlines()) == 2
    assert depth.best_cut(scores, 1, distance="angular_last") == [
        int(np.nanargmin(scores.blocks(None, "angular_last").values[0]))
    ]
    assert depth.cut(model, depth.best_cut(scores, 2)) is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 3


def outputs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("layout", PLAIN)
def test_a_cut_model_is_a_plain_folder(layout: str, tmp_path: Path) -> None:
    model = plain(layout)
    family = families.of(model)
    batch = tiny.inputs(tiny.dense(layout))
    expected = copy.deepcopy(model)
    stack = family.stacks[-1]
    path = next(
        name for name, m in model.named_modules()
        if isinstance(m, torch.nn.ModuleList) and family.place(f"{name}.0")
        and family.place(f"{name}.0")[0] == stack
    )  # fmt: skip
    hook = expected.get_submodule(f"{path}.1").register_forward_hook(
        lambda m, args, out: args[0] if isinstance(out, torch.Tensor) else (args[0], *out[1:])
    )
    wanted = outputs(expected, batch)
    hook.remove()
    before = sum(p.numel() for p in model.parameters())
    gone = sum(p.numel() for p in model.get_submodule(f"{path}.1").parameters())
    depth.cut(model, [1], stack)
    torch.testing.assert_close(outputs(model, batch), wanted, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == before - gone
    export.save(model, tmp_path / "folder")
    again = type(model).from_pretrained(tmp_path / "folder").eval()
    torch.testing.assert_close(outputs(again, batch), wanted, rtol=0, atol=1e-5)
    left = [i for i in range(len(expected.get_submodule(path))) if i != 1]
    assert again.config.depth_pruning == {stack: {"removed": [1], "kept": left}}
    auto = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert auto.architectures == [type(model).__name__]
    if hasattr(again, "generate") and again.can_generate():
        ids = batch["input_ids"].clamp(min=3)
        settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        for one in (model if layout != "gpt2" else again, again):
            cached = one.generate(ids, use_cache=True, **settings)
            assert torch.equal(cached, one.generate(ids, use_cache=False, **settings))


def test_layers_divided_by_their_number(tmp_path: Path) -> None:
    """GPT-2 may divide the scores of layer i by i + 1, by the number that it was made with."""
    model = plain("gpt2", scale_attn_by_inverse_layer_idx=True, num_hidden_layers=4)
    batch = tiny.inputs(tiny.dense("gpt2"))
    depth.cut(model, [0, 2])
    wanted = outputs(model, batch)
    export.save(model, tmp_path / "folder")
    torch.testing.assert_close(outputs(model, batch), wanted, rtol=0, atol=1e-5)
    again = type(model).from_pretrained(tmp_path / "folder").eval()
    torch.testing.assert_close(outputs(again, batch), wanted, rtol=0, atol=1e-5)


def test_a_second_cut_counts_in_the_original() -> None:
    model = plain("qwen2", num_hidden_layers=6)
    depth.cut(model, [1, 3])
    assert len(model.config.layer_types) == 4
    depth.cut(model, [1])
    assert model.config.depth_pruning == {"decoder": {"removed": [1, 2, 3], "kept": [0, 4, 5]}}
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_why_layers_went_is_kept() -> None:
    model, tokenizer = plain("llama", num_hidden_layers=5), tiny.tokenizer()
    scores = depth.analyse(model, SENTENCES, tokenizer, distances="bi_score")
    layers = depth.best_cut(scores, 2)
    depth.cut(model, layers, scores=scores)
    record = model.config.depth_pruning["decoder"]
    assert record["distance"] == "bi_score"
    assert record["score"] == scores.blocks().values[1, layers[0]]
    assert record["removed"] == layers
    singles = depth.best_cut(scores, 2, policy="singles", protected=[0])
    assert 0 not in singles
    assert len(singles) == 2


def test_every_changed_value_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = plain("qwen2")
    with caplog.at_level(logging.INFO, "composable"):
        depth.cut(model, [0])
    said = "\n".join(caplog.messages)
    assert "config: num_hidden_layers was 3, is 2" in said
    assert (
        "config: layer_types was ['full_attention', 'full_attention', 'full_attention'], is" in said
    )
    assert "config: depth_pruning was None, is {'decoder'" in said
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(
    ("layout", "layers", "stack", "error", "message"),
    [
        ("llama", [3], None, ConfigError, r"layers \[3\] of the decoder: it has 0 to 2"),
        ("llama", [-1], None, ConfigError, r"layers \[-1\] of the decoder"),
        ("llama", [0, 1, 2], None, ConfigError, "all 3 decoder layers would go"),
        ("llama", [0], "encoder", UserError, "the model has no encoder; it has decoder"),
        ("t5", [0], None, UserError, "the model has encoder and decoder; say which stack"),
    ],
)
def test_impossible_cuts(
    layout: str, layers: list[int], stack: str | None, error: Any, message: str
) -> None:
    model = plain(layout)
    with pytest.raises(error, match=message):
        depth.cut(model, layers, stack)
    assert len(list(model.named_parameters())) == len(list(plain(layout).named_parameters()))


def test_lists_by_layer_that_no_table_knows() -> None:
    model = plain("llama")
    model.config.no_rope_layers = [1, 1, 0]
    with pytest.raises(UserError, match="the config's no_rope_layers has an entry for each layer"):
        depth.cut(model, [0])


def run_example(name: str, *args: Any) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, args)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "| Block size | Removed layers | Score (avg dist) |" in ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.nightly  # half a minute, in processes of their own
def test_the_examples_run(tmp_path: Path) -> None:
    plain("qwen2", num_hidden_layers=5).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n\n".join(SENTENCES))
    where = (tmp_path / "model", tmp_path / "texts.txt")
    report = run_example("depth_basic.py", *where, "-n", 2, "-o", tmp_path / "basic")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "basic")
    assert config.num_hidden_layers == 3
    assert config.depth_pruning["decoder"]["removed"] == report["removed"]
    report = run_example("depth_in_steps.py", *where, "-n", 1, 2, "-o", tmp_path / "steps")
    assert [path.name for path in sorted((tmp_path / "steps").iterdir())] == [
        "scores.npz", "scores.png", "without_1", "without_2",
    ]  # fmt: skip
    for count, removed in report["removed"].items():
        folder = tmp_path / "steps" / f"without_{count}"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.depth_pruning["decoder"]["removed"] == removed
        assert len(model.model.layers) == 5 - int(count)


def test_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="full: exists already; name a folder that does not"):
        export.save(plain("llama"), tmp_path / "full")
    (tmp_path / "empty").mkdir()
    export.save(plain("llama"), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
