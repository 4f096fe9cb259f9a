"""Scores from script to script: measured once, then what goes by them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composable import ranking
from composable.calibration import second_moments
from composable.formats import bundle, scores_file
from composable.formats.scores import Scores, UnitImportance
from composable.models import checkpoint
from composable.ranking.base import Ranker
from tests import tiny
from tests.end_to_end.test_depth import call, made_of, ok

RANKED = ("--attention", "ranked", "--ffn", "ranked", "--scores")
BY_WEIGHTS = ("--attention", "head_l1", "--ffn", "neuron_l1")


def variants(folder: Path, *args: Any) -> dict[tuple[str, float], Any]:
    """Prune, and read what came of it: module and rate -> variant."""
    ok(folder, "prune.py", "-m", "dense.pth", "-o", "m.npy", *args)
    found = bundle.open_bundle(folder / "m.npy").load_all()
    return {(v.module, v.entry.rate): v for v in found}


def scheme(folder: Path, *args: Any) -> None:
    ok(folder, "config_generator.py", "-m", "dense.pth", *args)
    ok(folder, "prune_scheme_generator.py")


@pytest.mark.parametrize("layout", ["opt", "llama_gqa"])
def test_heads_and_neurons_by_scores(layout: str, tmp_path: Path) -> None:
    made_of(layout, tmp_path)
    report = ok(tmp_path, "rank_importance.py", "-m", "dense.pth", "--method", "l1")
    assert set(report) == {"wrote", "method", "units", "seconds"}
    scheme(tmp_path, "--attention", 0.5, 0.25, "--ffn", 0.5, 0.25, "--linear", 0.3, 0)
    for gqa in ("per-group", "whole-groups"):
        plain = variants(tmp_path, "--gqa", gqa, *BY_WEIGHTS)
        scored = variants(tmp_path, "--gqa", gqa, *RANKED, "scores.npz")
        assert plain.keys() == scored.keys()
        for key, one in scored.items():
            assert one.kept_units == plain[key].kept_units
            assert one.entry.method == {"linear": "l1"}.get(one.kind, "ranked")
    mixed = variants(
        tmp_path, "--attention", "head_l1", "--ffn", "ranked", "--scores", "scores.npz"
    )
    assert {(v.kind, v.entry.method) for v in mixed.values()} == {
        ("attention", "head_l1"), ("ffn", "ranked"),
    }  # fmt: skip
    seen = []
    for seed in (1, 1, 2):
        rank = ("rank_importance.py", "-m", "dense.pth", "--method", "random", "--seed", seed)
        ok(tmp_path, *rank, "-o", f"{seed}.npz")
        found = variants(tmp_path, *RANKED, f"{seed}.npz")
        seen.append([v.kept_units for v in found.values()])
    assert seen[0] == seen[1] != seen[2]
    options = bundle.open_bundle(tmp_path / "m.npy").options
    assert options["scores"] == {"method": "random", "options": {"seed": 2}}


@pytest.mark.parametrize("gqa", ["per-group", "whole-groups"])
def test_units_by_stat_from_one_calibration(
    gqa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured once; what the method chooses is what its scores choose."""
    _, data = made_of("llama_gqa", tmp_path)
    passes: list[str] = []
    measure = second_moments.InputMoments.measure
    monkeypatch.setattr(
        second_moments.InputMoments, "measure",
        lambda self, batch: (passes.append(script), measure(self, batch))[1],
    )  # fmt: skip
    script = "rank"
    texts = ("--data", data, "--limit", 4096)
    rank = ("rank_importance.py", "-m", "dense.pth", "--method", "stat", "--gqa", gqa, *texts)
    ok(tmp_path, *rank)
    assert passes
    script = "prune"
    scheme(tmp_path, "--attention", 0.5, 0.25, "--ffn", 0.5, 0.25)
    stat = ("--attention", "stat", "--ffn", "stat")
    by_stat = variants(tmp_path, "--gqa", gqa, *texts, *stat)
    scored = variants(tmp_path, "--gqa", gqa, *RANKED, "scores.npz")
    assert {v.entry.method for v in by_stat.values()} == {"stat"}
    assert {v.entry.method for v in scored.values()} == {"ranked"}
    assert {key: v.kept_units for key, v in by_stat.items()} == {
        key: v.kept_units for key, v in scored.items()
    }
    options = bundle.open_bundle(tmp_path / "m.npy").options
    assert options["scores"]["options"]["gqa"] == gqa
    others = ("unit_wanda", "random") if gqa == "per-group" else ("fluctuation", "exchange")
    for name in others:
        found = variants(tmp_path, *texts, "--ffn", name)
        assert {v.entry.method for v in found.values()} == {"head_gram", name}
    assert "prune" not in passes
    other = {"per-group": "whole-groups", "whole-groups": "per-group"}[gqa]
    ended = call(tmp_path, "prune.py", "-m", "dense.pth", "--gqa", other, *RANKED, "scores.npz")
    assert ended.code == 1
    assert f"gqa {other}: the scores are of heads that leave {gqa}; say the same" in ended.err


