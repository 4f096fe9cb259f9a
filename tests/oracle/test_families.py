"""Every family: what was removed for good equals the dense model with zeroed columns."""

import copy
from typing import Any

import pytest
import torch

from composable.families import Module
from composable.families.base import cache_name
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.variants import compose
from composable.variants.pruning import make_variants
from tests import tiny

TOLERANCE = {"rtol": 0, "atol": 2e-5}


def modules_of(made: Checkpoint, kind: str) -> list[Module]:
    return [module for module in made.family.modules(made.model) if module.kind == kind]


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the real tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    if found.dim() == 3 and "decoder_input_ids" not in batch:
        found = found[batch["attention_mask"].bool()]
    return found


def zeroed(made: Checkpoint, gone: dict[str, list[int]]) -> Any:
    """The dense model with the columns of the units that are gone set to zero."""
    model = copy.deepcopy(made.model)
    modules = {module.name: module for module in made.family.modules(model)}
    for name, units in gone.items():
        module = modules[name]
        linear: Any = model.get_submodule(module.output_path)
        with torch.no_grad():
            if len(units) == module.units:
                linear.weight.zero_()
                if linear.bias is not None:  # what is removed whole adds nothing
                    linear.bias.zero_()
            else:
                role = "o" if module.kind == "attention" else "down"
                columns = _columns(module, units)
                assert role in dict(module.parts)
                linear.weight[:, columns] = 0
    return model


def _columns(module: Module, units: list[int]) -> torch.Tensor:
    size = module.head_size if module.kind == "attention" else 1
    return torch.tensor([unit * size + i for unit in units for i in range(size)])


def composed(made: Checkpoint, scheme: dict[str, float], **options: Any) -> tuple[Any, Any]:
    variants = make_variants(
        made, {name: [Entry(rate)] for name, rate in scheme.items()}, tiny.BY_WEIGHTS, **options
    )
    fresh = copy.deepcopy(made)
    return compose.compose(fresh, variants), variants


