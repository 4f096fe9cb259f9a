"""The calibration: what is measured, by which tokens, in how many passes; what is reused."""

import copy
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from composable.calibration import batching, collect
from composable.calibration import obtain as calibration_runs
from composable.calibration.batching import Texts
from composable.calibration.obtain import Calibration, measure, obtain, open_calibration
from composable.calibration.second_moments import InputMoments, SharedInput, shared_inputs
from composable.errors import FormatError, MismatchError, UserError
from composable.formats.calibration_file import REMEDY
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
    return measure(dense, read(dense), path, PLENTY, linears=all_linears(dense))


def read(dense: Checkpoint, corpora: tuple[Corpus, ...] = CORPORA) -> tuple[Texts, ...]:
    """Tokenise the texts for a model."""
    return tuple(Texts(dense, corpus) for corpus in corpora)


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
    source, target = tokens_of(CORPORA[0]).values()
    assert source != target
    assert measured.info["train"]["tokens"] == {"encoder": source, "decoder": target}
    for cross in CROSS:
        counts = {part: measured.inputs(f"{cross}.{part}").count for part in "qkvo"}
        assert counts == {"q": target, "k": source, "v": source, "o": target}


def test_what_reads_one_tensor_shares_its_moments(measured: Calibration) -> None:
    records = {item.linears for item in measured.header.inputs}
    alone = {(f"{attention}.o",) for attention in (ENCODER, DECODER)} | {(f"{CROSS[1]}.q",)}
    together = {tuple(f"{attention}.{part}" for part in "qkv") for attention in (ENCODER, DECODER)}
    keys_and_values = tuple(f"{cross}.{part}" for cross in CROSS for part in "kv")
    assert records >= alone | together | {keys_and_values, (f"{FFN}.wi_0", f"{FFN}.wi_1")}


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
    found = measure(dense, read(dense), tmp_path / "c.npy", PLENTY)
    modules = dense.family.modules(dense.model)
    assert sorted(found.names) == sorted(m.name for m in modules if m.kind == "linear")


