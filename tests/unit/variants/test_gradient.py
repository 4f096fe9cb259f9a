"""Fine-tuning by gradient: students against what hooks and formulas of the test's own say."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from composable.families.base import CACHE
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_parameters
from composable.tasks.translation import Corpus, Pairs, collator_for
from composable.training import train
from composable.training.options import Options
from composable.variants import gradient
from composable.variants.distillation import Distillation
from composable.variants.pruning import make_variants
from tests import tiny

ENCODER = "encoder.block.1.layer.0.SelfAttention"
FIRST = "encoder.block.0.layer.0.SelfAttention"
DECODER = "decoder.block.1.layer.0.SelfAttention"
CROSS = "decoder.block.0.layer.1.EncDecAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"
WO = "decoder.block.1.layer.2.DenseReluDense.wo"
CROSS_O = "decoder.block.1.layer.1.EncDecAttention.o"
FFN = "decoder.block.0.layer.2.DenseReluDense"
SCHEME = {
    ENCODER: [Entry(0.25), Entry(0.5, None, {"o": Entry(0.3)})],
    FIRST: [Entry(0.5)],
    DECODER: [Entry(0.25, None, {"o": Entry(0.5)})],
    CROSS: [Entry(0.5)],
    WI: [Entry(0.3), Entry(0.7)],
    WO: [Entry(0.5)],
    CROSS_O: [Entry(0.4)],
    FFN: [Entry(1.0)],
}


def variants_of(dense: Checkpoint, scheme: dict[str, list[Entry]] = SCHEME) -> list[Variant]:
    return make_variants(dense, scheme, tiny.BY_WEIGHTS)


def batch_of(dense: Checkpoint, corpus: Corpus, count: int = 7) -> dict[str, Tensor]:
    """A batch whose sentences have different lengths on both sides."""
    pairs = Pairs(corpus, dense.tokenizer, "")
    items = []
    for index in range(count):
        item = pairs[index]
        cut, short = 2 + index % 4, 3 + index % 5
        items.append({"input_ids": item["input_ids"][-cut:], "labels": item["labels"][-short:]})
    return collator_for(dense)(items)


def options(folder: Path, **changes: Any) -> Options:
    return Options(
        **{
            "epochs": 3, "batch_size": 8, "lr": 0.02, "early_stop": 0, "device": "cpu",
            "checkpoint_dir": folder, **changes,
        }
    )  # fmt: skip


def tune(corpora: Any, folder: Path, scheme: Any = SCHEME, **changes: Any) -> Any:
    dense = tiny.checkpoint()
    result = gradient.tune(dense, variants_of(dense, scheme), corpora, options(folder, **changes))
    result.clean_up()
    return result


def run_dense(dense: Checkpoint, batch: dict[str, Tensor], hooked: str) -> list[Any]:
    """Run the whole dense model as its users do, and record one module's calls."""
    calls: list[Any] = []
    part = dense.model.get_submodule(hooked)
    handle = part.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        dense.model(**batch, use_cache=False)
    handle.remove()
    return calls


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [False, True])
def test_inputs_and_targets_are_the_dense_modules(
    corpora: Any, attention: str, gated: bool
) -> None:
    """Every student's own input, and its error from the recorded output of another dense model."""
    kind = {"attention": attention, "gated": gated}
    scheme = {name.replace(".wi", ".wi_1") if gated else name: e for name, e in SCHEME.items()}
    dense, twin = tiny.checkpoint(**kind), tiny.checkpoint(**kind)
    variants = [v for v in variants_of(dense, scheme) if v.tensors]
    batch = batch_of(dense, corpora[0])
    model = Distillation(dense, variants)
    met: dict[int, Any] = {}

    def note(index: int) -> Any:
        return lambda _, *call: met.update({index: call})

    for index, student in enumerate(model.students):
        student.register_forward_hook(note(index), with_kwargs=True)
    with torch.no_grad():
        errors, norms, counts = model(**batch)
    assert set(met) == set(range(len(variants)))
    for index, variant in enumerate(variants):
        ((args, kwargs, output),) = run_dense(twin, batch, variant.module)
        target = output[0] if variant.kind == "attention" else output
        torch.testing.assert_close(met[index][0][0], args[0], rtol=0, atol=0)
        keys = kwargs.get("key_value_states")
        assert (met[index][1].get("key_value_states") is None) == (keys is None)
        if keys is not None:
            torch.testing.assert_close(met[index][1]["key_value_states"], keys, rtol=0, atol=0)
        valid = batch["attention_mask"].bool()
        if variant.module.startswith("decoder"):
            valid = batch["labels"] != -100
        guess = met[index][2]
        guess = guess[0] if isinstance(guess, tuple) else guess
        for row in range(len(valid)):
            wanted = target[row][valid[row]].double()
            error = (guess[row][valid[row]].detach().double() - wanted).square().mean(1).sum()
            assert float(errors[row, index]) == pytest.approx(float(error), 1e-5)
            norm = wanted.square().mean(1).sum()
            assert float(norms[row, index]) == pytest.approx(float(norm), 1e-5)
            assert counts[row, index] == valid[row].sum()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [FIRST, ENCODER, DECODER, CROSS, WI, WO, CROSS_O])
