"""Families: what they list in a model, and that its modules can be run by themselves."""

from typing import Any

import pytest
import torch
from torch import nn

from composable import families
from composable.calibration.recorded_calls import mean_error, record_calls
from composable.calibration.second_moments import InputMoments, shared_inputs, stacks_of
from composable.errors import UserError
from composable.families import Module
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models.surgery import own_tensors
from composable.variants.distillation import Distillation
from composable.variants.students import Student
from tests import tiny

FIRST = {
    "bert": (
        "bert.encoder.layer.0", "attention", "attention.output.dense", "ffn", "intermediate.dense",
        "output.dense",
    ),
    "roberta": (
        "roberta.encoder.layer.0", "attention", "attention.output.dense", "ffn",
        "intermediate.dense", "output.dense",
    ),
    "distilbert": (
        "distilbert.transformer.layer.0", "attention", "attention.out_lin", "ffn", "ffn.lin1",
        "ffn.lin2",
    ),
    "opt": ("model.decoder.layers.0", "self_attn", "self_attn.out_proj", "ffn", "fc1", "fc2"),
    "gpt2": ("transformer.h.0", "attn", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.c_proj"),
    "llama": (
        "model.layers.0", "self_attn", "self_attn.o_proj", "mlp", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    ),
    "vit": ("vit.layers.0", "attention", "attention.o_proj", "mlp", "mlp.fc1", "mlp.fc2"),
    "deit": ("deit.layers.0", "attention", "attention.o_proj", "mlp", "mlp.fc1", "mlp.fc2"),
}  # fmt: skip


@pytest.mark.parametrize("layout", FIRST)
def test_the_modules_of_the_first_layer(layout: str) -> None:
    made = tiny.dense(layout)
    layer, *inner = FIRST[layout]
    found = [m for m in made.family.modules(made.model) if f"{m.name}.".startswith(f"{layer}.")]
    assert [m.name for m in found] == [layer, *(f"{layer}.{name}" for name in inner)]
    kinds = ["layer", "attention", "linear", "ffn", *["linear"] * (len(inner) - 3)]
    assert [m.kind for m in found] == kinds
    attention, ffn = found[1], found[3]
    assert (attention.units, attention.head_size, attention.groups) == (4, 8, 4)
    assert ffn.units == 48
    for module in found:
        for path in (module.holder, *(f"{module.holder}.{child}" for _, child in module.parts)):
            assert isinstance(made.model.get_submodule(path), nn.Module)


@pytest.mark.parametrize("layout", tiny.ALL)
def test_parts_are_known_by_name(layout: str) -> None:
    made = tiny.dense(layout)
    modules = made.family.modules(made.model)
    owners = {
        f"{whole.holder}.{key}": (whole.name, whole.kind, key)
        for whole in modules
        for key in whole.linears
    }
    assert owners.keys() == {module.name for module in modules if module.kind == "linear"}
    for path, (name, _, key) in owners.items():
        assert families.part_path(name, key) == path
    for whole in modules:
        assert families.owner(whole.name) == owners.get(whole.name)
        for part in modules:
            if whole.name == part.name:
                continue
            paths = [f"{whole.holder}.{child}" for _, child in whole.parts]
            inside = part.name in paths or part.name.startswith(f"{whole.name}.")
            assert families.contains(whole.name, part.name) == inside


@pytest.mark.parametrize("layout", tiny.ALL)
def test_every_weight_of_the_layers_has_one_owner(layout: str) -> None:
    """But for norms, biases of positions and the like."""
    made = tiny.dense(layout)
    owned = [
        f"{module.holder}.{name}"
        for module in made.family.modules(made.model)
        if module.kind in ("attention", "ffn")
        for name in own_tensors(made.model.get_submodule(module.holder), module)
    ]
    assert len(owned) == len(set(owned))
    rest = {name for name, _ in made.model.named_parameters() if made.family.place(name)}
    left = {name for name in rest - set(owned) if "norm" not in name.lower() and "ln_" not in name}
    assert all("relative_attention_bias" in name for name in left), left


def variant_of(made: Any, module: Module) -> Variant:
    """A module with nothing removed, as a variant."""
    kept = list(range(module.units)) if module.kind in ("attention", "ffn") else None
    tensors = own_tensors(made.model.get_submodule(module.holder), module, kept)
    return Variant(module.name, module.kind, Entry(0.5), kept_units=kept, tensors=tensors)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", tiny.ALL)
def test_nothing_removed_is_the_dense_module(layout: str, attention: str) -> None:
    """Each kind by itself gives what it gives in the model; less does not."""
    made = tiny.dense(layout, attention=attention)
    modules = [m for m in made.family.modules(made.model) if m.kind != "layer"]
    whole = [variant_of(made, module) for module in modules]
    for variant in list(whole):
        less = Variant(**variant.facts(), tensors=dict(variant.tensors))
        name = max(less.tensors)
        less.tensors[name] = less.tensors[name] * 0.5
        whole.append(less)
    model = Distillation(made, whole)
    batch = tiny.inputs(made)
    batch["labels"] = batch.get("decoder_input_ids", torch.ones(3, dtype=torch.long))
    with torch.no_grad():
        errors, norms, counts = model(**batch)
    count = len(modules)
    assert (norms.sum(0) > 0.1).all()
    assert (errors[:, :count].sum(0) <= 1e-10 * norms[:, :count].sum(0)).all()
    assert (errors[:, count:].sum(0) > 1e-4 * norms[:, count:].sum(0)).all()
    if made.family.image_tokens is None:
        masks = {"encoder": batch["attention_mask"].sum(1)}
        masks["decoder"] = (
            (batch["labels"] != -100).sum(1) if layout.startswith("t5") else masks["encoder"]
        )
        for column, module in enumerate(modules):
            assert torch.equal(counts[:, column].long(), masks[module.stack])


@pytest.mark.parametrize("layout", tiny.ALL)
def test_recorded_calls_are_those_of_the_dense_model(layout: str) -> None:
    made = tiny.dense(layout)
    modules = [m for m in made.family.modules(made.model) if m.kind == "attention"]
    batch = tiny.inputs(made)
    batch["labels"] = batch.get("decoder_input_ids", torch.ones(3, dtype=torch.long))
    valid = made.family.valid_tokens(made.model, batch)
    calls = record_calls(made.model, made.family, modules, batch, valid)
    for module in modules:
        call = [calls[module.name]]
        whole = Student(variant_of(made, module), module, made.family, made.model).eval()
        assert mean_error(whole, call) <= 1e-10 * mean_error(None, call)


@pytest.mark.parametrize("layout", tiny.ALL)
def test_moments_are_those_of_real_tokens(layout: str) -> None:
    """Against the inputs of every sample alone, without padding."""
    made = tiny.dense(layout)
    linears = [m.name for m in made.family.modules(made.model) if m.kind == "linear"]
    batch = tiny.inputs(made)
    batch["labels"] = batch.get("decoder_input_ids", torch.ones(3, dtype=torch.long))
    stacks = stacks_of(made.model, made.family, linears)
    shared = shared_inputs(made.model, made.family, stacks, batch)
    moments = InputMoments(made.model, made.family, shared)
    moments.measure(batch)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for name in linears:
        made.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].flatten(0, -2))
        )
    for sample in range(3):
        one = {key: tensor[sample : sample + 1] for key, tensor in batch.items()}
        if "attention_mask" in one:
            length = int(one["attention_mask"].sum())
            one["input_ids"] = one["input_ids"][:, :length]
            one["attention_mask"] = one["attention_mask"][:, :length]
        with torch.no_grad():
            made.family.run(made.model, one)
    for item, gram in zip(shared, moments.results(), strict=True):
        for name in item.linears:
            x = torch.cat(rows[name]).double()
            assert gram.count == len(x)
            torch.testing.assert_close(gram.matrix, x.T @ x, rtol=1e-4, atol=1e-3)


def test_gated_ffns_share_their_input() -> None:
    made = tiny.dense("llama")
    linears = [m.name for m in made.family.modules(made.model) if m.kind == "linear"]
    stacks = stacks_of(made.model, made.family, linears)
    shared = shared_inputs(made.model, made.family, stacks, tiny.inputs(made))
    assert ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj") in [
        item.linears for item in shared
    ]


def test_an_unknown_architecture() -> None:
    with pytest.raises(UserError) as caught:
        families.by_model_type("mamba")
    message = str(caught.value)
    assert message.startswith('architecture "mamba" is not supported; known are bert, camembert')
    assert "docs/adding.md" in message
    assert "llama" in message
