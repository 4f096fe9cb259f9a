"""The calibration: what is measured, by which tokens, in how many passes; what is reused."""

import copy
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composable.calibration import batching as calibrations
from composable.calibration import meter
from composable.calibration import obtain as calibration_runs
from composable.calibration.obtain import (
    Calibration,
    measure,
    obtain,
    open_calibration,
    parse_bytes,
)
from composable.errors import FormatError, MismatchError, UserError
from composable.linalg.grams import Gram
from composable.linalg.solver import squared_error
from composable.models.checkpoint import Checkpoint
from composable.tasks import translation
from composable.tasks.translation import Corpus
from tests import tiny

PLENTY = 2**30
ENCODER, DECODER = "encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.0.SelfAttention"
CROSS = [f"decoder.block.{block}.layer.1.EncDecAttention" for block in range(2)]
FFN = "decoder.block.0.layer.2.DenseReluDense"


def texts(split: str, samples: int, seed: int) -> Corpus:
    """Sentences of 1 to 12 words and translations of other lengths, so that batches pad."""
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> str:
        length = int(torch.randint(1, 13, (), generator=generator))
        picks = torch.randint(len(tiny.WORDS), (length,), generator=generator)
        return " ".join(tiny.WORDS[pick] for pick in picks)

    sides = [[sentence() for _ in range(samples)] for _ in range(2)]
    return Corpus("words", split, *sides, sha256=f"{seed:064x}")


CORPORA = (texts("train", 30, 1), texts("valid", 9, 2))


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    """Gated, so that wi_0 and wi_1 share; with dropout to be switched off."""
    return tiny.checkpoint(gated=True, dropout_rate=0.5)