def gone_units(made: Checkpoint, variants: list[Variant]) -> dict[str, list[int]]:
    modules = {module.name: module for module in made.family.modules(made.model)}
    return {
        variant.module: [
            unit
            for unit in range(modules[variant.module].units)
            if unit not in (variant.kept_units or [])
        ]
        for variant in variants
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", tiny.ALL)
@pytest.mark.parametrize("kind", ["some gone", "first gone", "all gone"])
def test_removed_units_are_zeroed_columns(layout: str, kind: str, attention: str) -> None:
    made = tiny.dense(layout, attention=attention)
    attentions, ffns = modules_of(made, "attention"), modules_of(made, "ffn")
    rates = {
        "some gone": [(attentions, (0.25, 0.5, 0.5)), (ffns, (0.0, 0.3, 1.0))],
        "first gone": [(attentions, (1.0, 0.5, 0.0)), (ffns, (1.0, 0.0, 0.5))],
        "all gone": [(attentions, (1.0,) * 3), (ffns, (1.0,) * 3)],
    }[kind]
    scheme = {
        module.name: part[i % 3]
        for some, part in rates
        for i, module in enumerate(some)
        if part[i % 3]
    }
    small, variants = composed(made, scheme)
    batch = tiny.inputs(made)
    reference = logits(zeroed(made, gone_units(made, variants)), batch)
    torch.testing.assert_close(logits(small.model, batch), reference, **TOLERANCE)
    assert (logits(made.model, batch) - reference).abs().max() > 1e-2
    before = sum(p.numel() for p in made.model.parameters())
    assert sum(p.numel() for p in small.model.parameters()) < before


DECODERS = ("opt", "gpt2", "llama", "llama_gqa", "mistral", "qwen2", "qwen3")


def step_by_step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits with a key/value cache, three tokens and then one by one."""
    found, cache, done = [], None, 0
    with torch.no_grad():
        for end in (3, *range(4, ids.shape[1] + 1)):
            output = model(
                input_ids=ids[:, done:end],
                attention_mask=torch.ones_like(ids[:, :end]),
                use_cache=True,
                **{cache_name(model): cache},
            )
            cache, done = output[cache_name(model)], end
            found.append(output.logits)
    return torch.cat(found, 1)


def check_cached_decoding(made: Checkpoint) -> None:
    """Logits step by step, and greedy generation, equal those without a cache."""
    model: Any = made.model
    ids = tiny.inputs(made, 2, 9)["input_ids"].clamp(min=3)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(step_by_step(model, ids), whole, **TOLERANCE)
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize(
    ("layout", "gqa"),
    [
        *((layout, "per-group") for layout in DECODERS),
        *((layout, "whole-groups") for layout in ("llama_gqa", "mistral", "qwen2", "qwen3")),
    ],
)
@pytest.mark.parametrize(
    "rates",
    [(0.5, 0.25, 0), (1, 0.5, 0), (0, 1, 1), (1, 1, 1), "layer 0", "layer 1", "layers 0 and 2"],
    ids=str,
)
def test_cached_decoding_equals_one_pass(layout: str, rates: Any, gqa: str) -> None:
    made = tiny.dense(layout)
    attentions, layers = modules_of(made, "attention"), modules_of(made, "layer")
    if isinstance(rates, str):
        scheme = {m.name: 1.0 for i, m in enumerate(layers) if str(i) in rates}
        scheme[attentions[1].name] = 0.5 if "1" not in rates else 0.0
        scheme = {name: rate for name, rate in scheme.items() if rate}
    else:
        scheme = {m.name: r for m, r in zip(attentions, rates, strict=True) if r}
    small, _ = composed(made, scheme, whole_groups=gqa == "whole-groups")
    check_cached_decoding(small)


@pytest.mark.parametrize("layout", ["llama_gqa", "mistral", "qwen2", "qwen3"])
def test_grouped_queries_leave_as_asked(layout: str) -> None:
    made = tiny.dense(layout)
    module = modules_of(made, "attention")[0]
    size = module.units // module.groups
    scheme = {module.name: 0.5}
    small, (variant,) = composed(made, scheme)
    per_group = [[h for h in variant.kept_units if h // size == g] for g in range(module.groups)]
    assert [len(heads) for heads in per_group] == [size - int(size * 0.5 + 0.5)] * module.groups
    dense_k = made.model.get_parameter(f"{module.name}.k_proj.weight")
    assert torch.equal(variant.tensors["k_proj.weight"], dense_k)
    assert variant.gqa == "per-group"
    small, (variant,) = composed(made, scheme, whole_groups=True)
    groups = sorted({head // size for head in variant.kept_units})
    assert variant.kept_units == [g * size + i for g in groups for i in range(size)]
    assert len(groups) == module.groups - int(module.groups * 0.5 + 0.5)
    assert len(variant.tensors["k_proj.weight"]) == len(groups) * module.head_size
    assert variant.gqa == "whole-groups"
    batch = tiny.inputs(made)
    gone = gone_units(made, [variant])
    torch.testing.assert_close(
        logits(small.model, batch), logits(zeroed(made, gone), batch), **TOLERANCE
    )


@pytest.mark.parametrize("layout", tiny.ALL)
def test_removed_layers_equal_the_layers_that_stay(layout: str) -> None:
    made = tiny.dense(layout)
    layers = modules_of(made, "layer")
    last = [m for m in layers if m.stack == layers[-1].stack]
    small, _ = composed(made, {last[0].name: 1.0})
    batch = tiny.inputs(made)
    reference = copy.deepcopy(made)
    for linear in (m for m in modules_of(made, "linear") if m.name.startswith(f"{last[0].name}.")):
        with torch.no_grad():
            found: Any = reference.model.get_submodule(linear.name)
            found.weight.zero_()
            if found.bias is not None:
                found.bias.zero_()
    ours, dense = logits(small.model, batch), logits(made.model, batch)
    assert (ours - dense).abs().max() > 1e-3
    if layout in ("bert", "roberta", "electra", "distilbert"):
        return  # a layer that adds nothing still normalises
    # what a layer adds comes out of its linears; T5's first layer has the position bias as well
    torch.testing.assert_close(ours, logits(reference.model, batch), **TOLERANCE)


@pytest.mark.parametrize("layout", tiny.ALL)
def test_a_composed_model_comes_back_from_its_file(layout: str, tmp_path: Any) -> None:
    made = tiny.dense(layout)
    attentions, ffns = modules_of(made, "attention"), modules_of(made, "ffn")
    linears = [m for m in modules_of(made, "linear") if m.name == attentions[1].output_path]
    layers = modules_of(made, "layer")
    scheme = {attentions[0].name: 0.5, ffns[0].name: 0.5, linears[0].name: 0.4, layers[2].name: 1.0}
    small, _ = composed(made, scheme)
    checkpoint.save(tmp_path / "m.pth", small)
    again = checkpoint.load(tmp_path / "m.pth")
    batch = tiny.inputs(made)
    assert torch.equal(logits(again.model, batch), logits(small.model, batch))
    assert again.structure == small.structure
    assert [n for n, _ in again.model.named_parameters()] == [
        n for n, _ in small.model.named_parameters()
    ]
    checkpoint.save(tmp_path / "n.pth", again)
    assert (tmp_path / "n.pth").read_bytes() == (tmp_path / "m.pth").read_bytes()


def test_split_gpt2_computes_what_it_did() -> None:
    model, made = tiny.build("gpt2"), tiny.dense("gpt2")
    batch = tiny.inputs(made)
    torch.testing.assert_close(logits(made.model, batch), logits(model, batch), rtol=0, atol=1e-6)
