"""unit_phase: recorded calls and trained variants, against the dense model itself."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composable.calibration import recorded_calls
from composable.calibration.batching import Texts
from composable.calibration.recorded_calls import (
    Call,
    Valid,
    groups,
    mean_error,
    record_calls,
    recorded_modules,
)  # fmt: skip
from composable.commands import block_level_finetuning
from composable.families import Module
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.linalg import solver
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_parameters
from composable.tasks import translation
from composable.tasks.translation import Corpus, Pairs, collator_for
from composable.variants import unit_phase
from composable.variants.distillation import Distillation
from composable.variants.pruning import make_variants
from composable.variants.students import Student
from composable.variants.unit_phase import Settings, Trained
from tests import tiny

FIRST = "encoder.block.0.layer.0.SelfAttention"
ENCODER = "encoder.block.1.layer.0.SelfAttention"
DECODER = "decoder.block.1.layer.0.SelfAttention"
CROSS = "decoder.block.0.layer.1.EncDecAttention"
LAST = "decoder.block.1.layer.1.EncDecAttention"
NAMES = (FIRST, ENCODER, DECODER, CROSS, LAST)
SETTINGS = Settings(batch_size=8, epochs=3, lr=0.05)
Key = tuple[str, float]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """Sentences of different length on both sides, so that batches with and without padding."""
    folder = tiny.corpus(tmp_path_factory.mktemp("corpus"), pairs=90)
    cut = []
    for split in ("train", "valid"):
        whole = translation.read_corpus(folder, split)
        short = {
            side: [
                " ".join(line.split()[: 2 + (index * step) % 6])
                for index, line in enumerate(getattr(whole, side))
            ]
            for side, step in (("source", 1), ("target", 5))
        }
        cut.append(dataclasses.replace(whole, **short))
    return cut[0], cut[1]


def module_of(dense: Checkpoint, name: str) -> Module:
    return next(m for m in dense.family.modules(dense.model) if m.name == name)


def starts_of(
    dense: Checkpoint, names: tuple[str, ...] = NAMES, rates: tuple[float, ...] = (0.25, 0.5)
) -> dict[Key, Variant]:
    scheme = {name: [Entry(rate) for rate in rates] for name in names}
    return {(v.module, v.entry.rate): v for v in make_variants(dense, scheme, tiny.BY_WEIGHTS)}


def train(
    dense: Checkpoint, starts: Any, texts: Any, settings: Settings = SETTINGS, **options: Any
) -> dict[Any, Trained]:
    """Record every attention and train its variants."""
    train, held_out = (
        Texts(dense, corpus).batches("cpu", rows)
        for corpus, rows in zip(texts, (settings.batch_size, 64), strict=True)
    )
    wanted = {start.module for start in starts.values()}
    modules = [m for m in dense.family.modules(dense.model) if m.name in wanted]
    found: dict[Any, Trained] = {}
    with recorded_modules(dense, modules, (train, held_out), "cpu", settings.budget) as attentions:
        for recorded in attentions:
            own = {k: start for k, start in starts.items() if start.module == recorded.module.name}
            found |= unit_phase.train(dense, own, recorded, settings, **options)
    return found


def run(texts: Any, names: tuple[str, ...] = NAMES, **changes: Any) -> dict[Key, Trained]:
    dense = tiny.checkpoint()
    settings = dataclasses.replace(SETTINGS, **changes)
    return train(dense, starts_of(dense, names), texts, settings)


def batches_of(dense: Checkpoint, corpus: Corpus, size: int = 7) -> list[dict[str, Tensor]]:
    pairs, collate = Pairs(corpus, dense.tokenizer, ""), collator_for(dense)
    starts = range(0, len(pairs), size)
    return [collate([pairs[i] for i in range(s, min(s + size, len(pairs)))]) for s in starts]


def record(
    dense: Checkpoint, corpus: Corpus, names: tuple[str, ...] = NAMES, size: int = 7
) -> list[dict[str, Call]]:
    return [calls_of(dense, names, batch) for batch in batches_of(dense, corpus, size)]


def calls_of(dense: Checkpoint, names: Sequence[str], batch: dict[str, Tensor]) -> dict[str, Call]:
    modules = [module_of(dense, name) for name in names]
    valid = dense.family.valid_tokens(dense.model, batch)
    return record_calls(dense.model, dense.family, modules, batch, valid)


def student_of(dense: Checkpoint, name: str, kept: list[int]) -> Student:
    """A student with the dense weights of some heads."""
    part, module = dense.model.get_submodule(name), module_of(dense, name)
    rows = torch.cat([torch.arange(8) + 8 * head for head in kept])
    tensors = {
        key: (weight[:, rows] if key.startswith("o.") else weight[rows]).detach().clone()
        for key, weight in own_parameters(part, module).items()
    }
    variant = Variant(name, "attention", Entry(0.5), kept_units=kept, tensors=tensors)
    return Student(variant, module, dense.family, dense.model).eval()


def distillation_errors(variants: list[Variant], corpus: Corpus) -> list[tuple[float, float]]:
    """Mean squared error and relative error of each, by the gradient form's own measure."""
    dense = tiny.checkpoint()
    model = Distillation(dense, variants)
    with torch.no_grad():
        sums = [[t.double().sum(0) for t in model(**b)] for b in batches_of(dense, corpus, 11)]
    errors, norms, counts = (sum(column) for column in zip(*sums, strict=True))
    return list(zip((errors / counts).tolist(), (errors / norms).tolist(), strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_removed_is_the_dense_module(texts: Any, attention: str, name: str) -> None:
    dense = tiny.checkpoint(attention=attention)
    calls = [call[name] for size in (1, 7) for call in record(dense, texts[0], size=size)]
    assert {call.valid.padding is None for call in calls} == {True, False}
    whole, pruned = (student_of(dense, name, kept) for kept in ([0, 1, 2, 3], [0, 2, 3]))
    assert mean_error(whole, calls) == 0.0
    assert mean_error(pruned, calls) > 1e-3 * mean_error(None, calls) > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_removed_has_nothing_to_learn(texts: Any, attention: str) -> None:
    """As above, in the run itself; the dense weights stay, for nothing is better."""
    dense = tiny.checkpoint(attention=attention)
    students = {name: student_of(dense, name, [0, 1, 2, 3]) for name in NAMES}
    starts = {
        name: Variant(
            name, "attention", Entry(0.1), kept_units=[0, 1, 2, 3], tensors=some.tensors()
        )
        for name, some in students.items()
    }
    results = train(dense, starts, texts, dataclasses.replace(SETTINGS, epochs=1))
    for name, result in results.items():
        assert result.history[0] == result.error == 0.0
        for key, tensor in result.tensors.items():
            assert torch.equal(tensor, starts[name].tensors[key])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_calls_are_those_of_the_whole_model(texts: Any, attention: str) -> None:
    """Against hooks on another dense model that runs as its users run it."""
    dense, twin = (tiny.checkpoint(attention=attention) for _ in range(2))
    met: list[Any] = []
    for name in NAMES:
        part = twin.model.get_submodule(name)
        part.register_forward_hook(lambda _, *call: met.append(call), with_kwargs=True)
    for calls, batch in zip(record(dense, texts[0]), batches_of(dense, texts[0]), strict=True):
        met.clear()
        with torch.no_grad():
            twin.model(**batch, use_cache=False)
        by_place = {id(call): name for name, call in calls.items()}
        assert len(by_place) == len(met) == len(NAMES)
        order = sorted(NAMES, key=[n for n, _ in twin.model.named_modules()].index)
        for name, (args, kwargs, output) in zip(order, met, strict=True):
            call, inputs, named = calls[name], calls[name].args, calls[name].kwargs
            assert torch.equal(inputs[0], args[0])
            assert torch.equal(call.target, output[0])
            assert torch.equal(named["position_bias"], output[1])
            if name in (CROSS, LAST):
                assert torch.equal(named["key_value_states"], kwargs["key_value_states"])
            mask = batch["attention_mask"] > 0
            if name.startswith("decoder"):
                mask = batch["labels"] != -100
            assert call.valid.tokens == int(mask.sum())
            assert torch.equal(call.valid.rows(call.target), output[0][mask])


def test_shared_tensors_are_stored_once(texts: Any) -> None:
    for calls in record(tiny.checkpoint(), texts[0]):
        for one, other, key in (
            (CROSS, LAST, "key_value_states"), (CROSS, LAST, "mask"),
            (FIRST, ENCODER, "mask"), (FIRST, ENCODER, "position_bias"),
        ):  # fmt: skip
            assert calls[one].kwargs[key] is calls[other].kwargs[key]
        assert calls[FIRST].args[0] is not calls[ENCODER].args[0]


class Ten(nn.Module):
    """Stands for the output projection."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 10


class Once(nn.Module):
    """Returns a tuple, as attentions do."""

    def __init__(self) -> None:
        super().__init__()
        self.o = Ten()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.o(x),)


class InPlace(nn.Module):
    """Gives one tensor to two parts, and changes it and what they return in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Once(), Once()

    def forward(self, x: Tensor) -> None:
        for part in (self.one, self.two):
            (output,) = part(x)
            output.zero_()
            x += 1


class InPlaceFamily:
    @staticmethod
    def replayed(args: Any, kwargs: Any, output: Any) -> Any:
        return args, kwargs

    @staticmethod
    def run(model: Any, batch: Any) -> None:
        model(batch["x"])


def test_tensors_that_change_in_place_are_stored_as_they_were() -> None:
    modules = [Module(n, "attention", "encoder", (("o", "o"),), n) for n in ("one", "two")]
    family: Any = InPlaceFamily
    batch, valid = {"x": torch.ones(1, 2, 3)}, {"encoder": torch.ones(1, 2).bool()}
    calls = record_calls(InPlace(), family, modules, batch, valid)
    assert [float(calls[name].args[0].mean()) for name in ("one", "two")] == [1, 2]
    assert [float(calls[name].target.mean()) for name in ("one", "two")] == [10, 20]


def test_errors_are_those_of_the_gradient_form(texts: Any) -> None:
    dense = tiny.checkpoint()
    calls = record(dense, texts[0])
    starts = starts_of(dense)
    wanted = distillation_errors(list(starts.values()), texts[0])
    for variant, (error, relative) in zip(starts.values(), wanted, strict=True):
        name = variant.module
        student = Student(variant, module_of(dense, name), dense.family, dense.model).eval()
        own = [call[name] for call in calls]
        assert mean_error(student, own) == pytest.approx(error, rel=1e-5)
        norm = mean_error(None, own)
        assert mean_error(student, own) / norm == pytest.approx(relative, rel=1e-5)


def test_gradient_is_that_of_the_mean_squared_error(texts: Any) -> None:
    """Against autograd on the loss, written out."""
    dense = tiny.checkpoint()
    for name in NAMES:
        for calls in record(dense, texts[0])[:3]:
            call = calls[name]
            training = unit_phase._Training(student_of(dense, name, [1, 2]))
            square = training.add_gradient(call)
            weights = [training.student.part.get_parameter(name) for name in training.student.names]
            found = [weight.grad for weight in weights]
            rows = call.valid.rows(training.student(*call.args, **call.kwargs))
            loss = (rows - call.valid.rows(call.target)).square().mean()
            assert float(square) == pytest.approx(loss.item() * rows.numel(), rel=1e-5)
            for one, other in zip(found, torch.autograd.grad(loss, weights), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_training_lowers_every_error(texts: Any) -> None:
    dense = tiny.checkpoint()
    starts = starts_of(dense)
    trained = train(dense, starts, texts, SETTINGS)
    assert set(trained) == set(starts)
    ends = [
        dataclasses.replace(start, tensors=trained[key].tensors) for key, start in starts.items()
    ]
    before, after, training = (
        distillation_errors(some, corpus)
        for some, corpus in (
            (list(starts.values()), texts[1]), (ends, texts[1]), (ends, texts[0])
        )
    )  # fmt: skip
    for index, (key, start) in enumerate(starts.items()):
        result = trained[key]
        assert result.error < 0.9 * result.history[0]
        assert len(result.history) == 1 + SETTINGS.epochs
        assert result.history[0] == pytest.approx(before[index][0], rel=1e-5)
        assert result.error == pytest.approx(after[index][0], rel=1e-5)
        # measured while the weights still moved
        assert result.training_loss == pytest.approx(training[index][0], rel=0.3)
        assert result.moments is None
        for name, tensor in start.tensors.items():
            assert tensor.shape == result.tensors[name].shape
            assert not torch.equal(tensor, result.tensors[name])


def test_a_step_is_relative_to_the_weights(texts: Any) -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    dense = tiny.checkpoint()
    with torch.no_grad():
        for name in NAMES:
            dense.model.get_submodule(name).q.weight.mul_(0.1)
    starts = starts_of(dense)
    settings = dataclasses.replace(SETTINGS, epochs=1, batch_size=1000, lr=1e-3)
    for (name, rate), trained in train(dense, starts, texts, settings).items():
        for key, tensor in trained.tensors.items():
            weight = dense.model.get_submodule(name).get_parameter(key)
            step = 1e-3 * weight.square().mean().sqrt().item()
            moved = (tensor - starts[name, rate].tensors[key]).abs()
            assert float(moved.median()) == pytest.approx(step, rel=0.01)


def test_neither_company_nor_order_nor_budget_matters(
    texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = recorded_calls.record_calls

    def counted(model: Any, family: Any, modules: Any, *args: Any) -> Any:
        passes.append(len(modules))
        return real(model, family, modules, *args)

    monkeypatch.setattr(recorded_calls, "record_calls", counted)
    together = run(texts)
    batches = math.ceil(len(texts[0].source) / 8) + math.ceil(len(texts[1].source) / 64)
    assert passes == [len(NAMES)] * (1 + batches), "one more to see how much they take"
    passes.clear()
    others = [run(texts, budget=1)]
    assert passes == [len(NAMES)] + [1] * batches * len(NAMES)
    dense = tiny.checkpoint()
    starts = starts_of(dense)
    backwards = dict(reversed(starts.items()))
    others.append(train(dense, backwards, texts, SETTINGS))
    others.append({})
    for key, start in starts.items():
        others[-1] |= train(tiny.checkpoint(), {key: start}, texts, SETTINGS)
    for other in others:
        assert set(other) == set(together)
        for key, result in together.items():
            assert result.history == other[key].history
            assert result.training_loss == other[key].training_loss
            for name, tensor in result.tensors.items():
                assert torch.equal(tensor, other[key].tensors[name])


def test_attentions_train_in_float32(texts: Any) -> None:
    one, other = (run(texts, (CROSS,), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert [result.history for result in one.values()] == [r.history for r in other.values()]


def test_the_seed_matters(texts: Any) -> None:
    first, second = (run(texts, (ENCODER,), seed=seed) for seed in (1, 2))
    assert first[ENCODER, 0.5].history[0] == second[ENCODER, 0.5].history[0]
    assert first[ENCODER, 0.5].history[1] != second[ENCODER, 0.5].history[1]


def test_schedule_and_order(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear up, linear down; every epoch in an order of its own."""
    rates: list[float] = []
    seeds: list[Any] = []
    step, order = torch.optim.AdamW.step, unit_phase._order

    def noted(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    def told(count: int, seed: Any) -> list[int]:
        seeds.append(seed)
        return order(count, seed)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    monkeypatch.setattr(unit_phase, "_order", told)
    run(texts, (CROSS,))
    total = SETTINGS.epochs * math.ceil(len(texts[0].source) / 8)
    warm = int(0.125 * total)
    shares = [rate / max(rates) for rate in rates]
    assert shares[:warm] == pytest.approx([(s + 1) / warm for s in range(warm)])
    assert shares[warm:] == pytest.approx([1 - s / (total - warm) for s in range(total - warm)])
    assert len(set(seeds)) == len(seeds) == SETTINGS.epochs


def test_orders_differ_by_epoch_and_module() -> None:
    orders = [unit_phase._order(50, (42, name, e)) for name in NAMES for e in range(2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert orders[0] == unit_phase._order(50, (42, NAMES[0], 0))


def test_patience_and_best_epoch_of_each() -> None:
    """The bookkeeping, on errors that are written here."""
    dense = tiny.checkpoint()
    for errors, stopped, best in (
        ([4, 3, 2, 1, 0.5, 9], [0, 0, 0, 0, 0, 0], 4),
        ([4, 5, 6, 7], [0, 0, 0, 1], 0),
        # above the start at first: that does not count, as long as the error falls
        ([4, 7, 6, 5, 3], [0, 0, 0, 0, 0], 4),
        ([4, 3, 3, 2, 2.5, 2.7], [0, 0, 0, 0, 0, 1], 3),
        ([4, 3, math.nan], [0, 0, 1], 1),
        ([math.nan], [1], 0),
        ([math.inf], [1], 0),
    ):
        training = unit_phase._Training(student_of(dense, ENCODER, [0]))
        for epoch, (error, is_stopped) in enumerate(zip(errors, stopped, strict=True)):
            with torch.no_grad():
                training.student.part.get_parameter("q.weight").fill_(epoch)
            training.note(error, 2)
            assert training.is_stopped == bool(is_stopped)
        assert unit_phase.best_epoch(training.history) == best
        assert float(training.student.tensors()["q.weight"][0, 0]) == best
    patient = unit_phase._Training(student_of(dense, ENCODER, [0]))
    for error in (1, 2, 3, 4, 5):
        patient.note(error, 0)
    assert not patient.is_stopped


def test_each_stops_by_itself(texts: Any) -> None:
    """At this rate the variants run out of patience at different epochs, as they do alone."""
    changes = {"epochs": 6, "lr": 0.15, "patience": 1}
    together = run(texts, **changes)
    assert len({len(result.history) for result in together.values()}) > 1
    for key, result in together.items():
        dense = tiny.checkpoint()
        settings = dataclasses.replace(SETTINGS, **changes)
        alone = train(dense, {key: starts_of(dense)[key]}, texts, settings)[key]
        assert result.history == alone.history
        assert all(torch.equal(t, alone.tensors[name]) for name, t in result.tensors.items())


def test_what_gets_worse_keeps_its_start(texts: Any, caplog: pytest.LogCaptureFixture) -> None:
    starts = starts_of(tiny.checkpoint())
    for lr in (30.0, 1e38):
        with caplog.at_level(logging.WARNING, "composable"):
            caplog.clear()
            results = run(texts, lr=lr, patience=1, epochs=4)
        assert ("diverged" in caplog.text) == (lr > 1e30)
        wanted = distillation_errors(list(starts.values()), texts[0])
        for (key, start), (error, _) in zip(starts.items(), wanted, strict=True):
            result = results[key]
            assert len(result.history) == 2 or lr < 1e30
            assert result.error == result.history[0]
            assert result.training_loss == pytest.approx(error, rel=1e-5)
            assert all(torch.equal(t, start.tensors[name]) for name, t in result.tensors.items())


def test_a_broken_variant_harms_nobody(texts: Any) -> None:
    dense = tiny.checkpoint()
    starts = starts_of(dense, (ENCODER,))
    alone = train(dense, starts, texts, SETTINGS)
    broken = {name: tensor.clone() for name, tensor in starts[ENCODER, 0.5].tensors.items()}
    broken["v.weight"][0, 0] = math.nan
    bad = dataclasses.replace(starts[ENCODER, 0.5], tensors=broken)
    results = train(dense, {"bad": bad, **starts}, texts, SETTINGS)
    assert math.isnan(results["bad"].error)
    assert len(results["bad"].history) == 1
    assert torch.equal(results["bad"].tensors["q.weight"], broken["q.weight"])
    for key, result in alone.items():
        assert result.history == results[key].history
        assert all(torch.equal(t, results[key].tensors[name]) for name, t in result.tensors.items())


@pytest.mark.parametrize("name", [ENCODER, CROSS])
def test_moments_are_of_the_trained_heads(texts: Any, name: str) -> None:
    """Sums over sentences that run alone, in float64; and the errors that follow from them."""
    dense = tiny.checkpoint()
    starts = starts_of(dense, (name,))
    results = train(dense, starts, texts, SETTINGS, wants_moments=[(name, 0.5)])
    assert results[name, 0.25].moments is None
    result = results[name, 0.5]
    assert result.moments is not None
    tuned = dataclasses.replace(starts[name, 0.5], tensors=result.tensors)
    student = Student(tuned, module_of(dense, name), dense.family, dense.model).eval()
    inputs: list[Tensor] = []
    student.part.get_submodule("o").register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    moments, targets = result.moments, []
    for batch in batches_of(dense, texts[0], 1):
        call = calls_of(dense, [name], batch)[name]
        with torch.no_grad():
            student(*call.args, **call.kwargs)
        targets.append(call.target[0].double())
    x, y = torch.cat([rows[0] for rows in inputs]).double(), torch.cat(targets)
    torch.testing.assert_close(moments.inputs.matrix, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross, y.T @ x, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moments.target_total, y.sum(0), rtol=1e-5, atol=1e-3)
    assert moments.inputs.count == len(x)
    assert moments.target_square == pytest.approx(float(y.square().sum()), rel=1e-5)
    squared = solver.regression_error(moments, result.tensors["o.weight"])
    ((error, _),) = distillation_errors([tuned], texts[0])
    assert squared / y.numel() == pytest.approx(error, rel=1e-4)


def test_calls_of_an_attention_are_freed_with_the_next(texts: Any) -> None:
    dense = tiny.checkpoint()
    modules = [module_of(dense, name) for name in NAMES]
    batches = Texts(dense, texts[0]).batches("cpu", 32)
    earlier: list[Any] = []
    with recorded_modules(dense, modules, (batches, batches), "cpu", 1 << 30) as attentions:
        for recorded in attentions:
            assert len(recorded.train) == len(recorded.held_out) == len(batches)
            assert not any(some.train or some.held_out for some in earlier)
            earlier.append(recorded)
    assert [some.module for some in earlier] == modules


def test_an_interrupted_training_leaves_no_hooks(
    texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_phase, "output_values", None)
    dense = tiny.checkpoint()
    with pytest.raises(TypeError):
        train(dense, starts_of(dense), texts)
    assert all(not part._forward_hooks for part in dense.model.modules())


def test_the_dense_model_is_left_as_it_is_and_dropout_is_off(texts: Any) -> None:
    plain = run(texts)
    dense, untouched = tiny.checkpoint(dropout_rate=0.5), tiny.checkpoint()
    dense.model.train()
    results = train(dense, starts_of(dense), texts, SETTINGS)
    for key, result in results.items():
        assert result.history == plain[key].history
    assert dense.model.training
    for name, tensor in untouched.model.state_dict().items():
        assert torch.equal(dense.model.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in dense.model.parameters())
    assert all(parameter.grad is None for parameter in dense.model.parameters())
    assert all(not part._forward_hooks for part in dense.model.modules())


def test_starts_are_left_as_they_are(texts: Any) -> None:
    dense = tiny.checkpoint()
    starts = starts_of(dense, (CROSS,))
    digests = {key: start.digest for key, start in starts.items()}
    train(dense, starts, texts, SETTINGS)
    assert digests == {key: start.digest for key, start in starts.items()}


def test_masked_weights_stay_zero_and_the_others_learn(texts: Any) -> None:
    dense = tiny.checkpoint()
    (pair,) = make_variants(dense, {CROSS: [Entry(0.5, None, {"o": Entry(0.5)})]}, tiny.BY_WEIGHTS)
    trained = train(dense, {0: pair}, texts, SETTINGS)[0]
    mask = pair.masks["o.weight"]
    assert not trained.tensors["o.weight"][~mask].view(torch.int32).any()
    assert (trained.tensors["o.weight"] != pair.tensors["o.weight"])[mask].all()
    assert trained.error < 0.9 * trained.history[0]
    tuned = dataclasses.replace(pair, tensors=trained.tensors)
    before, after = (distillation_errors([variant], texts[1])[0][0] for variant in (pair, tuned))
    assert trained.history[0] == pytest.approx(before, rel=1e-4)
    assert trained.error == pytest.approx(after, rel=1e-4)


def test_groups_fit_into_the_budget() -> None:
    shared, valid = torch.zeros(1, 5, 4), Valid(None, 5)
    first = {
        name: Call((torch.zeros(1, 5, 4),), {"states": shared}, torch.zeros(1, 5, 4), valid)
        for name in "abcd"
    }
    size = 5 * 4 * 4
    for budget, wanted in (
        (9 * size, ["abcd"]), (9 * size - 1, ["abc", "d"]), (5 * size, ["ab", "cd"]),
        (4 * size, ["a", "b", "c", "d"]), (1, ["a", "b", "c", "d"]),
    ):  # fmt: skip
        assert groups(first, "abcd", 1.0, budget) == [list(group) for group in wanted]
        assert groups(first, "abcd", 10.0, 10 * budget) == [list(group) for group in wanted]


def test_help_says_the_usual_settings() -> None:
    usual = Settings()
    said = {
        each.name: str(getattr(each, "help", "")) for each in block_level_finetuning.main.params
    }
    assert said["epochs"].endswith(f"[default: {usual.epochs}]")
    assert f"of hybrid {usual.lr:g}]" in said["lr"]
    assert (
        "of grad 64, or 8 windows of a language model; of hybrid a quarter]" in said["batch_size"]
    )
    assert usual.batch_size == 64 // 4
