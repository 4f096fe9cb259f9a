"""train, callbacks and the translation task: order, loss, masks, best epoch, stats, options."""

import csv
import dataclasses
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from composable import families
from composable.errors import UserError
from composable.formats.stats_file import stats_csv
from composable.models import surgery
from composable.models.structure import Edit
from composable.tasks import translation
from composable.tasks.losses import token_losses
from composable.tasks.translation import Pairs, collator_for
from composable.training import train
from composable.training.callbacks import LengthSampler, best_of
from composable.training.options import Options
from tests import tiny


class Look(TrainerCallback):
    """Calls a function with the model after every optimizer step and every validation."""

    def __init__(self, step: Any = None, validation: Any = None):
        self.step, self.validation, self.steps = step, validation, 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.step:
            self.step(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.validation:
            self.validation(kwargs["model"])


def tune(
    corpora: Any, folder: Path, masks: Any = None, look: Look | None = None, model: Any = None,
    smoothing: float = 0.0, stats: Path | None = None, **changes: Any,
) -> tuple[Any, train.Outcome]:  # fmt: skip
    made = tiny.checkpoint(dropout_rate=0.0)
    made.model = model or made.model
    settings = {
        "epochs": 3, "batch_size": 8, "lr": 0.02, "early_stop": 0, "device": "cpu",
        "checkpoint_dir": folder, **changes,
    }  # fmt: skip
    outcome = train.run(
        made.model,
        masks or {},
        (
            Pairs(corpora[0], made.tokenizer, ""),
            Pairs(corpora[1], made.tokenizer, "", is_sorted=True),
            collator_for(made),
        ),
        translation.training_functions(smoothing),
        Options(**settings),
        {"test": 1},
        stats,
        callbacks=(look,) if look else (),
    )
    outcome.clean_up()
    return made, outcome


# the order of the data

SIZES = [((7 * i) % 23 + 3, (7 * i) % 23 + (5 * i) % 7) for i in range(203)]


def order_of(seed: int = 1, epoch: int = 0, **share: int) -> list[list[int]]:
    sampler = LengthSampler(SIZES, 16, seed, **share)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 13
    return batches


def test_order_is_a_permutation_in_full_batches() -> None:
    batches = order_of()
    assert sorted(i for batch in batches for i in batch) == list(range(203))
    assert [len(batch) for batch in batches] == [16] * 12 + [11]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    first = order_of()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert order_of() == first
    assert order_of(epoch=1) != first
    assert order_of(seed=2) != first
    sampler = LengthSampler(SIZES, 16, 1)
    assert list(sampler) == list(sampler) == first, "an epoch may be started twice"


def test_sentences_of_a_batch_are_about_equally_long() -> None:
    for side, most in ((0, 7), (1, 7)):
        lengths = [[SIZES[i][side] for i in batch] for batch in order_of()]
        spread = [max(batch) - min(batch) for batch in lengths]
        assert max(spread) <= most, "of 23"
        means = [sum(batch) / len(batch) for batch in lengths]
        assert means != sorted(means), "long batches do not come first"
        assert means != sorted(means, reverse=True)


def test_batches_pad_less_than_those_of_one_side_alone() -> None:
    """6,400 pairs whose sides go together loosely, as those of translations do."""
    torch.manual_seed(0)
    source = (torch.randn(6400) * 4 + 16).clamp(4, 40).int()
    target = (source + torch.randn(6400) * 3).clamp(4, 50).int()
    sizes = list(zip(target.tolist(), source.tolist(), strict=True))

    def padded(batches: list[list[int]]) -> float:
        widths = [[max(sizes[i][side] for i in batch) for side in (0, 1)] for batch in batches]
        wide = sum(len(b) * sum(pair) for b, pair in zip(batches, widths, strict=True))
        return wide / sum(map(sum, sizes))

    def sorted_by(key: Any) -> list[list[int]]:
        order = sorted(range(6400), key=key)
        return [order[i : i + 64] for i in range(0, 6400, 64)]

    found = padded(list(LengthSampler(sizes, 64, 0)))
    assert found < 1.12
    assert found < padded(sorted_by(lambda i: sum(sizes[i])))
    assert found < padded(sorted_by(lambda i: sizes[i]))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_shares_of_processes_make_one_global_batch(world: int) -> None:
    shares = [order_of(rank=rank, world=world) for rank in range(world)]
    for whole, *parts in zip(order_of(), *shares, strict=True):
        counted = sorted(index for part in parts for index in part)
        if len(whole) % world:  # the last: all take all of it, which leaves the mean as it is
            assert parts == [whole] * world
        else:
            assert counted == sorted(whole)
            assert {len(part) for part in parts} == {len(whole) // world}


def test_training_goes_through_the_epochs(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch has its own order, that of the sampler."""
    read: list[int] = []

    def get(self: Pairs, index: int) -> Any:
        if len(self) == 44:
            read.append(index)
        return self.items[index]

    monkeypatch.setattr(Pairs, "__getitem__", get)
    made, _ = tune(corpora, tmp_path, seed=5)
    sampler = LengthSampler(Pairs(corpora[0], made.tokenizer, "").sizes, 8, 5)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append([index for batch in sampler for index in batch])
    assert read[:44] == [*range(44)], "for the identity of the run"
    assert [read[44:88], read[88:132], read[132:]] == expected
    assert len({tuple(order) for order in expected}) == 3


def test_fewer_samples_than_a_batch() -> None:
    sampler = LengthSampler([(3, 3), (1, 1), (2, 2)], 8, 0)
    assert [sorted(batch) for batch in sampler] == [[0, 1, 2]]


# collator and loss


@pytest.mark.parametrize("gated", [False, True])
def test_batches_equal_those_of_transformers(corpora: Any, gated: bool) -> None:
    made = tiny.checkpoint(gated=gated)
    pairs = Pairs(corpora[0], made.tokenizer, "a cat : ")
    items = []
    for i in range(9):
        ids, labels = pairs[i]["input_ids"], pairs[i]["labels"]
        items.append({"input_ids": ids[i % 4 :], "labels": labels[i % 5 :]})
    expected = DataCollatorForSeq2Seq(made.tokenizer, model=made.model)(
        [{**item, "attention_mask": [1] * len(item["input_ids"])} for item in items]
    )
    batch = collator_for(made)(items)
    assert set(batch) == set(expected)
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, expected[name]), name
    assert (batch["labels"] == -100).any()
    assert (batch["attention_mask"] == 0).any()


def test_pairs_are_whole_sentences_with_prefix_and_end(corpora: Any) -> None:
    tokenizer = tiny.tokenizer()
    source, target = corpora[0].source[0], corpora[0].target[0]
    item = Pairs(corpora[0], tokenizer, "a cat : ")[0]
    assert item["input_ids"] == tokenizer("a cat : " + source)["input_ids"]
    assert item["labels"] == tokenizer(target)["input_ids"]
    assert item["input_ids"][-1] == item["labels"][-1] == 1
    ordered = Pairs(corpora[0], tokenizer, "", is_sorted=True).lengths
    assert ordered == sorted(ordered, reverse=True)


def by_hand(logits: Any, labels: Any, smoothing: float = 0.0) -> tuple[float, int]:
    """Cross-entropy of every token that counts, in double precision, with Python's own sums."""
    total, count = 0.0, 0
    for row, wanted in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for scores, label in zip(row, wanted, strict=True):
            if label == -100:
                continue
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            uniform = log_sum - sum(scores) / len(scores)
            total += (1 - smoothing) * (log_sum - scores[label]) + smoothing * uniform
            count += 1
    return total, count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_tokens(smoothing: float) -> None:
    """Only tokens that count meet the vocabulary; the model is left as it was."""
    made = tiny.checkpoint(dropout_rate=0.0)
    torch.manual_seed(0)
    labels = torch.randint(11, (3, 5))
    labels[0, 3:] = labels[2, 1:] = -100
    ids = torch.randint(1, 11, (3, 5))
    batch = {"input_ids": ids, "labels": labels, "decoder_input_ids": ids}
    met: list[torch.Size] = []
    hook = made.model.lm_head.register_forward_hook(lambda *call: met.append(call[2].shape))
    found = token_losses(made.model, batch, smoothing)
    hook.remove()
    assert met == [(9, 64)]
    assert not made.model.lm_head._forward_pre_hooks
    with torch.no_grad():
        logits = made.model(input_ids=ids, decoder_input_ids=ids).logits
    total, count = by_hand(logits, labels, smoothing)
    assert found.shape == labels.shape
    assert int(found.ne(0).sum()) == count == 9
    assert found.sum().item() == pytest.approx(total, rel=1e-6)
    assert not found[labels == -100].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_the_plain_loss(gated: bool, smoothing: float) -> None:
    """In float64, against all logits and torch's cross-entropy; tied and untied vocabularies."""
    model = tiny.t5(gated=gated, dropout_rate=0.0).double()
    torch.manual_seed(0)
    ids = torch.randint(1, 60, (4, 7))
    labels = ids.clone()
    labels[1, 4:] = labels[3, 1:] = -100
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    weight = torch.rand(4)
    (token_losses(model, inputs | {"labels": labels}, smoothing).sum(1) * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(**inputs).logits.transpose(1, 2)
    plain = torch.nn.functional.cross_entropy(
        logits, labels, label_smoothing=smoothing, reduction="none"
    )
    (plain.sum(1) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_losses_of_a_training_are_token_means(corpora: Any, tmp_path: Path) -> None:
    """One step of all sentences at hardly any rate: training and validation loss by hand."""
    made, outcome = tune(corpora, tmp_path, epochs=1, batch_size=64, lr=1e-12, smoothing=0.1)
    collate = collator_for(made)
    for corpus, key, smoothing in (
        (corpora[0], "training_loss", 0.1),
        (corpora[1], "validation_loss", 0.0),
    ):
        total, count = 0.0, 0
        pairs = Pairs(corpus, made.tokenizer, "")
        for index in range(len(pairs)):
            batch = collate([pairs[index]])
            with torch.no_grad():
                logits = made.model(**batch).logits
            one, tokens = by_hand(logits, batch["labels"], smoothing)
            total, count = total + one, count + tokens
        assert outcome.rows[-1][key] == pytest.approx(total / count, rel=1e-5), key


# what a training does


def masks_of(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("encoder.block.0.layer.1.DenseReluDense.wi.weight",
             "decoder.block.1.layer.1.EncDecAttention.o.weight")  # fmt: skip
    shapes = dict(model.named_parameters())
    return {name: torch.rand(shapes[name].shape, generator=generator) > 0.4 for name in names}


def test_masked_weights_are_zero_after_every_step(corpora: Any, tmp_path: Path) -> None:
    masks = masks_of(tiny.t5())

    def check(model: Any) -> None:
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            assert not parameters[name][~mask].any()
            assert parameters[name][mask].all()

    look = Look(check, check)
    made, _ = tune(corpora, tmp_path, masks, look)
    assert look.steps == 18
    check(made.model)


def test_masked_weights_do_not_reach_the_optimizer(corpora: Any, tmp_path: Path) -> None:
    """A weight that is masked gets no gradient: Adafactor's statistics are those of zeros."""
    masks, seen = masks_of(tiny.t5()), []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            parameters = dict(kwargs["model"].named_parameters())
            for name, mask in masks.items():
                assert not parameters[name].grad[~mask].any()
                seen.append(bool(parameters[name].grad[mask].any()))

    tune(corpora, tmp_path, masks, Gradients(), epochs=1)  # type: ignore[arg-type]
    assert seen == [True] * 12


def test_early_stopping_and_best_epoch(corpora: Any, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def keep(model: Any) -> None:
        states.append({name: t.clone() for name, t in model.state_dict().items()})

    made, outcome = tune(corpora, tmp_path, None, Look(None, keep), epochs=12, lr=0.4, early_stop=2)
    losses = [row["validation_loss"] for row in outcome.rows]
    assert outcome.best_epoch == losses.index(min(losses)) == len(losses) - 3
    assert outcome.best_epoch > 0
    assert [row["epoch"] for row in outcome.rows] == list(range(len(losses)))
    assert len(losses) < 13
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, states[outcome.best_epoch][name]), name
        assert tensor.device.type == "cpu"
    assert not made.model.training
    report = outcome.report()
    assert report["validation_loss_start"] == losses[0]
    assert report["validation_loss"] == min(losses)
    assert (report["epochs"], report["best_epoch"]) == (len(losses) - 1, outcome.best_epoch)


def test_patience_zero_never_stops(corpora: Any, tmp_path: Path) -> None:
    _, outcome = tune(corpora, tmp_path, epochs=6, lr=2.0, early_stop=0)
    assert len(outcome.rows) == 7


@pytest.mark.parametrize(
    ("losses", "best"), [([3, 2, 1], 2), ([1, 2, 3], 0), ([2, 1, 1], 1), ([5], 0)]
)
def test_best_of(losses: list[float], best: int) -> None:
    assert best_of(losses) == best


def test_start_is_kept_where_training_makes_it_worse(
    corpora: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, _ = tune(corpora, tmp_path, epochs=8, lr=0.05)
    before = {name: t.clone() for name, t in good.model.state_dict().items()}
    made, outcome = tune(corpora, tmp_path, model=good.model, epochs=2, lr=3.0)
    assert outcome.best_epoch == 0
    assert outcome.report()["validation_loss"] == outcome.rows[0]["validation_loss"]
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "the start is kept" in caplog.text


@pytest.mark.parametrize("lr", [1e30, math.inf])
def test_loss_that_is_not_finite_is_one_error(corpora: Any, tmp_path: Path, lr: float) -> None:
    with pytest.raises(UserError, match=r"^validation loss became nan in epoch 1; use a lower"):
        tune(corpora, tmp_path, lr=lr)


def test_stats_have_a_row_for_every_epoch_from_zero(corpora: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    path = tmp_path / "stats.csv"
    look = Look(None, lambda _: seen.append(len(path.read_text().splitlines()) - 1))
    _, outcome = tune(corpora, tmp_path, None, look, stats=path)
    assert seen == [1, 2, 3, 4], "rewritten after every validation"
    text = path.read_text()
    assert text.splitlines()[0] == (
        "epoch,training_loss,validation_loss,training_seconds,validation_seconds,learning_rate"
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0]["training_loss"] == ""
    assert (float(rows[0]["training_seconds"]), float(rows[0]["learning_rate"])) == (0, 0)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert float(row["training_loss"]) > 0
        assert float(row["training_seconds"]) > 0
        assert 0 < float(row["learning_rate"]) <= 0.02
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["validation_loss"])
    assert stats_csv(outcome.rows) == text


def test_learning_rate_warms_up_and_decays(corpora: Any, tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    tune(corpora, tmp_path, None, Rates(), epochs=4, warmup=0.25, final_lr=0.5)  # type: ignore[arg-type]
    warm, count = 6, 24
    up = [0.02 * (step + 1) / warm for step in range(warm)]
    left = [(count - step) / (count - warm) for step in range(warm, count)]
    assert rates == pytest.approx([*up, *(0.02 * (0.5 + 0.5 * share) for share in left)])


@pytest.mark.parametrize(
    ("steps", "epochs"),
    [(4, [0, 0.6667]), (12, [0, 1, 2]), (13, [0, 1, 2, 2.1667]), (1, [0, 0.1667])],
)
def test_steps_end_a_training_with_its_schedule(
    corpora: Any, tmp_path: Path, steps: int, epochs: list[float]
) -> None:
    """6 steps are an epoch; it may end before or after the one that `epochs` names."""
    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    path = tmp_path / "stats.csv"
    _, outcome = tune(
        corpora, tmp_path, None, Rates(), epochs=1, steps=steps, warmup=0.25, stats=path
    )  # type: ignore[arg-type]
    warm = max(1, steps // 4)
    up = [0.02 * (step + 1) / warm for step in range(warm)]
    down = [0.02 * (steps - step) / max(1, steps - warm) for step in range(warm, steps)]
    assert rates == pytest.approx([*up, *down])
    assert [row["epoch"] for row in outcome.rows] == epochs
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["epoch"] for row in lines] == [str(epoch) for epoch in epochs]
    assert float(lines[-1]["training_loss"]) > 0
    losses = [row["validation_loss"] for row in outcome.rows]
    assert outcome.best_epoch == epochs[losses.index(min(losses))] > 0
    assert outcome.report()["validation_loss"] == min(losses)
    assert outcome.report()["epochs"] == epochs[-1]


def test_autocast_leaves_float32_weights(corpora: Any, tmp_path: Path) -> None:
    met: set[torch.dtype] = set()
    model = tiny.t5(dropout_rate=0.0)
    linear = model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wi")
    linear.register_forward_hook(lambda _, args, output: met.add(output.dtype))
    made, outcome = tune(corpora, tmp_path, model=model, dtype="bfloat16")
    assert met == {torch.bfloat16}
    assert {tensor.dtype for tensor in made.model.state_dict().values()} == {torch.float32}
    assert outcome.rows[-1]["validation_loss"] < outcome.rows[0]["validation_loss"]
    _, plain = tune(corpora, tmp_path)
    assert plain.rows[-1]["validation_loss"] != outcome.rows[-1]["validation_loss"]


def losses_of(corpora: Any, folder: Path, **changes: Any) -> list[float]:
    made, outcome = tune(corpora, folder, epochs=2, smoothing=0.1, **changes)
    assert made.model._compiled_call_impl is None
    return [row["validation_loss"] for row in outcome.rows]


def test_workers_prepare_the_same_batches(corpora: Any, tmp_path: Path) -> None:
    assert losses_of(corpora, tmp_path) == losses_of(corpora, tmp_path, workers=2)


def test_compiled_model_gets_the_same_loss(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives all its logits, since hooks that change would be compiled again and again."""
    calls, met = [], set()

    def pretend(model: Any, **settings: Any) -> None:
        calls.append(settings)
        model._compiled_call_impl = model._call_impl
        model.lm_head.register_forward_hook(lambda *call: met.add(call[2].dim()))

    expected = losses_of(corpora, tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", pretend)
    assert losses_of(corpora, tmp_path, compile=True) == pytest.approx(expected, rel=1e-4)
    assert calls == [{"dynamic": True}]
    assert met == {3}


@pytest.mark.nightly
def test_compilation(corpora: Any, tmp_path: Path) -> None:
    """The compiler itself, for minutes."""
    found = losses_of(corpora, tmp_path, compile=True)
    assert found == pytest.approx(losses_of(corpora, tmp_path), rel=1e-2)


def test_same_seed_same_weights(corpora: Any, tmp_path: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        made, _ = tune(corpora, tmp_path, model=tiny.t5(dropout_rate=0.2), seed=seed, epochs=1)
        weight: torch.Tensor = made.model.shared.weight.clone()
        return weight

    first = weights(1)
    torch.manual_seed(1234)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


def test_attention_without_heads_can_be_trained(corpora: Any, tmp_path: Path) -> None:
    """Its q, k, v, o hold nothing: Adafactor and safetensors must not stumble over them."""
    model = tiny.t5(dropout_rate=0.0)
    gone = "decoder.block.1.layer.1.EncDecAttention"
    surgery.apply_structure(model, families.of(model), (Edit(gone, "remove"),))
    assert model.get_submodule(gone).q.weight.shape == (0, 32)
    _, outcome = tune(corpora, tmp_path, model=model)
    assert outcome.rows[-1]["validation_loss"] < outcome.rows[0]["validation_loss"]


# options


def test_batch_that_does_not_divide(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"^batch_size 8 does not divide among 3 processes\.$"):
        tune(corpora, tmp_path)


def test_float16_on_the_cpu(corpora: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^dtype float16 trains on a GPU only; use bfloat16"):
        tune(corpora, tmp_path, dtype="float16")


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_seed_that_numpy_refuses(corpora: Any, tmp_path: Path, seed: int) -> None:
    with pytest.raises(UserError, match=r"training options do not work here: Seed must be between"):
        tune(corpora, tmp_path, seed=seed)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_one_error(corpora: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not work here: .*wandb.*pip install wandb"):
        tune(corpora, tmp_path, report_to="wandb")


def test_tensorboard_gets_the_losses(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "x")  # so that the end of the test removes it
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    _, outcome = tune(corpora, tmp_path, report_to="tensorboard")
    (events,) = tmp_path.glob("runs/train-*/events.out.tfevents.*")
    found = reader.EventAccumulator(str(events.parent)).Reload()
    losses = [event.value for event in found.Scalars("eval/loss")]
    assert losses == pytest.approx([row["validation_loss"] for row in outcome.rows], rel=1e-6)
    assert not list(tmp_path.glob("train-*")), "checkpoints are gone, the curves stay"


def test_identity_is_all_but_where_and_how_it_reports(tmp_path: Path) -> None:
    options = Options(epochs=1, batch_size=2, lr=0.1, early_stop=0)
    same = dataclasses.replace(
        options, resume=False, checkpoint_dir=tmp_path, report_to="tensorboard", workers=2
    )
    assert options.identity() == same.identity()
    for change in (
        {"epochs": 2}, {"batch_size": 1}, {"lr": 0.2}, {"early_stop": 1}, {"seed": 1},
        {"device": "cpu"}, {"dtype": "bfloat16"}, {"warmup": 0.0}, {"clip": 0.0},
        {"smoothing": 0.1}, {"final_lr": 0.1}, {"steps": 5},
        {"compile": True},
    ):  # fmt: skip
        assert dataclasses.replace(options, **change).identity() != options.identity(), change
