"""The worked examples of docs/adding.md: added as it says, they pass what all others pass."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from composable import families, methods, ranking, tasks
from composable.calibration.batching import Texts
from composable.calibration.collect import calibrate
from composable.formats import bundle, scores_file
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.variants.compose import compose
from tests import tiny, tiny_tasks
from tests.end_to_end import test_matrix as matrix
from tests.end_to_end.conftest import call
from tests.oracle import test_families as oracle
from tests.oracle.test_reported_errors import outputs
from tests.paths import ROOT
from tests.unit.families import test_families as unit

PAGE = ROOT / "docs" / "adding.md"


def block(name: str) -> str:
    """A block of code of the page."""
    pattern = rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->"
    found = re.search(pattern, PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, name
    return found[1]


def example(kind: str, constant: str) -> Any:
    """What a file with an example of the page defines under a name."""
    names: dict[str, Any] = {"__name__": f"example_{kind}"}
    exec(compile(block(f"example {kind}"), f"example_{kind}.py", "exec"), names)
    return names[constant]


@pytest.fixture
def phi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The family and the tiny model of the page."""
    with pytest.raises(families.UserError, match=r"architecture .phi. is not supported"):
        families.by_model_type("phi")
    family = example("family", "PHI")
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    layouts = dict(tiny.LAYOUTS)
    exec(compile(block("example layout"), "layout", "exec"), {"LAYOUTS": layouts})
    monkeypatch.setattr(tiny, "LAYOUTS", layouts)
    return family


@pytest.mark.parametrize("kind", ["some gone", "first gone", "all gone"])
def test_removed_units_are_zeroed_columns(phi: Any, kind: str) -> None:
    oracle.test_removed_units_are_zeroed_columns("phi", kind, "sdpa")


@pytest.mark.parametrize("gqa", ["per-group", "whole-groups"])
@pytest.mark.parametrize("rates", [(0.5, 0.25, 0), (1, 0.5, 0), "layer 0"])
def test_cached_decoding_equals_one_pass(phi: Any, rates: Any, gqa: str) -> None:
    oracle.test_cached_decoding_equals_one_pass("phi", rates, gqa)


def test_the_other_checks_of_all_families(phi: Any, tmp_path: Path) -> None:
    oracle.test_removed_layers_equal_the_layers_that_stay("phi")
    oracle.test_a_composed_model_comes_back_from_its_file("phi", tmp_path)
    unit.test_parts_are_known_by_name("phi")
    unit.test_every_weight_of_the_layers_has_one_owner("phi")
    unit.test_nothing_removed_is_the_dense_module("phi", "eager")
    unit.test_recorded_calls_are_those_of_the_dense_model("phi")
    unit.test_moments_are_those_of_real_tokens("phi")


def save_opt(folder: Path) -> Checkpoint:
    """A tiny language model with biases, and its texts, in a folder."""
    made = tiny.dense("opt")
    made.tokenizer = tiny_tasks.tokenizer(False)
    made.info |= {"data": str(tiny_tasks.data("language_modeling", folder / "data"))}
    checkpoint.save(folder / "model.pth", made)
    return made


def run(folder: Path, script: str, *args: str) -> None:
    ended = call(script, "-q", "-m", "model.pth", *args, cwd=folder)
    assert ended.code == 0, ended.err


