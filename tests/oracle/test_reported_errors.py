"""Errors that fine-tuning reports, against composed models that run beside the dense one.

The methods of these tests change weights of the last linear, and not only remove some.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from composable import methods, tasks
from composable.calibration import obtain
from composable.calibration.batching import Texts
from composable.families import Module
from composable.formats import bundle
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.methods import Evidence, Method, Pruned
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_tensors
from composable.variants import least_squares, unit_phase
from composable.variants.compose import compose
from composable.variants.pruning import make_variants
from tests import tiny, tiny_tasks

#: With biases and without; with one list of layers and with two.
LAYOUTS = ("bert", "opt", "t5", "llama")


def skewed(holder: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    """Remove the first units, or every third weight, and change what is left of the last linear."""
    generator = torch.Generator().manual_seed(7)
    gone = int(module.units * rate)
    kept = list(range(gone, module.units)) if module.parts else None
    last = f"{module.output}." if module.parts else ""
    own = {n: t for n, t in own_tensors(holder, module, kept).items() if n.startswith(last)}
    changed = {
        name: 0.9 * tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in own.items()
        if name in (f"{last}weight", f"{last}bias")
    }
    assert all(not torch.equal(own[name], tensor) for name, tensor in changed.items())
    if kept is not None:
        return Pruned(kept_units=kept, tensors=changed)
    mask = torch.arange(changed["weight"].numel()).view(changed["weight"].shape) % 3 > 0
    return Pruned(mask=mask, tensors=changed)


SKEWED = Method("skewed", ("attention", "ffn", "linear"), "this test", skewed)


def scheme_of(dense: Checkpoint) -> dict[str, list[Entry]]:
    """Modules of the first layer, so that what enters them is no other in a composed model."""
    some: dict[str, Module] = {}
    for module in dense.family.modules(dense.model):
        some.setdefault(module.kind, module)
    o = some["attention"].output
    half, third = Entry(0.5, "skewed"), Entry(0.3, "skewed")
    return {
        some["attention"].name: [
            half, Entry(0.5, "skewed", {o: Entry(0.3, "l1")}), Entry(0.5, "head_l1", {o: third}),
            Entry(0.5, "head_l1", {o: Entry(0.3, "l1")}), Entry(0.25, "head_l1"),
        ],
        some["ffn"].name: [half, Entry(0.5, "neuron_l1")],
        some["linear"].name: [third],
    }  # fmt: skip


def outputs(model: Any, path: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """What a linear gives for all real tokens, (tokens, features), computed in float64."""
    model = copy.deepcopy(model).double().eval()
    found: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(output))
    rows = []
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        real = batch["attention_mask"].bool().flatten()
        rows.append(found.pop().flatten(0, -2)[real])
        assert not found
    return torch.cat(rows)


@pytest.mark.parametrize("solver", ["ls", "hybrid"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_are_those_of_composed_models(
    layout: str, solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, SKEWED))
    dense = tiny.dense(layout)
    task = tasks.by_name(dense.info["task"])
    if layout == "t5":
        tiny.corpus(tmp_path / "data")
    else:
        dense.tokenizer = tiny_tasks.tokenizer(task.name != "language_modeling")
        tiny_tasks.data(task.name, tmp_path / "data")
    corpora = tuple(task.read(str(tmp_path / "data"), None, s, None) for s in ("train", "valid"))
    texts = Texts(dense, corpora[0]), Texts(dense, corpora[1])
    statistics = obtain.measure(dense, texts, tmp_path / "calibration.npy", 1 << 30)
    pruned = make_variants(dense, scheme_of(dense), tiny.BY_WEIGHTS)
    bundle.write(tmp_path / "m.npy", bundle.Bundle(dense.fingerprint, pruned))
    pruned = bundle.open_bundle(tmp_path / "m.npy", dense.fingerprint).load_all()
    settings = least_squares.Settings(
        solver, phase=unit_phase.Settings(epochs=2, batch_size=8, lr=0.02)
    )
    result = least_squares.tune(dense, pruned, statistics, texts, settings, tmp_path / "ck")
    paths = {m.name: m.output_path for m in dense.family.modules(dense.model) if m.kind != "layer"}
    batches = texts[1].batches(rows=5)

    def run(variant: Variant) -> float:
        copied = Checkpoint(**{**vars(dense), "model": copy.deepcopy(dense.model)})
        path = paths[variant.module]
        composed = outputs(compose(copied, [variant]).model, path, batches)
        target = outputs(dense.model, path, batches)
        return float((composed - target).square().sum() / target.square().sum())

    assert len(result.variants) == 8
    for before, after, kept in zip(pruned, result.variants, result.kept, strict=True):
        assert after.stats["error_before"] == pytest.approx(run(before), rel=1e-4), before.entry
        assert after.stats["error_after"] == pytest.approx(run(after), rel=1e-4), before.entry
        assert after.stats["error_after"] < after.stats["error_before"], before.entry
        is_trained = solver == "hybrid" and before.kind in ("attention", "ffn")
        assert kept in ({"ls", "trained"} if is_trained else {"ls"})
