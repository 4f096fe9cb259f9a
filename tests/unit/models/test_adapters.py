"""Adapters beside the weights of a model: merged as peft does, or refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from composable.errors import FormatError, UserError
from composable.models import checkpoint, hub
from composable.models.pretrained import import_model
from tests import tiny
from tests.unit.models.test_pretrained import folder_of

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def adapter_of(folder: Path, target: Path, auto_class: str, modules: list[str]) -> Path:
    """Save a LoRA adapter with random weights for the model of a folder."""
    torch.manual_seed(1)
    model = getattr(transformers, auto_class).from_pretrained(folder)
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=modules)
    adapted = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    adapted.save_pretrained(target)
    return target


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layout", "modules", "auto_class"),
    [
        ("llama_gqa", ["q_proj", "v_proj", "up_proj"], "AutoModelForCausalLM"),
        ("gpt2", ["c_attn", "c_fc"], "AutoModelForCausalLM"),
        ("bert", ["query", "dense"], "AutoModelForSequenceClassification"),
    ],
)
def test_an_adapter_is_merged(
    layout: str, modules: list[str], auto_class: str, tmp_path: Path
) -> None:
    folder = folder_of(layout, tmp_path / "hf")
    bare = import_model(folder, "x")
    adapter_of(folder, folder, auto_class, modules)
    assert hub.resolve_model(str(folder)) == (folder, None)
    checkpoint.save(tmp_path / "m.pth", import_model(folder, "x"))
    made = checkpoint.load(tmp_path / "m.pth")
    batch = tiny.inputs(made)
    own = getattr(transformers, auto_class).from_pretrained(folder)  # with the adapter in place
    assert any("lora_A" in name for name, _ in own.named_modules())
    torch.testing.assert_close(logits(made.model, batch), logits(own, batch), rtol=0, atol=2e-5)
    assert (logits(made.model, batch) - logits(bare.model, batch)).abs().max() > 1
    assert made.fingerprint != bare.fingerprint


def test_an_adapter_alone(tmp_path: Path) -> None:
    base = folder_of("llama", tmp_path / "base")
    alone = adapter_of(base, tmp_path / "alone", "AutoModelForCausalLM", ["q_proj"])
    assert not (alone / "config.json").exists()
    assert hub.resolve_model(str(alone)) == (alone, None)
    made = import_model(alone, "x")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    own = peft.PeftModel.from_pretrained(model, alone).merge_and_unload()
    batch = tiny.inputs(made)
    assert torch.equal(logits(made.model, batch), logits(own, batch))
    said = json.loads((alone / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = "someone/large"
    (alone / "adapter_config.json").write_text(json.dumps(said))
    for read in (hub.resolve_model, lambda name: import_model(Path(name), "x")):
        with pytest.raises(UserError, match="an adapter of 'someone/large' without its model; put"):
            read(str(alone))


def test_what_cannot_be_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama", tmp_path)
    adapter_of(folder, folder, "AutoModelForCausalLM", ["q_proj"])
    path = folder / "adapter_model.safetensors"
    sound = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in sound
    for changed in (
        {key: tensor for key, tensor in sound.items() if key != name},
        sound | {name.replace("layers.0", "layers.7"): sound[name].clone()},
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=r"its adapter and the model differ in base_model"):
            import_model(folder, "x")
    save_file(sound | {name: torch.zeros(2, 5)}, path)
    with pytest.raises(UserError, match=r"its adapter cannot be merged \(") as caught:
        import_model(folder, "x")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"cut off")
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: damaged or cut off"):
        import_model(folder, "x")
    path.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: is missing; the adapter"):
        import_model(folder, "x")
    save_file(sound, path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"holds an adapter; pip install -r requirements-lora"):
        import_model(folder, "x")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_shared_weight_is_not_changed_twice(module: str, tmp_path: Path) -> None:
    """peft adds to one use of it alone; where each use has its own weight, so do we."""
    folder = adapter_of(
        folder_of("llama_gqa", tmp_path / "a"), tmp_path / "a", "AutoModelForCausalLM", [module]
    )
    with pytest.raises(UserError, match=rf"its adapter changes \S*{module}, whose weight the mod"):
        import_model(folder, "x")
    folder = folder_of("llama_gqa", tmp_path / "b", tie_word_embeddings=False)
    adapter_of(folder, folder, "AutoModelForCausalLM", [module])
    made = import_model(folder, "x")
    own = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batch = tiny.inputs(made)
    torch.testing.assert_close(logits(made.model, batch), logits(own, batch), rtol=0, atol=2e-4)


def test_an_adapter_that_is_no_part_of_the_weights(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, settings).save_pretrained(folder)
    with pytest.raises(UserError, match=r"its adapter \(PROMPT_TUNING\) puts tokens before"):
        import_model(folder, "x")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json: an object was expected"):
        import_model(folder, "x")
