"""unit_phase on ffns: gated and plain, with and without biases, in a layer or by themselves."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from composable.calibration.recorded_calls import (
    RecordedModule,
    Valid,
    mean_error,
    record_calls,
    recorded_modules,
)
from composable.families import Module
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models.checkpoint import Checkpoint
from composable.variants import unit_phase
from composable.variants.pruning import make_variants
from composable.variants.students import Student
from composable.variants.unit_phase import Settings, Trained
from tests import tiny

#: Activation of an ffn, or of its gate.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "t5": F.relu,
    "t5_gated": lambda x: F.gelu(x, approximate="tanh"),
    "llama": F.silu,
    "opt": F.relu,
    "bert": F.gelu,
    "gpt2": lambda x: F.gelu(x, approximate="tanh"),
}
SETTINGS = Settings(epochs=3, lr=0.02, patience=0)
Batches = list[dict[str, Tensor]]


def batches_of(dense: Checkpoint, seeds: range, wider: int = 0) -> Batches:
    """Batches with padding, and `wider` columns of it more than need be."""
    made = [tiny.inputs(dense, samples=4, length=9, seed=seed) for seed in seeds]
    return [
        {name: F.pad(ids, (0, 0 if name.startswith("decoder") else wider))
         for name, ids in batch.items()}
        for batch in made
    ]  # fmt: skip


def ffn_of(dense: Checkpoint) -> Module:
    return [m for m in dense.family.modules(dense.model) if m.kind == "ffn"][-1]


def starts_of(dense: Checkpoint, *entries: Entry) -> dict[Any, Variant]:
    made = make_variants(dense, {ffn_of(dense).name: list(entries)}, tiny.BY_WEIGHTS)
    return {variant.entry.rate: variant for variant in made}


@contextmanager
def recording(dense: Checkpoint, wider: int = 0) -> Iterator[RecordedModule]:
    batches = batches_of(dense, range(6), wider), batches_of(dense, range(6, 8), wider)
    with recorded_modules(dense, [ffn_of(dense)], batches, "cpu", 1 << 30) as modules:
        yield next(modules)


def train(
    dense: Checkpoint, starts: Any, wider: int = 0, settings: Settings = SETTINGS
) -> dict[Any, Trained]:
    with recording(dense, wider) as recorded:
        return unit_phase.train(dense, starts, recorded, settings)


def plain(weights: dict[str, Tensor], module: Module, active: Any, hidden: Tensor) -> Tensor:
    """The formula of an ffn, by the names of its linears."""

    def linear(role: str, x: Tensor) -> Tensor:
        name = module.part(role)
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    up = linear("up", hidden)
    is_gated = any(role == "gate" for role, _ in module.parts)
    return linear("down", active(linear("gate", hidden)) * up if is_gated else active(up))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_are_the_real_tokens_once_each(layout: str) -> None:
    """Against hooks on the model as its users run it, token by token."""
    dense, twin = tiny.dense(layout), tiny.dense(layout)
    module = ffn_of(dense)
    batches = batches_of(dense, range(6)), batches_of(dense, range(6, 8))
    holder = twin.model.get_submodule(module.holder)
    met: list[Tensor] = []
    holder.get_submodule(module.part("up")).register_forward_hook(
        lambda _, args, __: met.append(args[0])
    )
    holder.get_submodule(module.output).register_forward_hook(lambda _, __, out: met.append(out))
    with recording(dense) as recorded:
        for calls, part in zip((recorded.train, recorded.held_out), batches, strict=True):
            wanted = []
            for batch in part:
                met.clear()
                with torch.no_grad():
                    twin.model(**batch)
                real = dense.family.valid_tokens(dense.model, batch)[module.stack].flatten()
                rows = [states.flatten(0, -2)[real] for states in met]
                wanted.append(torch.cat(rows, 1))
            found = torch.cat([torch.cat([call.args[0], call.target], 1) for call in calls])
            for one, other in zip(_sorted(found), _sorted(torch.cat(wanted)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        sizes = [call.valid.tokens for call in recorded.train]
        assert len(sizes) == len(batches[0])
        assert max(sizes) == sizes[0] == -(-sum(sizes) // len(sizes))
        assert max(call.valid.tokens for call in recorded.held_out) <= sizes[0]
        assert all(call.valid.padding is None for call in recorded.train)


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_of_a_plain_loop(layout: str) -> None:
    """AdamW of torch on the formula of the ffn, in float64, with the schedule written out.

    A step is a quarter of that of attentions."""
    dense = tiny.dense(layout)
    module, active = ffn_of(dense), LAYOUTS[layout]
    starts = starts_of(dense, Entry(0.5))
    with recording(dense) as recorded:
        (result,) = unit_phase.train(dense, starts, recorded, SETTINGS).values()
        train, held_out = (
            [(call.args[0].double(), call.target.double()) for call in calls]
            for calls in (recorded.train, recorded.held_out)
        )
    holder = dense.model.get_submodule(module.holder)
    weights = {n: t.double().requires_grad_() for n, t in starts[0.5].tensors.items()}
    sizes = {n: float(holder.get_parameter(n).detach().square().mean().sqrt()) for n in weights}
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "name": name} for name, weight in weights.items()],
        betas=(0.8, 0.99), eps=1e-12, weight_decay=0.0,
    )  # fmt: skip
    steps, step, kept, history = 3 * len(train), 0, {}, []
    for epoch in range(4):
        errors = [plain(weights, module, active, x) - y for x, y in held_out]
        history.append(torch.cat(errors).square().mean().item())
        if history[-1] == min(history):
            kept = {name: weight.detach().clone() for name, weight in weights.items()}
        if epoch == 3:
            break
        for index in unit_phase._order(len(train), (42, module.name, epoch)):
            x, y = train[index]
            optimizer.zero_grad()
            (plain(weights, module, active, x) - y).square().mean().backward()
            share = min((step + 1) / (steps // 8), (steps - step) / (steps - steps // 8))
            for group in optimizer.param_groups:
                group["lr"] = share * 0.02 * sizes[group["name"]]
            optimizer.step()
            step += 1
    assert result.history == pytest.approx(history, rel=1e-3)
    assert result.error < 0.95 * result.history[0]
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(tensor.double(), kept[name], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_that_of_the_mean_squared_error(layout: str) -> None:
    dense = tiny.dense(layout)
    module, (start,) = ffn_of(dense), starts_of(dense, Entry(0.5)).values()
    training = unit_phase._Training(Student(start, module, dense.family, dense.model))
    with recording(dense) as recorded:
        call = recorded.train[0]
        square = training.add_gradient(call)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors.items()}
    loss = (plain(weights, module, LAYOUTS[layout], call.args[0]) - call.target).square().mean()
    assert float(square) == pytest.approx(loss.item() * call.target.numel(), rel=1e-5)
    wanted = torch.autograd.grad(loss, [weights[name] for name in training.student.names])
    for name, gradient in zip(training.student.names, wanted, strict=True):
        found = training.student.part.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "opt", "bert", "t5_gated"])
def test_padding_has_no_influence(layout: str) -> None:
    results = []
    for wider in (0, 4):
        dense = tiny.dense(layout)
        (result,) = train(dense, starts_of(dense, Entry(0.5)), wider).values()
        results.append(result)
    assert results[0].history == pytest.approx(results[1].history, rel=1e-3)
    for name, tensor in results[0].tensors.items():
        torch.testing.assert_close(tensor, results[1].tensors[name], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("layout", ["llama", "opt"])
def test_company_has_no_influence(layout: str) -> None:
    entries = Entry(0.25), Entry(0.5), Entry(0.75)
    dense = tiny.dense(layout)
    together = train(dense, starts_of(dense, *entries))
    for entry in entries:
        dense = tiny.dense(layout)
        (alone,) = train(dense, starts_of(dense, entry)).values()
        result = together[entry.rate]
        assert alone.history == result.history
        assert all(torch.equal(t, alone.tensors[name]) for name, t in result.tensors.items())


@pytest.mark.parametrize("layout", ["llama", "opt"])
def test_bfloat16_products_end_at_the_same_error(layout: str) -> None:
    dense = tiny.dense(layout)
    starts = starts_of(dense, Entry(0.5))
    (exact,) = train(dense, starts).values()
    (rough,) = train(dense, starts, 0, dataclasses.replace(SETTINGS, dtype="bfloat16")).values()
    assert rough.history[0] == exact.history[0], "errors are measured in float32"
    assert rough.history != exact.history
    assert rough.error == pytest.approx(exact.error, rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in rough.tensors.values())


def test_masked_weights_stay_zero() -> None:
    dense = tiny.dense("llama")
    (start,) = starts_of(dense, Entry(0.5, None, {"down_proj": Entry(0.5)})).values()
    (result,) = train(dense, {0: start}).values()
    mask = start.masks["down_proj.weight"]
    assert not result.tensors["down_proj.weight"][~mask].any()
    assert (result.tensors["down_proj.weight"] != start.tensors["down_proj.weight"])[mask].all()
    assert result.error < result.history[0]


def test_errors_are_of_the_real_tokens() -> None:
    """The dense ffn has none; without one the error is the mean square of the output."""
    dense = tiny.dense("bert")
    module = ffn_of(dense)
    whole = Variant(module.name, "ffn", Entry(0.1), kept_units=list(range(module.units)))
    student = Student(whole, module, dense.family, dense.model)
    with recording(dense) as recorded:
        held_out = recorded.held_out
        assert mean_error(student, held_out) == 0.0
    outputs = torch.cat([call.target for call in held_out])
    assert mean_error(None, held_out) == pytest.approx(float(outputs.square().mean()))


def test_a_pass_ends_with_the_last_module_that_is_recorded() -> None:
    dense = tiny.dense("llama")
    first, *_, last = [m for m in dense.family.modules(dense.model) if m.kind == "ffn"]
    ran: list[int] = []
    for layer in dense.model.model.layers:
        layer.register_forward_hook(lambda layer, *_: ran.append(layer.self_attn.layer_idx))
    batch = tiny.inputs(dense)
    valid = dense.family.valid_tokens(dense.model, batch)
    for modules, wanted in (([first], []), ([first, last], [0, 1])):
        calls = record_calls(dense.model, dense.family, modules, batch, valid)
        assert list(calls) == [module.name for module in modules]
        assert ran == wanted, "a layer ends after its ffn"
        ran.clear()


def test_rows_of_flat_states_and_of_others_are_the_same() -> None:
    valid = Valid.of(torch.tensor([[True, True, False], [True, False, False]]))
    states = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(valid.rows(states), valid.rows(states.flatten(0, 1)))
    assert valid.rows(states)[:, 0].tolist() == [0, 2, 6]
