"""Every option of every command acts: with it a run differs from the same run without it.

A run is what it leaves: its report, the bytes of all files that it writes, how often the model ran,
and how a wrong value is refused. So an option that is read and forgotten is found.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from composable.commands import cli, options, program
from composable.models import checkpoint, export
from tests import tiny, tiny_tasks
from tests.end_to_end.conftest import call
from tests.end_to_end.forked import Ended

#: What commands call their default files -> what they are called in the folder of inputs.
CONF = {"encoder.block.0.layer.0.SelfAttention": 0.5, "encoder.block.0.layer.1.DenseReluDense": 0.5}
OTHER = {"encoder.block.0.layer.1.DenseReluDense.wo": 0.5}
LAYER = {"encoder.block.1": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that a command may be given, under the names of the defaults."""
    folder = tmp_path_factory.mktemp("home")
    made = tiny.checkpoint()
    made.info["data"] = str(tiny.corpus(folder / "data"))
    checkpoint.save(folder / "model/dense.pth", made)
    other = tiny.checkpoint()
    other.info["data"] = str(tiny.corpus(folder / "others", seed=1))
    checkpoint.save(folder / "model/finetuned.pth", other)
    for name, task in (("lm", "language_modeling"), ("classes", "text_classification")):
        info = {"data": str(tiny_tasks.data(task, folder / name))}
        checkpoint.save(folder / f"{name}.pth", tiny_tasks.checkpoint(task, **info))
    plain = tiny_tasks.checkpoint("text_classification")
    export.save(plain.model, folder / "hf", plain.tokenizer)
    shutil.copytree(folder / "hf", folder / "unused")
    _add_a_weight(folder / "unused/model.safetensors")
    (folder / "conf.json").write_text(json.dumps([CONF, OTHER, LAYER]))
    (folder / "other.json").write_text(json.dumps([OTHER]))
    run = functools.partial(call, cwd=folder)
    _ok(run("prune_scheme_generator.py"))
    _ok(run("prune.py"))
    for solver in ("ls", "grad"):
        _ok(run("block_level_finetuning.py", "--solver", solver, "-o", f"{solver}.npy"))
    shutil.copy(folder / "ls.npy", folder / "modules_finetuned.npy")
    _ok(run("compose_model.py"))
    distances = ("--distance", "angular_all", "bi_score")
    _ok(run("rank_importance.py", *distances, "--iterative", 1, "--stack", "encoder"))
    _ok(run("rank_importance.py", "--method", "stat", "-o", "stat.npz"))
    _ok(run("rank_importance.py", "--method", "l1", "-o", "l1.npz"))
    _ok(run("baseline_finetuning.py", "--epochs", 2))
    shutil.copy(folder / "stats_baseline.csv", folder / "stats_model.csv")
    for name, model in (("dense", "model/dense.pth"), ("model_0", "model/finetuned.pth")):
        (folder / "out").mkdir(exist_ok=True)
        _ok(run("evaluate.py", "-m", model, "-o", f"out/eval_{name}.json"))
    return folder


def _ok(ended: Ended) -> None:
    assert ended.code == 0, ended.err


def _add_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({**load_file(path), "bert.extra.weight": torch.ones(2)}, path, {"format": "pt"})


@dataclass(frozen=True)
class Case:
    """One option: the run without it, and what is added to it.

    Attributes:
        command: its name.
        given: the option with its value.
        base: what both runs are given.
        refused: end of the message, where the value is wrong on this machine.
    """

    command: str
    given: str
    base: str = ""
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.command} {self.given}"


