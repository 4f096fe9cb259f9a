"""Least squares: variants against what running them beside the dense modules says."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from composable.calibration import obtain, recorded_calls
from composable.calibration.batching import Texts
from composable.errors import MismatchError
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.linalg import grams
from composable.models.checkpoint import Checkpoint
from composable.tasks import translation
from composable.training.options import Options
from composable.variants import gradient, least_squares, tuning, unit_phase
from composable.variants.compose import compose
from composable.variants.distillation import Distillation
from composable.variants.least_squares import Settings
from composable.variants.pruning import make_variants
from composable.variants.result import Result
from tests import tiny

FIRST = "encoder.block.0.layer.0.SelfAttention"
SELF = "decoder.block.1.layer.0.SelfAttention"
CROSS = "decoder.block.0.layer.1.EncDecAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"
WO = "decoder.block.1.layer.2.DenseReluDense.wo"
CROSS_O = "decoder.block.1.layer.1.EncDecAttention.o"
FFN = "decoder.block.0.layer.2.DenseReluDense"
NEURONS = "encoder.block.1.layer.1.DenseReluDense"
SCHEME = {
    FIRST: [
        Entry(0.25),
        Entry(0.5),
        Entry(0.5, None, {"o": Entry(0.3)}),
        Entry(0.5, None, {"o": Entry(0.6)}),
    ],
    SELF: [Entry(0.25, None, {"o": Entry(0.5)})],
    CROSS: [Entry(0.5)],
    WI: [Entry(0.3), Entry(0.7)],
    WO: [Entry(0.5)],
    CROSS_O: [Entry(0.5)],
    FFN: [Entry(1.0)],
    NEURONS: [Entry(0.5), Entry(0.5, None, {"wo": Entry(0.3)})],
}
PHASE = unit_phase.Settings(epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.corpus(tmp_path_factory.mktemp("corpus"), pairs=200)
    return translation.read_corpus(folder, "train"), translation.read_corpus(folder, "valid")


@pytest.fixture(scope="module")
def statistics(corpora: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("calibration") / "calibration.npy"
    dense = tiny.checkpoint()
    return obtain.measure(dense, [Texts(dense, corpus) for corpus in corpora], path, 1 << 30)


def tune(
    statistics: Any, corpora: Any, folder: Path, solver: str = "ls", scheme: Any = SCHEME,
    **changes: Any,
) -> Result:  # fmt: skip
    dense = tiny.checkpoint()
    settings = Settings(**{"solver": solver, "phase": PHASE, **changes})
    texts = texts_of(dense, corpora)
    return least_squares.tune(
        dense, make_variants(dense, scheme, tiny.BY_WEIGHTS), statistics, texts, settings, folder
    )


def texts_of(dense: Checkpoint, corpora: Any) -> tuple[Texts, Texts]:
    return Texts(dense, corpora[0]), Texts(dense, corpora[1])


def measured(variants: list[Variant], corpus: Any) -> list[tuple[float, float]]:
    """Mean squared error and relative error of every variant, run beside the dense model."""
    dense = tiny.checkpoint()
    model = Distillation(dense, [variant for variant in variants if variant.tensors])
    task = translation.TRANSLATION
    pairs = task.dataset(corpus, dense)
    with torch.no_grad():
        batches = [
            model(**task.collator(dense)([pairs[i] for i in range(s, min(s + 16, len(pairs)))]))
            for s in range(0, len(pairs), 16)
        ]
    errors, norms, counts = (
        sum(batch[part].double().sum(0) for batch in batches) for part in range(3)
    )
    return list(zip((errors / counts).tolist(), (errors / norms).tolist(), strict=True))


@pytest.mark.parametrize("solver_name", ["ls", "hybrid"])
def test_errors_are_those_of_running_the_variants(
    statistics: Any, corpora: Any, tmp_path: Path, solver_name: str
) -> None:
    before = make_variants(tiny.checkpoint(), SCHEME, tiny.BY_WEIGHTS)
    result = tune(statistics, corpora, tmp_path, solver_name)
    assert [v.module for v in result.variants] == [v.module for v in before]
    starts, ends = (measured(some, corpora[1]) for some in (before, result.variants))
    tuned = [variant for variant in result.variants if variant.tensors]
    for variant, start, end in zip(tuned, starts, ends, strict=True):
        assert variant.stats["error_before"] == pytest.approx(start[1], rel=1e-4)
        assert variant.stats["error_after"] == pytest.approx(end[1], rel=1e-3, abs=1e-7)
        assert end[1] < start[1], variant
    assert result.rows[0]["validation_loss"] == pytest.approx(sum(s for s, _ in starts), rel=1e-4)
    assert result.rows[-1]["validation_loss"] == pytest.approx(sum(e for e, _ in ends), rel=1e-3)
    on_training = sum(error for error, _ in measured(result.variants, corpora[0]))
    if solver_name == "ls":  # the training loss of the last steps is another thing
        assert result.rows[-1]["training_loss"] == pytest.approx(on_training, rel=1e-3)
    assert len(result.rows) == {"ls": 2, "hybrid": 3}[solver_name]


def test_masks_and_shapes_stay(statistics: Any, corpora: Any, tmp_path: Path) -> None:
    before = make_variants(tiny.checkpoint(), SCHEME, tiny.BY_WEIGHTS)
    for old, new in zip(
        before, tune(statistics, corpora, tmp_path, "hybrid").variants, strict=True
    ):
        assert old.facts() | {"stats": 0} == new.facts() | {"stats": 0}
        assert old.tensors.keys() == new.tensors.keys()
        for name, tensor in new.tensors.items():
            assert tensor.shape == old.tensors[name].shape
            if name in old.masks:
                assert torch.equal(old.masks[name], new.masks[name])
                assert not tensor[~new.masks[name]].any()
                assert tensor[new.masks[name]].all()


def test_hybrid_improves_on_least_squares_for_units(
    statistics: Any, corpora: Any, tmp_path: Path
) -> None:
    ls, hybrid = (tune(statistics, corpora, tmp_path, name) for name in ("ls", "hybrid"))
    gains = []
    for a, b in zip(ls.variants, hybrid.variants, strict=True):
        if a.kind == "linear":
            assert a.digest == b.digest
        elif a.tensors:
            gains.append(b.stats["error_after"] / a.stats["error_after"])
    assert max(gains) <= 1 + 1e-9
    assert sum(gains) / len(gains) < 0.97


def test_a_variant_depends_on_nothing_but_itself(
    statistics: Any, corpora: Any, tmp_path: Path
) -> None:
    together = tune(statistics, corpora, tmp_path, "hybrid")
    backwards = {name: entries[::-1] for name, entries in reversed(SCHEME.items())}
    other = tune(statistics, corpora, tmp_path, "hybrid", backwards)
    found = {(v.module, v.entry): v for v in other.variants}
    alone = tune(statistics, corpora, tmp_path, "hybrid", {FIRST: [Entry(0.5)]}).variants[0]
    for variant in together.variants:
        twin = found[variant.module, variant.entry]
        assert variant.tensors.keys() == twin.tensors.keys()
        for name, tensor in variant.tensors.items():
            torch.testing.assert_close(tensor, twin.tensors[name], rtol=1e-3, atol=2e-3)
        if variant.tensors:
            assert variant.stats["error_after"] == pytest.approx(twin.stats["error_after"], 1e-3)
    same = next(v for v in together.variants if v.module == FIRST and v.entry == alone.entry)
    assert same.stats["error_after"] == pytest.approx(alone.stats["error_after"], 1e-3)


def test_an_interrupted_run_goes_on(
    statistics: Any, corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(statistics, corpora, tmp_path / "whole", "hybrid")
    fit, calls = least_squares.fit_units, []

    def interrupted(dense: Any, linear: Any, *args: Any) -> Any:
        calls.append(linear.module.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(dense, linear, *args)

    monkeypatch.setattr(least_squares, "fit_units", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(statistics, corpora, tmp_path / "cut", "hybrid")
    monkeypatch.setattr(least_squares, "fit_linear", None)  # the linears are all done
    again = tune(statistics, corpora, tmp_path / "cut", "hybrid")
    assert sorted(calls) == sorted([FIRST, SELF, CROSS, NEURONS, calls[1]]), (
        "only one is done again"
    )
    assert [v.digest for v in again.variants] == [v.digest for v in whole.variants]
    assert again.folder.path.is_dir()
    again.clean_up()
    assert not again.folder.path.exists()


def test_another_input_is_another_run(statistics: Any, corpora: Any, tmp_path: Path) -> None:
    scheme = {WI: [Entry(0.5)]}
    folders = {
        tune(statistics, corpora, tmp_path, "ls", scheme, ridge=r).folder.path for r in (0.1, 1)
    }
    folders.add(tune(statistics, corpora, tmp_path, "ls", {WI: [Entry(0.3)]}).folder.path)
    assert len(folders) == 3


def test_exact_is_at_least_as_good(statistics: Any, corpora: Any, tmp_path: Path) -> None:
    pcg, exact = (
        tune(statistics, corpora, tmp_path, linear_solver=name) for name in ("pcg", "exact")
    )
    assert exact.rows[1]["training_loss"] <= pcg.rows[1]["training_loss"] * 1.001
    assert pcg.rows[1]["training_loss"] <= exact.rows[1]["training_loss"] * 1.01


def test_a_tuned_attention_is_refused(statistics: Any, corpora: Any, tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    variants = tune(statistics, corpora, tmp_path, "hybrid", {FIRST: [Entry(0.5)]}).variants
    with pytest.raises(MismatchError, match=r"its \w\.weight is not that of the dense model.*grad"):
        least_squares.tune(
            dense, variants, statistics, texts_of(dense, corpora), Settings(), tmp_path
        )


def test_the_ridge_pulls_toward_the_weights_of_the_variant(
    statistics: Any, corpora: Any, tmp_path: Path
) -> None:
    """Against the normal equations, for an `o` that is not the dense one any more."""
    dense = tiny.checkpoint()
    (variant,) = make_variants(dense, {CROSS: [Entry(0.5)]}, tiny.BY_WEIGHTS)
    path, rows = (
        f"{CROSS}.o",
        torch.cat([torch.arange(8) + 8 * h for h in variant.kept_units or []]),
    )
    own = variant.tensors["o.weight"] + 0.3 * torch.randn(32, len(rows))
    variant.tensors["o.weight"] = own
    settings = Settings(solver="ls", ridge=0.5)
    texts = texts_of(dense, corpora)
    (tuned,) = least_squares.tune(dense, [variant], statistics, texts, settings, tmp_path).variants
    moments = statistics.inputs(path).matrix.numpy()
    target = (moments @ dense.model.get_parameter(f"{path}.weight").detach().double().numpy().T)[
        rows
    ]
    pull = 0.5 * np.diag(np.diag(moments)[rows])
    wanted = np.linalg.solve(
        moments[np.ix_(rows, rows)] + pull, target + pull @ own.double().numpy().T
    )
    np.testing.assert_allclose(tuned.tensors["o.weight"].numpy(), wanted.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver_name", ["ls", "hybrid"])
def test_what_held_out_texts_do_not_bear_out_is_not_kept(
    corpora: Any, tmp_path: Path, solver_name: str
) -> None:
    """Six sentences are learned by heart; the held-out ones are of other words."""
    generator = torch.Generator().manual_seed(0)
    random = [
        " ".join(tiny.WORDS[i] for i in torch.randint(len(tiny.WORDS), (8,), generator=generator))
        for _ in range(40)
    ]
    few = (
        dataclasses.replace(corpora[0], source=corpora[0].source[:6], target=corpora[0].target[:6]),
        dataclasses.replace(corpora[1], source=random, target=random[::-1]),
    )
    dense = tiny.checkpoint()
    statistics = obtain.measure(dense, texts_of(dense, few), tmp_path / "calibration.npy", 1 << 30)
    phase = dataclasses.replace(PHASE, epochs=8)
    result = tune(statistics, few, tmp_path, solver_name, phase=phase)
    pruned = make_variants(dense, SCHEME, tiny.BY_WEIGHTS)
    errors = measured(result.variants, few[1]), measured(pruned, few[1])
    learned = [i for i, variant in enumerate(pruned) if variant.learns]
    for index, (after, _), (before, _) in zip(learned, *errors, strict=True):
        kept = result.kept[index]
        assert (result.variants[index].digest == pruned[index].digest) == (kept == "pruned")
        assert after <= before * (1 + 1e-6), (kept, before, after)
    kinds = {kind for kind in result.kept if kind}
    assert kinds == {"ls": {"pruned", "ls"}, "hybrid": {"pruned", "ls", "trained"}}[solver_name]


def test_modules_are_recorded_once(
    statistics: Any, corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units, and pairs after them: one pass over both splits, and a batch to see how much it is."""
    passes: list[int] = []
    record = recorded_calls.record_calls

    def counted(model: Any, family: Any, modules: Any, *args: Any) -> Any:
        passes.append(len(modules))
        return record(model, family, modules, *args)

    monkeypatch.setattr(recorded_calls, "record_calls", counted)
    tune(statistics, corpora, tmp_path, "hybrid")
    batches = [-(-len(corpora[0].source) // PHASE.batch_size), -(-len(corpora[1].source) // 64)]
    assert passes == [4] * (1 + sum(batches))


def test_pairs_train_half_as_long_with_half_the_step(
    statistics: Any, corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks of the steps of `q`, relative to its size, and how many there were."""
    peaks: list[list[float]] = []
    made, step = torch.optim.AdamW.__init__, torch.optim.AdamW.step

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        peaks.append([])
        made(self, *args, **kwargs)

    def noted(self: Any, *args: Any) -> Any:
        peaks[-1].append(self.param_groups[-2]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", begin)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    phase = dataclasses.replace(PHASE, epochs=5, lr=0.04, patience=0)
    tune(statistics, corpora, tmp_path, "hybrid", {SELF: SCHEME[SELF]}, phase=phase)
    weight = tiny.checkpoint().model.get_parameter(f"{SELF}.q.weight")
    size = float(weight.detach().square().mean().sqrt())
    steps = -(-len(corpora[0].source) // PHASE.batch_size)
    assert [max(some) for some in peaks] == pytest.approx([0.04 * size, 0.02 * size], rel=1e-3)
    assert [len(some) for some in peaks] == [5 * steps, 3 * steps]


def test_options_of_the_command_reach_the_solver() -> None:
    shared: dict[str, Any] = {"epochs": 3, "batch_size": 5, "lr": 0.3, "seed": 11, "device": "cpu"}
    for dtype, taken in (("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")):
        options = Options(early_stop=7, dtype=dtype, **shared)
        phase = unit_phase.Settings(patience=7, dtype=taken, budget=3072, **shared)
        wanted = Settings("hybrid", "exact", 0.5, device="cpu", phase=phase)
        assert tuning._settings(options, "hybrid", "exact", 0.5, 3 * 1024) == wanted


def test_one_warning_counts_what_stays_as_pruned(caplog: pytest.LogCaptureFixture) -> None:
    def variant(error: float) -> Variant:
        return Variant(WI, "linear", Entry(0.5), True, stats={"error_before": error})

    with caplog.at_level(logging.WARNING, "composable"):
        tuning._warn([variant(0.1), variant(0.1)], ["ls", "trained"], "raise it")
        tuning._warn([variant(0.0), variant(0.1)], ["pruned", None], "raise it")
        assert not caplog.messages, "nothing was to be gained, or is left"
        kept = ["pruned", "ls", "pruned", None]
        tuning._warn([variant(0.1) for _ in kept], kept, "measure more samples (now 12)")
    (message,) = caplog.messages
    assert message.startswith("2 of 3 variants stay as pruned")
    assert message.endswith("measure more samples (now 12).")


class Constant:
    """Statistics of inputs that never change."""

    info: ClassVar[dict[str, Any]] = {"constant": True}

    def inputs(self, name: str) -> grams.Gram:
        gram = grams.Gram.zeros(48 if name.endswith("wo") else 32)
        gram.add(torch.linspace(-1, 1, len(gram.total)).expand(100, -1))
        return gram

    held_out = inputs

    def tokens_per_input(self, name: str) -> float:
        return 100 / len(self.inputs(name).total)


def test_constant_inputs_leave_the_weights_as_pruned(
    corpora: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = tiny.checkpoint()
    variants = make_variants(dense, {WO: [Entry(0.5)]}, tiny.BY_WEIGHTS)
    constant: Any = Constant()
    with caplog.at_level(logging.WARNING, "composable"):
        result = least_squares.tune(
            dense, variants, constant, texts_of(dense, corpora), Settings(solver="ls"), tmp_path
        )
    assert "its inputs never vary" in caplog.text
    assert result.variants[0].digest == variants[0].digest


def trained(
    variants: list[Variant], corpora: Any, folder: Path, epochs: int, lr: float
) -> list[Variant]:
    options = Options(
        epochs=epochs, batch_size=16, lr=lr, early_stop=0, device="cpu", checkpoint_dir=folder
    )
    result = gradient.tune(tiny.checkpoint(), variants, corpora, options)
    result.clean_up()
    return result.variants


@pytest.mark.nightly
def test_gradient_training_finds_no_better_linears(
    statistics: Any, corpora: Any, tmp_path: Path
) -> None:
    """From the solution one epoch gains next to nothing; from the pruned start it stays above."""
    scheme = {WI: [Entry(0.5)], WO: [Entry(0.5)], CROSS_O: [Entry(0.3)]}
    solved = tune(statistics, corpora, tmp_path, scheme=scheme).variants
    further = trained(solved, corpora, tmp_path, 1, 0.01)
    pruned = make_variants(tiny.checkpoint(), scheme, tiny.BY_WEIGHTS)
    short, long = (trained(pruned, corpora, tmp_path, epochs, 0.05) for epochs in (2, 30))
    for best, after, early, late in zip(solved, further, short, long, strict=True):
        floor = best.stats["error_after"]
        assert after.stats["error_after"] > 0.98 * floor
        assert early.stats["error_after"] > late.stats["error_after"] > 0.98 * floor
        assert late.stats["error_after"] < 1.5 * floor


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    from composable.models.hub import resolve_model
    from composable.models.pretrained import import_model

    folder, revision = resolve_model("embedded")
    return import_model(folder, "embedded", revision)


def test_composed_models_are_better_than_pruned_ones(embedded: Checkpoint, tmp_path: Path) -> None:
    """A trained model: its composed cross-entropy on held-out text, heads and linears pruned."""
    task = translation.TRANSLATION
    corpora = (
        task.read("embedded", None, "train", 400),
        task.read("embedded", None, "valid", None),
    )
    texts = [Texts(embedded, corpus) for corpus in corpora]
    statistics = obtain.measure(embedded, texts, tmp_path / "calibration.npy", 1 << 30)
    modules = [
        m for m in embedded.family.modules(embedded.model) if m.kind in ("attention", "linear")
    ]
    scheme = {
        m.name: [Entry(0.33, None, {"o": Entry(0.5)}) if m.kind == "attention" else Entry(0.5)]
        for m in modules
        if not m.name.endswith(".o")
    }
    pruned = make_variants(embedded, scheme, tiny.BY_WEIGHTS)
    solved = least_squares.tune(
        embedded, pruned, statistics, texts_of(embedded, corpora), Settings(solver="ls"), tmp_path
    ).variants
    losses = []
    for variants in (pruned, solved):
        dense = dataclasses.replace(embedded, model=_copy(embedded))
        losses.append(translation.cross_entropy(compose(dense, variants), corpora[1]))
    assert losses[1] < losses[0] - 0.05, losses


def _copy(dense: Checkpoint) -> Any:
    import copy

    return copy.deepcopy(dense.model)