def test_random_is_the_same_as_a_method_and_as_scores(tmp_path: Path) -> None:
    made_of("opt", tmp_path)
    scheme(tmp_path, "--attention", 0.5, "--ffn", 0.5)
    ok(tmp_path, "rank_importance.py", "-m", "dense.pth", "--method", "random", "--seed", 7)
    scored = variants(tmp_path, *RANKED, "scores.npz")
    by_lot = ("--attention", "random", "--ffn", "random", "--seed")
    found = variants(tmp_path, *by_lot, 7)
    assert bundle.open_bundle(tmp_path / "m.npy").options["seed"] == 7
    other = variants(tmp_path, *by_lot, 8)
    kept, expected, others = ([v.kept_units for v in x.values()] for x in (found, scored, other))
    assert kept == expected != others


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*RANKED, "none.npz"], "none.npz: No such file"),
        ([*RANKED, "other.npz"], "other.npz: measured on another model"),
        ([*RANKED, "memory.npz"], "the scores hold no importance of the units of"),
        ([*RANKED, "one.npz"], "(they have those of 1 modules); measure it with"),
        (["--scores", "l1.npz", *BY_WEIGHTS], "--scores has no effect: add --attention ranked"),
        (RANKED[:4], "the method ranked needs --scores; rank_importance.py measures them"),
        ([*BY_WEIGHTS, "--seed", 3], "--seed has no effect: no method here is random"),
        ([*BY_WEIGHTS, "--linear", "l1"], "--linear has no effect: no linear has a rate"),
    ],
)
def test_options_that_prune_cannot_use(tmp_path: Path, args: Sequence[Any], message: str) -> None:
    made_of("opt", tmp_path)
    scheme(tmp_path, "--attention", 0.5, "--ffn", 0.5)
    ok(tmp_path, "rank_importance.py", "-m", "dense.pth", "--method", "l1", "-o", "l1.npz")
    found = scores_file.load(tmp_path / "l1.npz")
    assert found.origin is not None
    other = dataclasses.replace(found.origin, fingerprint="00" * 32)
    scores_file.save(tmp_path / "other.npz", Scores(other, found.units))
    first = dict([next(iter(found.units.items()))])
    scores_file.save(tmp_path / "one.npz", Scores(found.origin, first))
    np.savez(tmp_path / "memory.npz", arr_0=np.zeros((4, 4)))
    ended = call(tmp_path, "prune.py", "-m", "dense.pth", *args)
    assert ended.code == (2 if "has no effect" in message else 1)
    assert message in ended.err.splitlines()[-1]
    assert not (tmp_path / "modules.npy").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "near"], "'near' is not one of layer_distance, trajectory, logit_kl, "),
        (["--method", "l1", "--seed", 1], "--seed has no effect with --method l1; leave it out"),
        (
            ["--method", "random", "--distance", "bi_score"],
            "--distance has no effect with --method",
        ),
        (["--method", "l1", "--data", "data"], "--data has no effect with --method l1"),
        (
            ["--method", "random", "--iterative", 1],
            "--iterative has no effect with --method random",
        ),
        (["--method", "random", "--gqa", "per-group"], "--gqa has no effect with --method random"),
        (["--seed", 1], "--seed has no effect with --method layer_distance"),
    ],
)
def test_options_of_other_rankers(tmp_path: Path, args: list[Any], message: str) -> None:
    made_of("opt", tmp_path)
    ended = call(tmp_path, "rank_importance.py", "-m", "dense.pth", *args)
    assert ended.code == 2
    assert message in ended.err.splitlines()[-1]
    assert not (tmp_path / "scores.npz").exists()


