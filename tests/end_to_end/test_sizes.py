"""Sizes through all scripts: the model that comes out costs what was said before it was made."""

from pathlib import Path

import pytest

from composable.formats import bundle
from composable.formats.config import read_configurations
from composable.models import checkpoint, cost
from tests.end_to_end.test_depth import made_of, ok

SIZES = (0.8, 0.5)


@pytest.mark.parametrize(
    ("layout", "metric", "allocation", "gqa"),
    [
        ("t5", "macs", "stat", None),
        ("gpt2", "parameters", "uniform", None),
        ("llama_gqa", "layer-parameters", "stat", "per-group"),
        ("llama_gqa", "macs", "uniform", "whole-groups"),
        ("llama_gqa", "macs", "stat", "whole-groups"),
    ],
)
def test_from_stat_to_a_model_of_that_size(
    layout: str, metric: str, allocation: str, gqa: str | None, tmp_path: Path
) -> None:
    _, data = made_of(layout, tmp_path)
    model, texts = ("-m", "dense.pth"), ("--data", data)
    how = ("--gqa", gqa) if gqa else ()
    ok(tmp_path, "rank_importance.py", *model, "--method", "stat", *how, *texts)
    report = ok(
        tmp_path, "config_generator.py", *model, "--scores", "scores.npz", "--sizes", *SIZES,
        "--metric", metric, "--allocate", allocation,
    )  # fmt: skip
    ok(tmp_path, "prune_scheme_generator.py")
    stat = ("--attention", "stat", "--ffn", "stat")
    ok(tmp_path, "prune.py", *model, *stat, *how, *texts)
    ok(tmp_path, "block_level_finetuning.py", *model, "--solver", "ls", *texts)
    variants = bundle.open_bundle(tmp_path / "modules_finetuned.npy").load_all()
    assert all(v.stats["error_after"] <= v.stats["error_before"] for v in variants)
    dense = checkpoint.load(tmp_path / "dense.pth")
    units = {module.name: module.units for module in dense.family.modules(dense.model)}
    configurations = read_configurations(tmp_path / "conf.json")
    for i, (size, said) in enumerate(zip(SIZES, report["costs"], strict=True)):
        ok(tmp_path, "compose_model.py", *model, "-p", "modules_finetuned.npy", "-n", i,
           "-o", "composed.pth")  # fmt: skip
        made = checkpoint.load(tmp_path / "composed.pth")
        found = {
            name: cost.total(made.model, made.family, name, report["lengths"])
            for name in ("macs", "parameters", "layer-parameters")
        }
        for name, value in found.items():
            assert round(value, 2) == said[name.replace("-", "_")]
        assert 0.9 * size < said["shares"][metric.replace("-", "_")] <= size
        for module in made.family.modules(made.model):
            if module.kind in ("attention", "ffn"):
                rate = configurations[i][module.name].rate
                assert module.units == round((1 - rate) * units[module.name]) > 0