def test_nothing_removed_gives_no_error(corpora: Any, attention: str, name: str) -> None:
    dense = tiny.checkpoint(attention=attention)
    module = next(m for m in dense.family.modules(dense.model) if m.name == name)
    own = own_parameters(dense.model.get_submodule(name), module)
    variant = Variant(
        name, module.kind, Entry(0.1, "test"),
        kept_units=[0, 1, 2, 3] if module.kind == "attention" else None,
        tensors={key: value.detach().clone() for key, value in own.items()},
    )  # fmt: skip
    batch = batch_of(dense, corpora[0])
    with torch.no_grad():
        errors, norms, _ = Distillation(dense, [variant])(**batch)
    assert norms.min() > 0
    # not a bit of difference where the same kernels run on the same numbers
    assert float((errors / norms).max()) < 1e-12


def test_every_pruned_student_has_an_error(corpora: Any) -> None:
    """The zero above means something: it is not what it says of everybody."""
    dense = tiny.checkpoint()
    variants = [v for v in variants_of(dense) if v.tensors]
    with torch.no_grad():
        errors, norms, _ = Distillation(dense, variants)(**batch_of(dense, corpora[0]))
    assert float((errors.sum(0) / norms.sum(0)).min()) > 1e-3


def test_padding_changes_nothing(corpora: Any) -> None:
    dense = tiny.checkpoint()
    variants = [v for v in variants_of(dense) if v.tensors]
    batch = batch_of(dense, corpora[0])
    longer = {
        name: torch.cat([t, torch.full_like(t, -100 if name == "labels" else 0)], 1)
        for name, t in batch.items()
    }
    model = Distillation(dense, variants).eval()
    with torch.no_grad():
        short, long = model(**batch), model(**longer)
    for before, after in zip(short, long, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_vocabulary_projection_is_never_called(corpora: Any, tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    calls: list[int] = []
    dense.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    gradient.tune(dense, variants_of(dense), corpora, options(tmp_path, epochs=1))
    assert calls == []
    dense.model.lm_head(torch.zeros(1, 32))
    assert calls == [1], "the hook of this test sees the projection"


def test_dense_model_is_unchanged(corpora: Any, tmp_path: Path) -> None:
    dense, untouched = tiny.checkpoint(), tiny.checkpoint()
    given = variants_of(dense)
    copies = [
        ({k: t.clone() for k, t in v.tensors.items()}, dict(v.stats), v.digest) for v in given
    ]
    gradient.tune(dense, given, corpora, options(tmp_path))
    for name, tensor in untouched.model.state_dict().items():
        assert torch.equal(dense.model.state_dict()[name], tensor), name
    assert not dense.model.training
    for variant, (tensors, stats, digest) in zip(given, copies, strict=True):
        assert all(torch.equal(variant.tensors[k], t) for k, t in tensors.items())
        assert (variant.stats, variant.digest) == (stats, digest)


def test_two_rates_together_equal_each_alone(corpora: Any, tmp_path: Path) -> None:
    """Also with patience: at this rate they stop at different epochs."""
    scheme = {WI: SCHEME[WI], ENCODER: SCHEME[ENCODER]}
    changes = {"epochs": 6, "lr": 0.1, "early_stop": 1}
    together = tune(corpora, tmp_path, scheme, **changes).variants
    assert len(together) == 4
    for variant in together:
        entry = next(
            e for e in scheme[variant.module]
            if e.rate == variant.entry.rate and e.parts.keys() == variant.entry.parts.keys()
        )  # fmt: skip
        (alone,) = tune(corpora, tmp_path, {variant.module: [entry]}, **changes).variants
        assert set(alone.tensors) == set(variant.tensors)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(variant.tensors[name], tensor, rtol=1e-6, atol=1e-6)
        for key in ("error_before", "error_after"):
            assert variant.stats[key] == pytest.approx(alone.stats[key], rel=1e-6)


def test_training_lowers_every_error_and_moves_every_tensor(corpora: Any, tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    before = {id(v): v for v in variants_of(dense)}
    result = tune(corpora, tmp_path)
    for old, new in zip(before.values(), result.variants, strict=True):
        if new.removed:
            continue
        assert new.stats["error_after"] < new.stats["error_before"], new.module
        for name, tensor in new.tensors.items():
            assert not torch.equal(tensor, old.tensors[name]), (new.module, name)
    assert result.kept == [None if new.removed else "trained" for new in result.variants]


class EveryStep(TrainerCallback):
    """Looks at all masked weights after every optimizer step, behind the callback that masks."""

    def __init__(self) -> None:
        self.steps, self.moved = 0, 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        parameters = dict(model.named_parameters())
        assert model.masks()
        for name, mask in model.masks().items():
            assert not parameters[name][~mask].any(), name
            self.moved += int(parameters[name][mask].ne(0).sum())
        self.steps += 1


def test_masked_weights_are_zero_after_every_step(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, real = EveryStep(), train.run

    def run(*args: Any, callbacks: Any, **kwargs: Any) -> Any:
        return real(*args, callbacks=(*callbacks, looking), **kwargs)

    monkeypatch.setattr(train, "run", run)
    result = tune(corpora, tmp_path)
    assert looking.steps == 3 * 6
    assert looking.moved > 0
    for variant in result.variants:
        for name, mask in variant.masks.items():
            assert not variant.tensors[name][~mask].any()
            assert 0 < int((~mask).sum()) < mask.numel()


@pytest.mark.parametrize("name", [WI, DECODER, CROSS])
def test_error_before_is_the_formula(corpora: Any, tmp_path: Path, name: str) -> None:
    """Squared error over squared output on the validation data, sentence by sentence."""
    scheme = {name: [SCHEME[name][0]]}
    (tuned,) = tune(corpora, tmp_path, scheme, epochs=1).variants
    dense = tiny.checkpoint()
    (variant,) = variants_of(dense, scheme)
    pruned = tiny.checkpoint()
    part = pruned.model.get_submodule(name)
    with torch.no_grad():  # the dense shape with zeros instead of the pruned one
        for key, parameter in own_parameters(part, _module(pruned, name)).items():
            if variant.kept_units is None:
                parameter.copy_(variant.tensors[key])
                continue
            rows = torch.cat([torch.arange(8) + 8 * head for head in variant.kept_units])
            full = torch.zeros_like(parameter)
            if key.startswith("o."):
                full[:, rows] = variant.tensors[key]
            else:
                full[rows] = variant.tensors[key]
            parameter.copy_(full)
    above = below = 0.0
    collate, pairs = collator_for(dense), Pairs(corpora[1], dense.tokenizer, "")
    for index in range(len(pairs)):
        batch = collate([pairs[index]])
        ((args, kwargs, output),) = run_dense(dense, batch, name)
        kwargs = {key: value for key, value in kwargs.items() if key not in CACHE}
        if variant.kind == "attention":
            kwargs["position_bias"] = output[1]
        with torch.no_grad():
            guess = part(*args, **kwargs)
        target, guess = (x[0] if isinstance(x, tuple) else x for x in (output, guess))
        above += float(((guess - target).double() ** 2).sum())
        below += float((target.double() ** 2).sum())
    assert tuned.stats["error_before"] == pytest.approx(above / below, rel=1e-5)


def _module(dense: Checkpoint, name: str) -> Any:
    return next(m for m in dense.family.modules(dense.model) if m.name == name)


def test_error_after_is_that_of_the_tensors(corpora: Any, tmp_path: Path) -> None:
    """Tuning what was tuned starts where the first tuning ended."""
    first = tune(corpora, tmp_path)
    dense = tiny.checkpoint()
    again = gradient.tune(dense, first.variants, corpora, options(tmp_path, epochs=1, lr=1e-9))
    for one, two in zip(first.variants, again.variants, strict=True):
        if not one.removed:
            assert two.stats["error_before"] == pytest.approx(one.stats["error_after"], rel=1e-6)


def test_removed_variants_pass_through_and_pairs_keep_both(corpora: Any, tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    given = variants_of(dense)
    result = gradient.tune(dense, given, corpora, options(tmp_path, epochs=1))
    assert [(v.module, v.entry) for v in result.variants] == [(v.module, v.entry) for v in given]
    removed = [v for v in result.variants if v.removed]
    assert removed == [v for v in given if v.module == FFN]
    pairs = [v for v in result.variants if v.entry.parts]
    assert {v.module for v in pairs} == {ENCODER, DECODER}
    for pair in pairs:
        mask = pair.masks["o.weight"]
        heads = len(pair.kept_units or [])
        assert pair.tensors["q.weight"].shape == (heads * 8, 32)
        assert mask.shape == pair.tensors["o.weight"].shape == (32, heads * 8)
        assert int((~mask).sum()) == int(32 * heads * 8 * pair.entry.parts["o"].rate + 0.5)


def test_another_tokenizer_starts_afresh(corpora: Any, tmp_path: Path) -> None:
    """Weights, variants and the text are the same; the ids that the model sees are not."""

    def resumed(word: str) -> float | None:
        dense = tiny.checkpoint()
        dense.tokenizer.add_tokens([word])
        variants = variants_of(dense, {WO: [Entry(0.5)]})
        result = gradient.tune(dense, variants, corpora, options(tmp_path, epochs=1))
        return result.report["resumed_from_epoch"]

    assert [resumed(word) for word in ("@", "in the", "#", "in the")] == [None, None, 1, 1]


def test_only_removed_variants_need_no_training(corpora: Any, tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    given = variants_of(dense, {FFN: [Entry(1.0)]})
    result = gradient.tune(dense, given, corpora, options(tmp_path))
    assert (result.variants, result.kept, result.rows) == (given, [None], [])


def test_patience_and_best_epoch_of_each(corpora: Any) -> None:
    """The bookkeeping, on errors that are written here."""
    dense = tiny.checkpoint()
    model = Distillation(dense, variants_of(dense, {WI: [Entry(0.3), Entry(0.5), Entry(0.7)]}))
    errors = torch.tensor(
        [[4, 4, 4], [3, 5, 3], [2, 6, 3], [1, 1, 2], [0.5, 0.5, 2.5], [9, 9, 2.7]],
        dtype=torch.float64,
    )
    norms = torch.tensor([2, 2, 2], dtype=torch.float64)
    weights = []
    for epoch, row in enumerate(errors):
        for student in model.students:
            with torch.no_grad():
                student.part.weight.fill_(epoch)
        model.update(row, norms, 2)
        weights.append([bool(stopped) for stopped in model.is_stopped])
    assert weights == [
        [False, False, False], [False, False, False], [False, True, False],
        [False, True, False], [False, True, False], [False, True, True],
    ]  # fmt: skip
    assert model.first_error.tolist() == [4, 4, 4]
    assert model.dense_norm.tolist() == [2, 2, 2]
    assert model.best_error.tolist() == [0.5, 4, 2]
    assert [float(p.tensors()["weight"][0, 0]) for p in model.students] == [4, 0, 3]
    trained = [next(p.part.parameters()).requires_grad for p in model.students]
    assert trained == [True, False, False]


def test_best_epoch_is_kept_where_training_makes_it_worse(corpora: Any, tmp_path: Path) -> None:
    result = tune(corpora, tmp_path, lr=5.0, epochs=2, early_stop=1)
    dense = tiny.checkpoint()
    for old, new in zip(variants_of(dense), result.variants, strict=True):
        for name, tensor in new.tensors.items():
            assert torch.equal(tensor, old.tensors[name])
        if not new.removed:
            assert new.stats["error_after"] == new.stats["error_before"]
    assert result.kept == [None if new.removed else "pruned" for new in result.variants]
    assert result.rows[-1]["epoch"] == 1, "all had stopped"


def test_dropout_is_off_while_training(corpora: Any) -> None:
    dense = tiny.checkpoint(dropout_rate=0.5)
    model = Distillation(dense, [v for v in variants_of(dense) if v.tensors])
    batch = batch_of(dense, corpora[0])
    model.train()
    first, second = model(**batch), model(**batch)
    assert first[0].requires_grad
    assert torch.equal(first[0], second[0])
    model.eval()
    assert torch.equal(model(**batch)[0], first[0])


def test_order_of_variants_does_not_matter(corpora: Any, tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    given = list(reversed(variants_of(dense)))
    backwards = gradient.tune(dense, given, corpora, options(tmp_path, epochs=1)).variants
    forwards = tune(corpora, tmp_path, epochs=1).variants
    for one, two in zip(forwards, reversed(backwards), strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-6, atol=1e-6)


def test_options_are_those_of_modules(corpora: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """No clipping across variants and no common early stopping, whatever the options say."""
    seen: list[Options] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append(next(arg for arg in args if isinstance(arg, Options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(KeyboardInterrupt):
        tune(corpora, tmp_path, clip=1.0, early_stop=3)
    wanted = dataclasses.replace(options(tmp_path), early_stop=0, clip=0.0)
    assert seen == [wanted]


def test_a_diverged_student_does_not_stop_the_others() -> None:
    dense = tiny.checkpoint()
    model = Distillation(dense, variants_of(dense))
    report, count = gradient.KeepBest(model, patience=2), len(model.students)

    def loss_of(errors: list[float]) -> float:
        values = np.array([[*errors, *[1.0] * count]])
        told = SimpleNamespace(predictions=values, label_ids=np.ones_like(values))
        loss = report.summarise(told)["loss"]
        model.update(report.errors, report.norms, patience=2)
        return loss

    assert loss_of([3.0] * count) == 3.0 * count
    assert loss_of([math.nan, *[2.0] * (count - 1)]) == 3.0 + 2.0 * (count - 1)
    assert model.best_error.tolist() == [3.0, *[2.0] * (count - 1)]
    assert model.bad_epochs.tolist() == [1, *[0] * (count - 1)]