@pytest.fixture(scope="module")
def measured(dense: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("calibration") / "calibration.npy"
    return measure(dense, CORPORA, path, PLENTY, linears=all_linears(dense))


def all_linears(dense: Checkpoint) -> list[str]:
    children = dense.model.named_modules()
    return [n for n, child in children if isinstance(child, nn.Linear) and n != "lm_head"]


def by_hand(dense: Checkpoint, corpus: Corpus) -> dict[str, Tensor]:
    """Inputs of all linears in float64, one sentence at a time: nothing pads, nothing is masked."""
    model = copy.deepcopy(dense.model).double().eval()
    rows: dict[str, list[Tensor]] = {name: [] for name in all_linears(dense)}
    for name, seen in rows.items():
        part = model.get_submodule(name)
        part.register_forward_pre_hook(lambda part, args, seen=seen: seen.append(args[0][0]))
    for source, target in zip(corpus.source, corpus.target, strict=True):
        ids = dense.tokenizer(source, return_tensors="pt")["input_ids"]
        labels = dense.tokenizer(target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(input_ids=ids, labels=labels)
    return {name: torch.cat(seen) for name, seen in rows.items()}


def assert_close(left: Gram, right: Gram, tolerance: float = 1e-5) -> None:
    """Compare second moments in units of the inputs' root mean squares."""
    scale = right.matrix.diagonal().sqrt()
    assert left.count == right.count
    assert ((left.matrix - right.matrix).abs() <= tolerance * scale[:, None] * scale).all()
    assert (left.total - right.total).abs().max() <= tolerance * scale.max() * right.count**0.5


# ------------------------------------------------------------------------ what is measured


def test_all_inputs_are_those_of_sentences_run_alone_in_float64(
    dense: Checkpoint, measured: Calibration
) -> None:
    assert sorted(measured.names) == sorted(all_linears(dense))
    for corpus, load in zip(CORPORA, (measured.inputs, measured.held_out), strict=True):
        for name, x in by_hand(dense, corpus).items():
            assert_close(load(name), Gram(x.T @ x, x.sum(0), len(x)))
            assert torch.equal(load(name).matrix, load(name).matrix.T)


def test_tokens_of_cross_attention_keys_and_values_are_the_sources(
    dense: Checkpoint, measured: Calibration
) -> None:
    # the end token counts; without the tokenizer's help
    source, target = (
        sum(len(line.split()) + 1 for line in lines)
        for lines in (CORPORA[0].source, CORPORA[0].target)
    )
    assert source != target
    assert measured.info["train"]["tokens"] == {"encoder": source, "decoder": target}
    for cross in CROSS:
        counts = {part: measured.inputs(f"{cross}.{part}").count for part in "qkvo"}
        assert counts == {"q": target, "k": source, "v": source, "o": target}


def test_what_reads_one_tensor_shares_its_moments(measured: Calibration) -> None:
    for attention in (ENCODER, DECODER):
        expected = tuple(f"{attention}.{part}" for part in "qkv")
        assert measured.sharing(f"{attention}.k") == expected
        assert measured.sharing(f"{attention}.o") == (f"{attention}.o",)
    assert measured.sharing(f"{FFN}.wi_1") == (f"{FFN}.wi_0", f"{FFN}.wi_1")
    keys_and_values = tuple(f"{cross}.{part}" for cross in CROSS for part in "kv")
    assert measured.sharing(f"{CROSS[1]}.k") == keys_and_values
    assert measured.sharing(f"{CROSS[1]}.q") == (f"{CROSS[1]}.q",)


@pytest.mark.parametrize("linear", [f"{ENCODER}.q", f"{CROSS[1]}.v", f"{FFN}.wo"])
def test_held_out_loss_is_the_mean_squared_error_of_the_module_run_on_the_texts(
    dense: Checkpoint, measured: Calibration, linear: str
) -> None:
    part = dense.model.get_submodule(linear)
    torch.manual_seed(0)
    other = nn.Linear(part.in_features, part.out_features).double()
    inputs = by_hand(dense, CORPORA[1])[linear]
    with torch.no_grad():
        expected = (other(inputs) - part.double()(inputs)).square().mean()
    part.float()
    change = torch.cat([other.weight - part.weight, other.bias[:, None]], 1).detach()
    held_out = measured.held_out(linear)
    loss = squared_error(held_out.augmented(), change) / (held_out.count * part.out_features)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_by_default_all_modules_of_kind_linear(dense: Checkpoint, tmp_path: Path) -> None:
    found = measure(dense, CORPORA, tmp_path / "c.npy", PLENTY)
    modules = dense.family.modules(dense.model)
    assert sorted(found.names) == sorted(m.name for m in modules if m.kind == "linear")


def test_training_mode_and_hooks_are_as_before(
    dense: Checkpoint, measured: Calibration, tmp_path: Path
) -> None:
    dense.model.train()
    try:
        again = measure(dense, CORPORA, tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
        assert dense.model.training
    finally:
        dense.model.eval()
    assert again.path.read_bytes() == measured.path.read_bytes()
    assert not any(child._forward_pre_hooks for child in dense.model.modules())


def twice_as_wide(collate: Callable[..., Any]) -> Callable[..., Any]:
    """Pad every batch to twice its length, the decoder's input with real tokens."""

    def wider(self: Any, items: Any) -> dict[str, Tensor]:
        batch = collate(self, items)
        fill = {"input_ids": 5, "attention_mask": 0, "labels": -100, "decoder_input_ids": 7}
        return {k: torch.cat([t, torch.full_like(t, fill[k])], 1) for k, t in batch.items()}

    return wider


@pytest.mark.parametrize("way", ["padding", "one sentence", "one batch"])
def test_padding_and_batches_change_nothing(
    dense: Checkpoint,
    measured: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    if way == "padding":
        wider = twice_as_wide(translation.Collator.__call__)
        monkeypatch.setattr(translation.Collator, "__call__", wider)
    else:
        size = 1 if way == "one sentence" else 10**6
        monkeypatch.setitem(calibrations.BATCH_TOKENS, "cpu", size)
    again = measure(dense, CORPORA, tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
    assert again.info == measured.info
    for name in measured.names:
        assert_close(again.inputs(name), measured.inputs(name))
        assert_close(again.held_out(name), measured.held_out(name))


@pytest.mark.parametrize("width", [1, 3, 4, 5, 33])
def test_sum_of_many_tokens(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(meter, "FLUSH", 10)
    torch.manual_seed(0)
    rows = [torch.randn(count, width) + 0.5 for count in (0, 7, 3, 1, 25, 10, 4)]
    total = meter.Sum(width, "cpu")
    for part in rows:
        total.add(part)
    x = torch.cat(rows).double()
    assert_close(total.result(), Gram(x.T @ x, x.sum(0), 50))


def test_bfloat16_autocast_of_the_caller_has_no_effect(
    dense: Checkpoint, measured: Calibration, tmp_path: Path
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = measure(dense, CORPORA, tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
    assert again.path.read_bytes() == measured.path.read_bytes()


# ------------------------------------------------------------------ our own mistakes, noticed


def test_linears_that_part_in_a_later_batch_are_noticed(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(calibrations.BATCH_TOKENS, "cpu", 64)
    calls = 0

    def part_ways(part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal calls
        calls += 1
        return (args[0].clone(),) if calls == 3 else None

    handle = dense.model.get_submodule(f"{ENCODER}.k").register_forward_pre_hook(part_ways)
    try:
        with pytest.raises(RuntimeError, match=r"SelfAttention\.v'\) do not read one tensor"):
            measure(dense, CORPORA, tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
    finally:
        handle.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stack", "message"),
    [("decoder", "do not read the decoder's tokens"), ("encoder", "do not read the encoder's")],
)
def test_the_mask_of_the_other_stack_is_noticed(
    dense: Checkpoint, stack: str, message: str
) -> None:
    linear = f"{ENCODER}.o" if stack == "decoder" else f"{DECODER}.o"
    one = meter.Meter(dense.model, dense.family, [meter.Shared((linear,), 32, stack)])
    batch = translation.collator_for(dense)([{"input_ids": [3, 4, 1], "labels": [5, 1]}])
    with pytest.raises(RuntimeError, match=message):
        one.measure(batch)


def test_a_linear_that_does_not_run_is_noticed(dense: Checkpoint) -> None:
    shared = meter.Shared(("lm_head",), 32, "decoder")
    batch = translation.collator_for(dense)([{"input_ids": [3, 4, 1], "labels": [5, 1]}])
    with pytest.raises(RuntimeError, match="did not run"):
        meter.Meter(dense.model, dense.family, [shared]).measure(batch)
    with pytest.raises(RuntimeError, match="not every one of"):
        meter.shared_inputs(dense.model, dense.family, {"lm_head": "decoder"}, batch)


# --------------------------------------------------------------------------- groups, budget


@pytest.mark.parametrize(
    ("budget", "passes", "warnings"), [(0, 21, 1), (20 * 32**2, 21, 1), (20 * 48**2, 14, 0)]
)
def test_the_budget_changes_the_number_of_passes_and_not_one_bit(
    dense: Checkpoint,
    measured: Calibration,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    budget: int,
    passes: int,
    warnings: int,
) -> None:
    caplog.set_level(logging.INFO, logger="composable")
    again = measure(dense, CORPORA, tmp_path / "c.npy", budget, linears=all_linears(dense))
    assert again.path.read_bytes() == measured.path.read_bytes()
    said = [record.getMessage() for record in caplog.records]
    assert any(f"passes: {passes}, " in line for line in said)
    assert sum("more than the memory budget of" in line for line in said) == warnings


@pytest.mark.parametrize("budget", [20 * 48**2, 3 * 20 * 32**2, 21 * 20 * 32**2])
def test_no_more_moments_are_held_than_the_budget_allows(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    held: list[weakref.ref[Tensor]] = []
    most = 0

    class Counted(meter.Sum):
        def __init__(self, width: int, device: Any):
            nonlocal most
            super().__init__(width, device)
            held.extend(weakref.ref(tensor) for tensor in (self._gram.matrix, self._recent))
            alive = [tensor for ref in held if (tensor := ref()) is not None]
            most = max(most, sum(tensor.nbytes for tensor in alive))

    monkeypatch.setattr(meter, "Sum", Counted)
    measure(dense, CORPORA, tmp_path / "c.npy", budget, linears=all_linears(dense))
    assert 0.9 * budget < most <= budget
    assert not any(ref() is not None for ref in held)


def test_too_little_text_is_said(
    dense: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = (texts("train", 5, 1), CORPORA[1])
    sides = (few[0].source, few[0].target)
    tokens = min(sum(len(line.split()) + 1 for line in side) for side in sides)
    assert tokens < 4 * 48
    measure(dense, few, tmp_path / "c.npy", PLENTY)
    warning = next(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert f"only {tokens} tokens for the 48 inputs of " in warning
    caplog.clear()
    measure(dense, CORPORA, tmp_path / "d.npy", PLENTY)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


# ---------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["lm_head", "encoder.block.9.layer.0.SelfAttention.o", ENCODER])
def test_what_is_no_linear_of_a_layer_is_refused(
    dense: Checkpoint, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match=f'^"{name}": the model has no such linear in a layer'):
        measure(dense, CORPORA, tmp_path / "c.npy", PLENTY, linears=[name])


def test_inputs_that_are_not_finite_leave_no_file(tmp_path: Path) -> None:
    broken = tiny.checkpoint()
    with torch.no_grad():
        broken.model.get_submodule("encoder.block.1.layer.1.DenseReluDense.wi").weight[0] = 1e30
    wo = "encoder.block.1.layer.1.DenseReluDense.wo"
    with pytest.raises(UserError, match=f'^the inputs of "{wo}" hold NaN or infinity') as caught:
        measure(broken, CORPORA, tmp_path / "c.npy", 0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_an_interrupted_pass_leaves_no_file_and_no_hook(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    left = 6 if budget else 15
    add = meter.Sum.add

    def interrupt(self: Any, rows: Tensor) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(meter.Sum, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(dense, CORPORA, tmp_path / "c.npy", budget)
    assert list(tmp_path.iterdir()) == []
    assert not any(child._forward_pre_hooks for child in dense.model.modules())


# ----------------------------------------------------------------------------------- obtain


@pytest.fixture
def place(measured: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A calibration that is there, where nothing may be measured any more."""
    path = tmp_path / "calibration.npy"
    path.write_bytes(measured.path.read_bytes())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(calibration_runs, "measure", fail)
    return path


def refused(place: Path, *args: Any, **kwargs: Any) -> str:
    before = place.read_bytes()
    with pytest.raises((MismatchError, FormatError)) as caught:
        obtain(*args, place, PLENTY, **kwargs)
    assert place.read_bytes() == before
    message = str(caught.value)
    assert message.startswith(f"{place}: ")
    assert message.endswith(
        "; name another file with --calibration, or delete this one to measure it again."
    )
    return message.removeprefix(f"{place}: ").partition("; name another")[0]


def test_a_calibration_of_this_model_and_these_texts_is_reused(
    dense: Checkpoint, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="composable")
    found = obtain(dense, CORPORA, place, PLENTY)
    assert found.path == place
    assert caplog.messages == [f"calibration: {place} is of this model and these texts, reused"]
    obtain(dense, CORPORA, place, 0, linears=[f"{ENCODER}.q"])


def test_where_there_is_none_it_is_measured(dense: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.npy"
    found = obtain(dense, CORPORA, path, PLENTY, linears=[f"{ENCODER}.q"])
    assert found.names == (f"{ENCODER}.q",)
    assert found.fingerprint == dense.fingerprint
    assert [path] == list(path.parent.iterdir())
    assert open_calibration(path).info == {
        "prefix": "",
        "train": {
            "name": "words", "samples": 30, "sha256": f"{1:064x}", "split": "train",
            "tokens": found.info["train"]["tokens"],
        },
        "valid": {
            "name": "words", "samples": 9, "sha256": f"{2:064x}", "split": "valid",
            "tokens": found.info["valid"]["tokens"],
        },
    }  # fmt: skip


def test_another_models_calibration(place: Path) -> None:
    other = tiny.checkpoint(seed=1, gated=True)
    fingerprints = open_calibration(place).fingerprint[:12], other.fingerprint[:12]
    assert refused(place, other, CORPORA) == (
        f"measured on another model (fingerprint {fingerprints[0]}, this one has {fingerprints[1]})"
    )


@pytest.mark.parametrize("split", [0, 1])
def test_other_texts(dense: Checkpoint, place: Path, split: int) -> None:
    corpora = list(CORPORA)
    corpora[split] = texts(CORPORA[split].split, 4, seed=255)
    name, samples = (("train", 30), ("valid", 9))[split]
    digest = f"{split + 1:064x}"[:12]
    assert refused(place, dense, tuple(corpora)) == (
        f"measured on other texts (words {name}, {samples} samples, SHA-256 {digest}; "
        f"now words {name}, 4 samples, SHA-256 {255:064x}"[:-52]
        + ")"
    )


def test_the_splits_exchanged_are_other_texts(dense: Checkpoint, place: Path) -> None:
    assert "measured on other texts" in refused(place, dense, CORPORA[::-1])


def test_another_prefix(dense: Checkpoint, place: Path) -> None:
    other = copy.copy(dense)
    other.info = {**dense.info, "prefix": "translate: "}
    expected = 'measured with the prefix "", this model has "translate: "'
    assert refused(place, other, CORPORA) == expected


def test_missing_linears(dense: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "c.npy"
    measure(dense, CORPORA, path, PLENTY, linears=[f"{ENCODER}.q", f"{ENCODER}.k"])
    expected = f'has no moments of "{ENCODER}.o" (has those of 2 linears)'
    assert refused(path, dense, CORPORA) == expected
    assert refused(path, dense, CORPORA, linears=[f"{ENCODER}.q", f"{ENCODER}.o"]) == expected


def test_a_damaged_calibration(dense: Checkpoint, place: Path) -> None:
    content = place.read_bytes()
    place.write_bytes(content[:-9])
    assert refused(place, dense, CORPORA).startswith("truncated (")


# ------------------------------------------------------------------------------ parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("1K", 1024),
        ("512M", 2**29),
        ("4g", 2**32),
        (" 1.5G ", 3 * 2**29),
        ("9" * 400, int("9" * 400)),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4X", "4GB", "G", "1e9", "0.1", "nan", "\u0661"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_bytes(text)
    assert str(caught.value) == (
        f"--memory-budget {text}: expected a number of bytes above 0, which may end in K, M or G, "
        "such as 512M or 4G."
    )
