"""What is cut out of a module: the weights that stay are those of the units that were asked for."""

import copy

import pytest
import torch

from composable.models.surgery import keep_units, own_tensors
from tests import tiny


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("layout", ["t5_gated", "bert", "gpt2", "llama_gqa", "qwen2", "vit"])
def test_a_cut_module_holds_what_a_variant_of_it_holds(layout: str, kind: str) -> None:
    """Row by row, biases too; each is found by a way of its own."""
    made = tiny.dense(layout)
    module = next(m for m in made.family.modules(made.model) if m.kind == kind)
    kept = [1, 3] if kind == "attention" else [0, 5, 6, 40]
    holder = made.model.get_submodule(module.holder)
    with torch.no_grad():  # some biases are zero at first
        for parameter in holder.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    cut = copy.deepcopy(holder)
    keep_units(cut, module, kept)
    found, expected = own_tensors(cut, module), own_tensors(holder, module, kept)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    whole = own_tensors(holder, module)
    assert sum(t.numel() for t in found.values()) < sum(t.numel() for t in whole.values())