def test_a_method_that_changes_o(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through prune, least squares and compose; reported errors are those of running it."""
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, example("method", "LOUD_HEADS")))
    dense = save_opt(tmp_path)
    name = next(m.name for m in dense.family.modules(dense.model) if m.kind == "attention")
    o = f"{name}.out_proj"
    (tmp_path / "conf.json").write_text(json.dumps([{name: {"rate": 0.5, "method": "loud_heads"}}]))
    call("prune_scheme_generator.py", cwd=tmp_path)
    run(tmp_path, "prune.py")
    run(tmp_path, "block_level_finetuning.py", "--solver", "ls")
    (pruned,) = bundle.open_bundle(tmp_path / "modules.npy", dense.fingerprint).load_all()
    (refitted,) = bundle.open_bundle(tmp_path / "modules_finetuned.npy").load_all()
    columns = torch.cat([torch.arange(h * 8, h * 8 + 8) for h in pruned.kept_units or []])
    loud = pruned.tensors["out_proj.weight"] / dense.model.get_parameter(f"{o}.weight")[:, columns]
    assert loud.min() > 1.01  # it did change o
    torch.testing.assert_close(loud, loud.mean().expand_as(loud), rtol=1e-5, atol=0)
    options = {"data": None, "limit": 4096, "memory_budget": 1 << 30}
    _, texts = calibrate(dense, tmp_path / "calibration.npy", device="cpu", **options)
    batches = texts[1].batches()
    target = outputs(dense.model, o, batches)
    for variant, stat in ((pruned, "error_before"), (refitted, "error_after")):
        copied = Checkpoint(**{**vars(dense), "model": copy.deepcopy(dense.model)})
        found = outputs(compose(copied, [variant]).model, o, batches)
        error = float((found - target).square().sum() / target.square().sum())
        assert refitted.stats[stat] == pytest.approx(error, rel=1e-4)
    assert refitted.stats["error_after"] < refitted.stats["error_before"]
    for source in ("modules.npy", "modules_finetuned.npy"):
        run(tmp_path, "compose_model.py", "-p", source, "-o", "composed.pth")
    composed = checkpoint.load(tmp_path / "composed.pth").model
    weight = composed.get_parameter(f"{o}.weight")
    torch.testing.assert_close(weight, refitted.tensors["out_proj.weight"], rtol=0, atol=0)


def test_a_ranker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the command to a model without the least active neurons, by a plain loop."""
    monkeypatch.setattr(ranking, "RANKERS", (*ranking.RANKERS, example("ranker", "ACTIVITY")))
    dense = save_opt(tmp_path)
    run(tmp_path, "rank_importance.py", "--method", "activity")
    scores = scores_file.load(tmp_path / "scores.npz")
    assert scores.origin is not None
    options = {"exponent": 1.0, "reading": dense.reading}
    assert (scores.origin.method, scores.origin.options) == ("activity", options)
    ffns = [m for m in dense.family.modules(dense.model) if m.kind == "ffn"]
    seen: dict[str, list[torch.Tensor]] = {m.name: [] for m in ffns}
    for module in ffns:
        down = dense.model.get_submodule(module.output_path)
        down.register_forward_pre_hook(lambda _, args, own=seen[module.name]: own.append(args[0]))
    corpus = tasks.by_name("language_modeling").read(str(tmp_path / "data"), None, "train", 256)
    dataset = Texts(dense, corpus).dataset
    for index in range(len(dataset)):
        ids = torch.as_tensor(dataset[index]["input_ids"])[None].long()
        with torch.no_grad():
            dense.model(input_ids=ids)
    run(tmp_path, "config_generator.py", "--ffn", "0.5", "--attention", "0")
    call("prune_scheme_generator.py", cwd=tmp_path)
    run(tmp_path, "prune.py", "--scores", "scores.npz", "--ffn", "ranked")
    variants = bundle.open_bundle(tmp_path / "modules.npy", dense.fingerprint).load_all()
    assert [variant.module for variant in variants] == [module.name for module in ffns]
    for variant, module in zip(variants, ffns, strict=True):
        states = torch.cat([each.flatten(0, -2) for each in seen[module.name]]).double()
        activity = states.square().mean(0).sqrt()
        importance = torch.from_numpy(scores.importance(module.name))
        torch.testing.assert_close(importance, activity, rtol=1e-5, atol=1e-7)
        highest = importance.topk(module.units // 2).indices.sort().values
        assert variant.kept_units == highest.tolist()


def test_a_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole chain of all tasks, and its score by a plain loop."""
    task = example("task", "NEXT_TOKEN")
    monkeypatch.setattr(tasks, "NEXT_TOKEN", task, raising=False)
    monkeypatch.setattr(tasks, "TASKS", (*tasks.TASKS, "composable.tasks:NEXT_TOKEN"))
    assert tasks.of_architecture("OPTForCausalLM", 2) is tasks.by_name("language_modeling")
    writers = tiny_tasks._WRITERS | {"next_token": tiny_tasks._WRITERS["language_modeling"]}
    monkeypatch.setattr(tiny_tasks, "_WRITERS", writers)
    matrix.test_the_whole_chain("opt", "next_token", tmp_path)
    made = matrix.dense_of("opt", "next_token")
    corpus = task.read(str(tmp_path / "data"), None, "test", None)
    _, report = task.evaluate(made, corpus, {"device": "cpu", "dtype": "float32"})
    right = count = 0
    dataset = task.dataset(corpus, made)
    for index in range(len(dataset)):
        ids = torch.as_tensor(dataset[index]["input_ids"]).long()
        with torch.no_grad():
            guesses = made.model(input_ids=ids[None]).logits[0].argmax(-1)
        right += int((guesses[:-1] == ids[1:]).sum())
        count += len(ids) - 1
    assert count > 50
    assert report["accuracy"]["value"] == pytest.approx(100 * right / count, abs=1e-4)