DOWNLOAD, SMALL = "-m {home}/hf", "--epochs 2 --limit 16"
PRUNE = "--limit 20 --calibration new.npy"
BLOCK = "--solver grad --epochs 2 --limit 16"
RANK = "--limit 20"
LM = "-m {home}/lm.pth"
NO_GPU = "no CUDA device is available"
CASES = [
    *(
        Case("download_model", given, DOWNLOAD)
        for given in ("-o m.pth", "--task text_similarity", "--labels 3 --task text_classification",
                      "--max-length 9", "--dtype bfloat16")
    ),
    Case("download_model", "-m {home}/hf", "-m embedded"),
    Case("download_model", "--prefix say:", "-m embedded"),
    Case("download_model", "--revision main", DOWNLOAD, "is on this disk and has no revisions"),
    Case("download_model", "--ignore-unused", "-m {home}/unused"),
    *(
        Case("config_generator", given)
        for given in ("-m {home}/classes.pth", "-o c.json", "--attention 0.5", "--linear 0.5",
                      "--ffn 0.5", "--layers 0 --stack encoder", "--sizes 0.5",
                      "--drop-layers 1 --stack encoder --policy deepest")
    ),
    Case("config_generator", "--scores {home}/scores.npz", "--drop-layers 1 --stack encoder"),
    Case("config_generator", "--policy deepest", "--drop-layers 1 --stack encoder"),
    Case("config_generator", "--stack decoder", "--layers 0"),
    Case("config_generator", "--protect 1", "--drop-layers 1 --stack encoder --policy deepest"),
    Case("config_generator", "--linear-map", "--layers 0 --stack encoder"),
    Case("config_generator", "--metric parameters", "--sizes 0.8"),
    Case("config_generator", "--allocate uniform", "--sizes 0.6 --scores {home}/stat.npz"),
    Case("config_generator", "--gqa whole-groups", f"{LM} --sizes 0.8"),
    Case("prune_scheme_generator", "-i {home}/other.json"),
    Case("prune_scheme_generator", "-o s.json"),
    Case("prune", "-m {home}/model/finetuned.pth", PRUNE),
    Case("prune", "-c {home}/other_prune.json", "--limit 20"),
    *(
        Case("prune", given, PRUNE)
        for given in ("-o m.npy", "-p t.pth", "--attention head_l1", "--ffn neuron_l1",
                      "--linear wanda", "--data {home}/others", "--limit 10",
                      "--calibration c.npy", "--attention random --ffn random --seed 7",
                      "--memory-budget 9K", "--attention ranked --scores {home}/l1.npz")
    ),
    Case("prune", "--seed 7", "--attention random --ffn random"),
    Case("prune", "--scores {home}/l1.npz", "--attention ranked"),
    Case("prune", "--gqa whole-groups", f"{LM} -c {{home}}/lm_prune.json --attention head_l1"),
    Case("prune", "--device cuda", PRUNE, NO_GPU),
    *(
        Case("compose_model", given)
        for given in ("-m {home}/lm.pth", "-p {home}/ls.npy", "-c {home}/other.json", "-n 1",
                      "-o m.pth")
    ),
    *(
        Case("block_level_finetuning", given, BLOCK)
        for given in ("-m {home}/lm.pth", "-p {home}/other.npy", "-o m.npy", "--stats s.csv",
                      "--solver hybrid", "--data {home}/others", "--limit 8", "--epochs 3",
                      "--batch-size 4", "--lr 0.5", "--seed 7", "--dtype bfloat16")
    ),
    Case("block_level_finetuning", "--device cuda", BLOCK, NO_GPU),
    *(
        Case("block_level_finetuning", given, "--solver ls")
        for given in ("--ridge 0.5", "--calibration c.npy", "--memory-budget 9K --calibration c.npy")
    ),
    Case("block_level_finetuning", "--memory-budget 9K", "--solver ls --calibration c.npy"),
    *(
        Case("model_level_finetuning", given, SMALL)
        for given in ("-m {home}/lm.pth", "-p {home}/grad.npy", "-c {home}/other.json", "-n 1",
                      "-o m.pth", "--stats s.csv", "--data {home}/others", "--limit 8",
                      "--epochs 3", "--steps 1", "--batch-size 4", "--lr 0.5", "--seed 7",
                      "--dtype bfloat16", "--heal lora")
    ),
    Case("model_level_finetuning", "--heal neighbours", f"{SMALL} -n 2"),
    Case("model_level_finetuning", "--rank 2", f"{SMALL} --heal lora"),
    Case("model_level_finetuning", "--device cuda", SMALL, NO_GPU),
    *(
        Case("baseline_finetuning", given, SMALL)
        for given in ("-m {home}/lm.pth", "-o m.pth", "--stats s.csv", "--data {home}/others",
                      "--limit 8", "--epochs 3", "--steps 1", "--batch-size 4", "--lr 0.5",
                      "--seed 7", "--dtype bfloat16")
    ),
    Case("baseline_finetuning", "--device cuda", SMALL, NO_GPU),
    *(
        Case("evaluate", given, "--limit 6")
        for given in ("-m {home}/model/dense.pth", "-o e.json", "--split valid",
                      "--data {home}/others", "--limit 3", "--predictions p.txt", "--num-beams 3",
                      "--max-length 3", "--length 5", "--batch-tokens 4", "--dtype bfloat16")
    ),
    Case("evaluate", "--device cuda", "", NO_GPU),
    Case("plot_loss", "{home}/stats_block.csv"),
    Case("plot_loss", "-o p.png"),
    Case("report", "-d {home}/out", "-d {home}/nothing"),
    Case("export_model", "-m {home}/model/dense.pth", "-m {home}/classes.pth"),
    Case("export_model", "-o e", "-m {home}/classes.pth"),
    Case("export_model", "--pad"),
    Case("plot_importance", "{home}/stat.npz"),
    Case("plot_importance", "-o p.png"),
    Case("plot_importance", "--distance bi_score"),
    *(
        Case("rank_importance", given, RANK)
        for given in ("-m {home}/lm.pth", "-o s.npz", "--data {home}/others", "--limit 10",
                      "--method l1", "--distance bi_score", "--iterative 1 --stack encoder")
    ),
    Case("rank_importance", "--stack decoder", f"{RANK} --iterative 1 --stack encoder"),
    Case("rank_importance", "--protect 1", f"{RANK} --iterative 1 --stack encoder"),
    Case("rank_importance", "--calibration c.npy", f"{RANK} --method stat"),
    Case("rank_importance", "--gqa whole-groups", f"{LM} --method stat --calibration c.npy"),
    Case("rank_importance", "--seed 7", "--method random"),
    Case("rank_importance", "--device cuda", RANK, NO_GPU),
]  # fmt: skip
#: Whose effect other tests measure: it changes only what is on the disk after an interruption.
ELSEWHERE = {("model_level_finetuning", "--save-steps"), ("baseline_finetuning", "--save-steps")}
