"""Rankers, and the method ranked: against the methods of the same formula, and plain loops."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composable import depth, ranking
from composable.calibration.batching import Texts
from composable.errors import ConfigError, ShapeError, UserError
from composable.formats import scores_file
from composable.formats.bundle import Variant
from composable.formats.calibration_file import open_calibration
from composable.formats.config import Entry
from composable.formats.scores import Scores
from composable.models import cost
from composable.models.checkpoint import Checkpoint
from composable.ranking import base
from composable.ranking.stat import StatOptions
from composable.ranking.unit_weights import RandomOptions
from composable.tasks.plain_texts import PlainTexts
from composable.variants.pruning import Sources, make_variants
from tests import tiny

RATES = (0.25, 0.5, 0.75)
SENTENCES = ["the man runs", "a dog in the street .", "the red house", "a woman plays with a cat"]


def scores_of(made: Checkpoint, name: str, options: Any = None) -> Scores:
    ranker = ranking.by_name(name)
    return base.rank(ranker, made, None, options or ranker.options())


def pruned(made: Checkpoint, scores: Scores | None, whole_groups: bool = False) -> list[Variant]:
    """All attentions and ffns at some rates, by scores or by the methods for plain rates."""
    modules = [m for m in made.family.modules(made.model) if m.kind in ("attention", "ffn")]
    scheme = {m.name: [Entry(rate) for rate in RATES] for m in modules}
    sources = Sources(scores=scores and (lambda name: torch.from_numpy(scores.importance(name))))
    chosen = {"attention": "ranked", "ffn": "ranked"} if scores else tiny.BY_WEIGHTS
    return make_variants(made, scheme, chosen, sources, whole_groups)


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("layout", tiny.ALL)
def test_ranked_by_l1_is_the_method_l1(layout: str, whole_groups: bool, tmp_path: Path) -> None:
    made = tiny.dense(layout)
    scores_file.save(tmp_path / "scores.npz", scores_of(made, "l1"))
    scores = scores_file.load(tmp_path / "scores.npz")
    expected = pruned(made, None, whole_groups)
    found = pruned(made, scores, whole_groups)
    assert [v.entry.method for v in found] == ["ranked"] * len(found)
    assert {v.entry.method for v in expected} == {"head_l1", "neuron_l1"}
    for one, other in zip(found, expected, strict=True):
        assert (one.module, one.kept_units, one.gqa) == (other.module, other.kept_units, other.gqa)
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[k]) for k, tensor in one.tensors.items())


def stat_scores(made: Checkpoint, folder: Path, gqa: str) -> tuple[Scores, Any]:
    """Scores of the ranker stat, and the moments that it measured."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{gqa}.npy"
    words = np.random.default_rng(0).choice(tiny.WORDS, (60, 8))
    texts = Texts(made, PlainTexts.of([" ".join(line) for line in words]))
    options = StatOptions(gqa, str(path))
    scores = base.rank(ranking.by_name("stat"), made, texts, options)
    return scores, open_calibration(path, made.fingerprint).inputs


@pytest.mark.parametrize("gqa", ["per-group", "whole-groups"])
@pytest.mark.parametrize("layout", ["bert", "llama", "llama_gqa"])
def test_stat_measures_what_least_squares_leaves(layout: str, gqa: str, tmp_path: Path) -> None:
    """Against the pseudo-inverse, for every number of units that stay; and the method's choice."""
    made = tiny.dense(layout)
    scores, moments = stat_scores(made, tmp_path, gqa)
    scheme, kept = {}, {}
    for module in made.family.modules(made.model):
        if module.kind not in ("attention", "ffn"):
            continue
        found = scores.units[module.name]
        order = np.argsort(-found.importance)
        assert len(set(found.importance)) == module.units
        matrix = moments(module.output_path).matrix.numpy()
        weight = made.model.get_parameter(f"{module.output_path}.weight").detach().double().numpy()
        if module.kind == "ffn":
            norms = np.linalg.norm(weight, axis=0)
            matrix, weight = matrix * norms * norms[:, None], np.eye(module.units)
        size = len(matrix) // module.units
        groups, whole = module.groups, gqa == "whole-groups"
        step = 1 if module.kind == "ffn" else module.units // groups if whole else groups
        step = 1 if groups == module.units else step
        square = np.sqrt((weight @ matrix * weight).sum())
        for count in range(0, module.units + 1, step):
            columns = (order[:count, None] * size + np.arange(size)).ravel()
            left = weight.copy()
            inverse = np.linalg.pinv(matrix[columns][:, columns], hermitian=True)
            left[:, columns] -= weight @ matrix[:, columns] @ inverse
            error = np.sqrt(max((left @ matrix * left).sum(), 0))
            near = pytest.approx(error, rel=1e-3, abs=3e-3 * square)
            if module.kind == "ffn" and count:
                assert found.components["left"][order[count - 1]] == near
            elif module.kind == "attention" and count < module.units:
                assert list(found.components["error"][order[count : count + step]]) == [near] * step
        for rate in RATES:
            scheme.setdefault(module.name, []).append(Entry(rate))
    source = Sources(moments, scores=lambda name: torch.from_numpy(scores.importance(name)))
    for name in ("stat", "ranked"):
        chosen = {"attention": name, "ffn": name}
        made_of = make_variants(made, scheme, chosen, source, gqa == "whole-groups")
        kept[name] = [(v.module, v.entry.rate, v.kept_units) for v in made_of]
    assert kept["stat"] == kept["ranked"]


