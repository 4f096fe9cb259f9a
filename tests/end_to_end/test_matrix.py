"""Every family with every task it can do: all kinds and methods, fine-tuned by every solver."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from composable import ranking, tasks
from composable.calibration import collect, obtain
from composable.calibration.batching import Texts
from composable.formats import bundle
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint, config_dict, fingerprint_of
from composable.ranking import base
from composable.ranking.unit_weights import RandomOptions
from composable.training.options import Options
from composable.variants import compose, gradient, least_squares
from composable.variants.pruning import Sources, blocks_of, make_variants
from composable.variants.unit_phase import Settings
from tests import tiny, tiny_tasks
from tests.paths import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import support_table

#: The layout of a family that goes through all of its tasks; the others through one.
FIRST = ("t5", "bert", "distilbert", "opt", "gpt2", "llama_gqa", "vit")


def tasks_of(layout: str) -> list[str]:
    """Names of the tasks that a layout goes through."""
    if layout.startswith("t5"):
        return ["translation"]
    config = getattr(transformers, tiny.LAYOUTS[layout][0])
    found = [
        task.name
        for family, task in support_table.rows()
        if config.model_type in family.model_types
        and support_table.is_supported(family, task, config.model_type)
    ]
    return found if layout in FIRST else found[:1]


CASES = [(layout, task) for layout in tiny.ALL for task in tasks_of(layout)]


def dense_of(layout: str, name: str) -> Checkpoint:
    """A tiny model of a layout with the head of a task."""
    if name == "translation":
        return tiny.dense(layout)
    task = tasks.by_name(name)
    config, architecture, settings = tiny.LAYOUTS[layout]
    labels = 1 if name == "text_similarity" else 2
    settings = tiny.SMALL | settings | {"num_labels": labels, "max_position_embeddings": 64}
    if layout == "gpt2":
        settings["n_positions"] = 64
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    made.architectures = [architecture]  # of DeiT's there are two
    model = getattr(transformers, task.auto_class).from_config(made)
    checkpoint = Checkpoint(model.eval(), None, {})
    if checkpoint.family.prepare is not None:
        checkpoint.family.prepare(model)
    checkpoint.config = config_dict(model)
    checkpoint.fingerprint = fingerprint_of(checkpoint.config, model.state_dict())
    if name != "image_classification":
        checkpoint.tokenizer = tiny_tasks.tokenizer(name != "language_modeling")
    count = sum(parameter.numel() for parameter in model.parameters())
    checkpoint.info = {
        "source": layout, "task": name, "prefix": "", "data": None, "history": [],
        "dense_parameters": count, "max_length": 32, **task.knows(model.config),
    }  # fmt: skip
    return checkpoint


def scheme_of(made: Checkpoint) -> dict[str, list[Entry]]:
    """Every kind at every method that prunes it, and the removal of each kind but linears."""
    modules = made.family.modules(made.model)
    by_kind = {kind: [m for m in modules if m.kind == kind] for kind in support_table.KINDS}
    found: dict[str, list[Entry]] = {}
    for kind, method in support_table.columns():
        # the first layer of the last stack; a linear of its ffn, since o is part of the pair
        stack = modules[-1].stack
        some = [m for m in by_kind[kind] if m.stack == stack]
        module = some[-1] if kind in ("layer", "linear") else some[0]
        entry = Entry(1.0) if method == support_table.REMOVAL else Entry(0.5, method)
        if method == "linear_map":
            entry = Entry(1.0, method)
        found.setdefault(module.name, []).append(entry)
    pruned = next(m for m in by_kind["attention"] if m.name in found)
    found[pruned.name].append(Entry(0.5, "head_l1", {pruned.output: Entry(0.3, "l1")}))
    return found


@pytest.mark.parametrize(("layout", "name"), CASES, ids=lambda value: value)
def test_the_whole_chain(layout: str, name: str, tmp_path: Path) -> None:
    made = dense_of(layout, name)
    task = tasks.by_name(name)
    folder = tmp_path / "data"
    tiny.corpus(folder) if name == "translation" else tiny_tasks.data(name, folder)
    corpora: Any = [task.read(str(folder), None, split, None) for split in ("train", "valid")]
    texts = Texts(made, corpora[0]), Texts(made, corpora[1])
    measured = obtain.measure(made, texts, tmp_path / "c.npy", 1 << 30)
    scheme = scheme_of(made)
    place = {"data": str(folder), "limit": 40, "device": "cpu"}
    states = collect.block_moments(made, blocks_of(scheme), **place)
    scores = base.rank(ranking.by_name("random"), made, None, RandomOptions())
    sources = Sources(
        measured.inputs, states, lambda m: torch.from_numpy(scores.importance(m)), lambda m: 1
    )  # fmt: skip
    variants = make_variants(made, scheme, sources=sources)
    assert {(v.kind, v.entry.method) for v in variants} >= {
        (kind, "remove" if method == support_table.REMOVAL else method)
        for kind, method in support_table.columns()
    }
    bundle.write(tmp_path / "m.npy", bundle.Bundle(made.fingerprint, variants))
    reader = bundle.open_bundle(tmp_path / "m.npy", made.fingerprint)
    # what several methods choose alike is fine-tuned once
    variants = [reader.load(one) for one in {one.digest: one for one in reader.records}.values()]
    settings = {"device": "cpu", "phase": Settings(epochs=1, batch_size=8)}
    tuned = {
        solver: least_squares.tune(
            made, variants, measured, texts, least_squares.Settings(solver, **settings),
            tmp_path / "ck",
        ).variants
        for solver in least_squares.SOLVERS
    }  # fmt: skip
    options = Options(
        epochs=1, batch_size=8, lr=1e-2, early_stop=0, device="cpu", checkpoint_dir=tmp_path / "ck"
    )
    tuned["grad"] = gradient.tune(copy.deepcopy(made), variants, tuple(corpora), options).variants
    for solver, some in tuned.items():
        check_errors(solver, some)
    check_composed(made, tuned["hybrid"], corpora[1], tmp_path)


def check_errors(solver: str, variants: list[Variant]) -> None:
    """No variant is worse than it was, on held-out data; most are better."""
    stats = [v.stats for v in variants if v.learns]
    assert all("error_after" in one for one in stats)
    ratios = [one["error_after"] / max(one["error_before"], 1e-12) for one in stats]
    assert max(ratios) <= 1 + 1e-6, (solver, ratios)
    assert sum(ratio < 1 for ratio in ratios) > len(ratios) / 2, (solver, ratios)


def check_composed(made: Checkpoint, variants: list[Variant], corpus: Any, folder: Path) -> None:
    """One variant of every module, then one with whole modules gone: composed, stored, measured."""
    task = tasks.by_name(made.info["task"])
    dense = sum(parameter.numel() for parameter in made.model.parameters())
    for is_removed in (False, True):
        first: dict[str, Variant] = {}
        for variant in variants:
            if variant.removed == is_removed:
                first.setdefault(variant.module, variant)
        chosen = compose.that_fit(made, first.values())
        composed = compose.compose(copy.deepcopy(made), chosen)
        checkpoint.save(folder / "composed.pth", composed)
        again = checkpoint.load(folder / "composed.pth")
        settings: dict[str, Any] = {
            "device": "cpu", "dtype": "float32", "batch_tokens": 512, "num_beams": 1,
            "max_length": 12,
        }  # fmt: skip
        _, report = task.evaluate(again, corpus, settings)
        assert report["loss"] > 0
        assert report[task.main]["signature"]
        assert sum(parameter.numel() for parameter in again.model.parameters()) < dense