def test_scores_without_distances(tmp_path: Path) -> None:
    made_of("opt", tmp_path)
    ok(tmp_path, "rank_importance.py", "-m", "dense.pth", "--method", "l1")
    choose = ("config_generator.py", "-m", "dense.pth", "--scores", "scores.npz")
    ended = call(tmp_path, *choose, "--drop-layers", 1)
    assert ended.code == 1
    assert "the scores (of l1) hold no distances of blocks of layers" in ended.err
    ended = call(tmp_path, "plot_importance.py", "--distance", "bi_score")
    assert ended.code == 2
    assert "--distance has no effect: the scores hold no distances of layers" in ended.err
    assert not (tmp_path / "scores.png").exists()
    report = ok(tmp_path, "plot_importance.py")
    assert (report["wrote"], report["modules"]) == ("scores.png", 8)
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_units_by_squared_gradients(tmp_path: Path) -> None:
    """From plain texts to variants; what counts is in tests/oracle/test_fisher.py."""
    made_of("llama_gqa", tmp_path)
    (tmp_path / "a.txt").write_text("a dog runs .\nthe man sits\n")
    rank = ("rank_importance.py", "-m", "dense.pth", "--method", "fisher", "--data", "a.txt")
    report = ok(tmp_path, *rank)
    assert report["samples"] == 2
    ok(tmp_path, *rank, "-o", "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "scores.npz").read_bytes()
    scheme(tmp_path, "--attention", 0.5, 0.5, "--ffn", 0.5, 0.5)
    found = scores_file.load(tmp_path / "scores.npz")
    for one in variants(tmp_path, *RANKED, "scores.npz").values():
        if one.kind == "ffn":
            order = np.argsort(found.importance(one.module), kind="stable")
            assert one.kept_units == sorted(order[len(order) // 2 :].tolist())


def test_depth_scores_are_those_of_the_file(tmp_path: Path) -> None:
    """What Python measures on a folder, config_generator.py takes for the file made of it."""
    from composable import depth

    tiny.build("gpt2").save_pretrained(tmp_path / "hf")
    tiny.tokenizer().save_pretrained(tmp_path / "hf")
    ok(tmp_path, "download_model.py", "-m", "hf", "-o", "dense.pth")
    model = checkpoint.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    found = depth.analyse(model, ["a dog runs", "the man sits"], tiny.tokenizer())
    scores_file.save(tmp_path / "scores.npz", found)
    choose = ("config_generator.py", "-m", "dense.pth", "--scores", "scores.npz")
    ok(tmp_path, *choose, "--drop-layers", 1)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
    found = depth.analyse(model, ["a dog runs", "the man sits"], tiny.tokenizer())
    scores_file.save(tmp_path / "scores.npz", found)
    ended = call(tmp_path, *choose, "--drop-layers", 1)
    assert ended.code == 1
    assert "scores.npz: measured on another model" in ended.err


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """Of the ranker below; its flag is there already."""

    limit: int | None = None


def _by_length(made: Any, texts: Any, options: InputOptions) -> Scores:
    """Rank units by their number times the tokens of the longest text: no sense, but of texts."""
    longest = options.limit * max(batch["input_ids"].shape[1] for batch in texts.batches())
    return Scores(
        units={
            m.name: UnitImportance(np.arange(m.units) * float(longest))
            for m in made.family.modules(made.model) if m.kind == "ffn"
        }
    )  # fmt: skip


def test_a_ranker_is_a_function_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = Ranker("by_length", "nobody", _by_length, InputOptions, reads_texts=True)
    monkeypatch.setattr(ranking, "RANKERS", (*ranking.RANKERS, ranker))
    _, data = made_of("opt", tmp_path)
    report = ok(
        tmp_path, "rank_importance.py", "-m", "dense.pth", "--method", "by_length",
        "--data", data, "--limit", 30,
    )  # fmt: skip
    assert report["samples"] > 2
    scores = scores_file.load(tmp_path / "scores.npz")
    assert scores.origin is not None
    assert scores.origin.options["limit"] == 30
    scheme(tmp_path, "--ffn", 0.5)
    found = variants(tmp_path, "--ffn", "ranked", "--scores", "scores.npz")
    for variant in found.values():
        units = len(scores.importance(variant.module))
        assert variant.kept_units == list(range(units // 2, units))