def test_stat_reads_what_the_whole_model_reads(tmp_path: Path) -> None:
    texts = Texts(tiny.checkpoint(), PlainTexts.of(SENTENCES))
    with pytest.raises(UserError, match="plain texts have no targets, which the decoder is me"):
        base.rank(ranking.by_name("stat"), tiny.checkpoint(), texts, StatOptions())
    with pytest.raises(ConfigError, match="gqa some: expected per-group or whole-groups"):
        StatOptions("some")


def test_the_highest_stay() -> None:
    made = tiny.dense("llama_gqa")  # two key/value heads, each read by four query heads
    name = next(m.name for m in made.family.modules(made.model) if m.kind == "attention")
    values = torch.tensor([3.0, 1.0, 2.0, 0.0, 2.5, 2.6, 2.7, 0.0], dtype=torch.float64)
    sources = Sources(scores=lambda module: values)
    scheme = {name: [Entry(0.5, "ranked")]}
    (one,) = make_variants(made, scheme, sources=sources)
    (other,) = make_variants(made, scheme, sources=sources, whole_groups=True)
    # the better heads of every group; or the group of the higher sum, though it has not the best
    assert (one.kept_units, other.kept_units) == ([0, 2, 5, 6], [4, 5, 6, 7])
    with pytest.raises(ShapeError, match=r"the scores are of shape \(3,\), it has 8 units"):
        make_variants(made, scheme, sources=Sources(scores=lambda module: values[:3]))
    with pytest.raises(UserError, match="ranked needs a file of scores, and there is none; meas"):
        make_variants(made, scheme)


def test_random_differs_by_seed_alone() -> None:
    made = tiny.dense("bert")
    first, again, other = (
        scores_of(made, "random", RandomOptions(seed)).units for seed in (1, 1, 2)
    )
    names = [m.name for m in made.family.modules(made.model) if m.kind in ("attention", "ffn")]
    assert list(first) == names
    for name, one in first.items():
        np.testing.assert_array_equal(one.importance, again[name].importance)
        assert not np.isin(one.importance, other[name].importance).any()
    assert len({value for one in first.values() for value in one.importance}) == sum(
        len(one.importance) for one in first.values()
    )


@pytest.mark.parametrize("layout", ["bert", "llama_gqa", "t5_gated", "gpt2"])
def test_units_cost_what_the_model_costs(layout: str) -> None:
    made = tiny.dense(layout)
    whole = cost.macs(made.model, made.family).by_module
    origin = scores_of(made, "l1").origin
    assert origin is not None
    assert (origin.fingerprint, origin.texts) == (made.fingerprint, None)
    known = {module.name: module for module in origin.modules}
    for name, count in whole.items():
        assert known[name].units * known[name].macs_per_unit == count
    layers = sum(m.macs_per_unit for m in origin.modules if m.kind == "layer")
    assert layers == sum(whole.values())


def test_units_cost_what_papers_say() -> None:
    """Heads and neurons by the formulas of Kwon et al. 2022, at the mean length of the texts."""
    made = tiny.dense("bert")
    texts = Texts(made, PlainTexts.of(SENTENCES))
    origin = base.origin_of(ranking.by_name("l1"), made, texts, base.NoOptions())
    assert origin.texts is not None
    lengths = [len(made.tokenizer(text)["input_ids"]) for text in SENTENCES]
    tokens, width, size = np.mean(lengths), 32, 8
    assert origin.texts.mean_tokens == {"encoder": tokens}
    assert len(set(lengths)) > 1
    expected = {
        "attention": 4 * tokens * width * size + 2 * tokens**2 * size,
        "ffn": 2 * tokens * width,
        "linear": tokens,
    }
    for module in origin.modules:
        if module.kind in expected:
            assert module.macs_per_unit == pytest.approx(expected[module.kind], rel=1e-12)


def test_texts_are_named_by_what_the_model_sees() -> None:
    model = tiny.build("opt")
    one, sized, cut = (
        depth.analyse(model, SENTENCES, tiny.tokenizer(), **settings).origin.texts.sha256  # type: ignore[union-attr]
        for settings in ({}, {"batch_size": 1}, {"max_length": 3})
    )
    assert one == sized
    assert one != cut


def test_unknown_rankers() -> None:
    with pytest.raises(
        UserError, match='way of measuring importance "x"; known are layer_distance'
    ):
        ranking.by_name("x")