def test_training_mode_and_hooks_are_as_before(
    dense: Checkpoint, measured: Calibration, tmp_path: Path
) -> None:
    dense.model.train()
    try:
        again = measure(dense, read(dense), tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
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
        monkeypatch.setattr(batching, "CPU_TOKENS", size)
    again = measure(dense, read(dense), tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
    assert again.info == measured.info
    for name in measured.names:
        assert_close(again.inputs(name), measured.inputs(name))
        assert_close(again.held_out(name), measured.held_out(name))


def test_bfloat16_autocast_of_the_caller_has_no_effect(
    dense: Checkpoint, measured: Calibration, tmp_path: Path
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = measure(dense, read(dense), tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
    assert again.path.read_bytes() == measured.path.read_bytes()


# ------------------------------------------------------------------ our own mistakes, noticed


def test_linears_that_part_in_a_later_batch_are_noticed(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CPU_TOKENS", 64)
    calls = 0

    def part_ways(part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal calls
        calls += 1
        return (args[0].clone(),) if calls == 3 else None

    handle = dense.model.get_submodule(f"{ENCODER}.k").register_forward_pre_hook(part_ways)
    try:
        with pytest.raises(RuntimeError, match=r"SelfAttention\.v'\) do not read one tensor"):
            measure(dense, read(dense), tmp_path / "c.npy", PLENTY, linears=all_linears(dense))
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
    one = InputMoments(dense.model, dense.family, [SharedInput((linear,), 32, stack)])
    batch = translation.collator_for(dense)([{"input_ids": [3, 4, 1], "labels": [5, 1]}])
    with pytest.raises(RuntimeError, match=message):
        one.measure(batch)


def test_a_linear_that_does_not_run_is_noticed(dense: Checkpoint) -> None:
    shared = SharedInput(("lm_head",), 32, "decoder")
    batch = translation.collator_for(dense)([{"input_ids": [3, 4, 1], "labels": [5, 1]}])
    with pytest.raises(RuntimeError, match="did not run"):
        InputMoments(dense.model, dense.family, [shared]).measure(batch)
    with pytest.raises(RuntimeError, match="not every one of"):
        shared_inputs(dense.model, dense.family, {"lm_head": "decoder"}, batch)


# --------------------------------------------------------------------------- groups, budget


@pytest.mark.parametrize(
    ("budget", "passes", "warnings"), [(0, 21, 1), (12 * 32**2, 21, 1), (12 * 48**2, 14, 0)]
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
    again = measure(dense, read(dense), tmp_path / "c.npy", budget, linears=all_linears(dense))
    assert again.path.read_bytes() == measured.path.read_bytes()
    said = [record.getMessage() for record in caplog.records]
    assert any(f"passes: {passes}, " in line for line in said)
    assert sum("more than the memory budget of" in line for line in said) == warnings


@pytest.mark.parametrize("budget", [12 * 48**2, 3 * 12 * 32**2, 21 * 12 * 32**2])
def test_no_more_moments_are_held_than_the_budget_allows(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    held: list[weakref.ref[Tensor]] = []
    most = 0
    add = Gram.add

    def counted(self: Gram, rows: Tensor) -> None:
        nonlocal most
        add(self, rows)
        assert self._recent is not None
        known = [ref() for ref in held]
        for tensor in (self._matrix, self._recent):
            if not any(tensor is one for one in known):
                held.append(weakref.ref(tensor))
        alive = [tensor for ref in held if (tensor := ref()) is not None]
        most = max(most, sum(tensor.nbytes for tensor in alive))

    monkeypatch.setattr(Gram, "add", counted)
    measure(dense, read(dense), tmp_path / "c.npy", budget, linears=all_linears(dense))
    assert 0.9 * budget < most <= budget
    assert not any(ref() is not None for ref in held)


def test_too_little_text_is_said(
    dense: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = (texts("train", 5, 1), CORPORA[1])
    tokens = min(tokens_of(few[0]).values())
    assert tokens < 4 * 48
    caplog.set_level(logging.WARNING, logger="composable")
    measure(dense, read(dense, few), tmp_path / "c.npy", PLENTY)
    warning = next(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert f"only {tokens} tokens for the 48 inputs of " in warning
    caplog.clear()
    measure(dense, read(dense), tmp_path / "d.npy", PLENTY)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


# ---------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["lm_head", "encoder.block.9.layer.0.SelfAttention.o", ENCODER])
def test_what_is_no_linear_of_a_layer_is_refused(
    dense: Checkpoint, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match=f'^"{name}": the model has no such linear in a layer'):
        measure(dense, read(dense), tmp_path / "c.npy", PLENTY, linears=[name])


def test_inputs_that_are_not_finite_leave_no_file(tmp_path: Path) -> None:
    broken = tiny.checkpoint()
    with torch.no_grad():
        broken.model.get_submodule("encoder.block.1.layer.1.DenseReluDense.wi").weight[0] = 1e30
    wo = "encoder.block.1.layer.1.DenseReluDense.wo"
    with pytest.raises(UserError, match=f'^the inputs of "{wo}" hold NaN or infinity') as caught:
        measure(broken, read(broken), tmp_path / "c.npy", 0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [0, PLENTY])
def test_an_interrupted_pass_leaves_no_file_and_no_hook(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    left = 6 if budget else 15
    add = Gram.add

    def interrupt(self: Any, rows: Tensor) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(Gram, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(dense, read(dense), tmp_path / "c.npy", budget)
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
    assert message.endswith(f"; {REMEDY}.")
    return message.removeprefix(f"{place}: ").removesuffix(f"; {REMEDY}.")


def test_a_calibration_of_this_model_and_these_texts_is_reused(
    dense: Checkpoint, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="composable")
    found = obtain(dense, read(dense), place, PLENTY)
    assert found.path == place
    assert caplog.messages == [f"calibration: {place} is of this model and these texts, reused"]
    obtain(dense, read(dense), place, 0, linears=[f"{ENCODER}.q"])


def test_where_there_is_none_it_is_measured(dense: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.npy"
    found = obtain(dense, read(dense), path, PLENTY, linears=[f"{ENCODER}.q"])
    assert found.names == (f"{ENCODER}.q",)
    assert found.fingerprint == dense.fingerprint
    assert [path] == list(path.parent.iterdir())
    assert open_calibration(path).info == {
        split: {"identity": part.identity, "samples": len(part), "tokens": tokens_of(corpus)}
        for split, part, corpus in zip(("train", "valid"), read(dense), CORPORA, strict=True)
    }


def tokens_of(corpus: Corpus) -> dict[str, int]:
    """Words and end tokens, without the tokenizer's help."""
    sides = {"encoder": corpus.source, "decoder": corpus.target}
    return {stack: sum(len(line.split()) + 1 for line in lines) for stack, lines in sides.items()}


def test_another_models_calibration(place: Path) -> None:
    other = tiny.checkpoint(seed=1, gated=True)
    fingerprints = open_calibration(place).fingerprint[:12], other.fingerprint[:12]
    assert refused(place, other, read(other)) == (
        f"measured on another model (fingerprint {fingerprints[0]}, this one has {fingerprints[1]})"
    )


@pytest.mark.parametrize("split", [0, 1])
def test_other_texts(dense: Checkpoint, place: Path, split: int) -> None:
    corpora = list(CORPORA)
    corpora[split] = texts(CORPORA[split].split, 4, seed=255)
    name, samples = (("train", 30), ("valid", 9))[split]
    before, now = read(dense)[split], read(dense, tuple(corpora))[split]
    assert refused(place, dense, read(dense, tuple(corpora))) == (
        "measured on other texts, or on texts that were tokenised in another way "
        f"({name}: {samples} samples, SHA-256 {before.identity[:12]}; "
        f"now words {name}, 4 samples, SHA-256 {now.identity[:12]})"
    )


def test_the_splits_exchanged_are_other_texts(dense: Checkpoint, place: Path) -> None:
    assert "measured on other texts" in refused(place, dense, read(dense, CORPORA[::-1]))


def test_the_same_texts_seen_in_another_way(dense: Checkpoint, place: Path) -> None:
    """By a prefix, or by another tokenizer, which has no influence on the fingerprint."""
    prefixed, split = copy.copy(dense), copy.copy(dense)
    prefixed.info = {**dense.info, "prefix": "a cat "}
    split.tokenizer = tiny.tokenizer()
    split.tokenizer.add_tokens(["runs red"])
    assert "runs red" in " ".join(CORPORA[0].source)
    for other in (prefixed, split):
        assert "measured on other texts, or on texts that" in refused(place, other, read(other))


def test_missing_linears(dense: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "c.npy"
    measure(dense, read(dense), path, PLENTY, linears=[f"{ENCODER}.q", f"{ENCODER}.k"])
    expected = f'has no moments of "{ENCODER}.o" (has those of 2 linears)'
    assert refused(path, dense, read(dense)) == expected
    assert refused(path, dense, read(dense), linears=[f"{ENCODER}.q", f"{ENCODER}.o"]) == expected


def test_held_out_texts_are_added_where_they_are_missing(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if both were measured at once, and the first half is not measured again."""
    both, path = tmp_path / "both.npy", tmp_path / "c.npy"
    whole = measure(dense, read(dense), both, PLENTY)
    half = measure(dense, read(dense)[:1], path, PLENTY)
    with pytest.raises(MismatchError, match="was measured without held-out texts; delete it"):
        half.held_out(half.names[0])
    runs: list[int] = []
    run = InputMoments.measure

    def counted(self: Any, batch: Any) -> None:
        runs.append(len(batch["input_ids"]))
        run(self, batch)

    monkeypatch.setattr(InputMoments, "measure", counted)
    assert obtain(dense, read(dense)[:1], path, PLENTY).path == path
    assert runs == []
    found = obtain(dense, read(dense), path, PLENTY)
    assert sum(runs) == len(CORPORA[1].source)
    assert path.read_bytes() == both.read_bytes()
    assert_close(found.held_out(found.names[0]), whole.held_out(found.names[0]), 0)
    assert obtain(dense, read(dense)[:1], path, PLENTY).info == whole.info
    assert "9 samples" in refused(path, dense, read(dense, (CORPORA[0], texts("valid", 8, 2))))


def test_a_calibration_that_cannot_be_finished_stays_as_it_was(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.npy"
    measure(dense, read(dense)[:1], path, PLENTY)
    before = path.read_bytes()

    def interrupt(self: Any, batch: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(InputMoments, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        obtain(dense, read(dense), path, PLENTY)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------- what the options of a command stand for


def calibrated(dense: Checkpoint, path: Path, data: Path, **options: Any) -> Calibration:
    settings: dict[str, Any] = {"limit": 12, "memory_budget": PLENTY, **options}
    found, parts = collect.calibrate(dense, path, str(data), device="cpu", **settings)
    assert [part.identity for part in parts] == [said["identity"] for said in found.info.values()]
    return found


def test_another_length_of_windows_is_another_calibration(tmp_path: Path) -> None:
    dense, path = tiny.dense("llama"), tmp_path / "c.npy"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(" ".join(tiny.WORDS) + "\n")
    first = calibrated(dense, path, tmp_path)
    dense.info["max_length"] = 8
    with pytest.raises(MismatchError, match="tokenised in another way"):
        calibrated(dense, path, tmp_path)
    dense.info["max_length"] = 24
    assert calibrated(dense, path, tmp_path).info == first.info


@pytest.mark.parametrize(
    "change",
    [{"resample": 3}, {"image_mean": [0.4]}, {"image_std": [0.4]}, {"rescale_factor": 0.01}, {}],
    ids=lambda it: str([*it]),
)
def test_images_prepared_in_another_way(tmp_path: Path, change: dict[str, Any]) -> None:
    dense, path, data = tiny.dense("vit"), tmp_path / "c.npy", tmp_path / "a.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (20, 6, 6), dtype=np.uint8)
    arrays = {f"{split}_images": pictures[:12] for split in ("train", "valid")}
    labels = {f"{split}_labels": np.arange(12) % 2 for split in ("train", "valid")}
    np.savez(data, **arrays, **labels)
    first = calibrated(dense, path, data, held_out=False)
    dense.info["image_processor"] = dense.info["image_processor"] | change
    if change:
        with pytest.raises(MismatchError, match="measured on other texts"):
            calibrated(dense, path, data, held_out=False)
    else:
        assert calibrated(dense, path, data, held_out=False).info == first.info
        np.savez(data, **arrays | {"train_images": pictures[8:]}, **labels)
        with pytest.raises(MismatchError, match="measured on other texts"):
            calibrated(dense, path, data, held_out=False)


def test_data_spelled_in_another_way_is_the_same(
    dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = tiny.corpus(tmp_path / "data"), tmp_path / "c.npy"
    calibrated(dense, path, data)
    content = path.read_bytes()
    monkeypatch.chdir(data)
    assert calibrated(dense, path, Path()).path.read_bytes() == content
    assert calibrated(dense, tmp_path / "d.npy", Path("../data")).path.read_bytes() == content


def test_a_damaged_calibration(dense: Checkpoint, place: Path) -> None:
    content = place.read_bytes()
    place.write_bytes(content[:-9])
    assert refused(place, dense, read(dense)).startswith("truncated (")
