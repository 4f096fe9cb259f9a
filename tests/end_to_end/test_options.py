"""Every option of every command acts: with it a run differs from the same run without it.

A run is what it leaves: its report, the bytes of all files that it writes, how often the model ran,
and how a wrong value is refused. So an option that is read and forgotten is found.
"""

import functools
import hashlib
import json
import shutil
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
    _ok(run("prune_scheme_generator.py", "-i", "other.json", "-o", "other_prune.json"))
    (folder / "lm_prune.json").write_text('{"model.layers.0.self_attn": [0.5]}')
    _ok(run("prune.py"))
    _ok(run("prune.py", "-c", "other_prune.json", "-o", "other.npy"))
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
    Case("config_generator", "--protect 0", "--drop-layers 1 --stack encoder --policy deepest"),
    Case("config_generator", "--linear-map", "--layers 0 --stack encoder"),
    Case("config_generator", "--metric parameters", "--sizes 0.8"),
    Case("config_generator", "--allocate uniform", "--sizes 0.6 --scores {home}/stat.npz"),
    Case("config_generator", "--grid 4", "--sizes 0.6"),
    Case("config_generator", "--grid 0", "--sizes 0.4 --scores {home}/l1.npz --allocate global"),
    Case("config_generator", "--gqa whole-groups", f"{LM} --sizes 0.7"),
    Case("prune_scheme_generator", "-i {home}/other.json"),
    Case("prune_scheme_generator", "-o s.json"),
    Case("prune", "-m {home}/model/finetuned.pth", PRUNE),
    Case("prune", "-c {home}/other_prune.json"),
    *(
        Case("prune", given, PRUNE)
        for given in ("-o m.npy", "-p t.pth", "--attention head_l1", "--ffn neuron_l1",
                      "--linear wanda", "--data {home}/others", "--limit 10",
                      "--calibration c.npy", "--memory-budget 9K",
                      "--attention ranked --scores {home}/l1.npz")
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
                      "--batch-size 4", "--lr 0.5", "--seed 7", "--dtype float16")
    ),
    Case("block_level_finetuning", "--device cuda", BLOCK, NO_GPU),
    *(
        Case("block_level_finetuning", given, "--solver ls")
        for given in ("--ridge 0.5", "--calibration c.npy")
    ),
    Case("block_level_finetuning", "--memory-budget 9K", "--solver ls --calibration c.npy"),
    *(
        Case("model_level_finetuning", given, SMALL)
        for given in ("-m {home}/lm.pth", "-p {home}/grad.npy", "-c {home}/other.json", "-n 1",
                      "-o m.pth", "--stats s.csv", "--data {home}/others", "--limit 8",
                      "--epochs 3", "--steps 1", "--batch-size 4", "--lr 0.5", "--seed 7",
                      "--dtype float16", "--heal lora")
    ),
    Case("model_level_finetuning", "--heal neighbours", f"{SMALL} -n 2"),
    Case("model_level_finetuning", "--rank 2", f"{SMALL} --heal lora"),
    Case("model_level_finetuning", "--device cuda", SMALL, NO_GPU),
    *(
        Case("baseline_finetuning", given, SMALL)
        for given in ("-m {home}/lm.pth", "-o m.pth", "--stats s.csv", "--data {home}/others",
                      "--limit 8", "--epochs 3", "--steps 1", "--batch-size 4", "--lr 0.5",
                      "--seed 7", "--dtype float16")
    ),
    Case("baseline_finetuning", "--device cuda", SMALL, NO_GPU),
    *(
        Case("evaluate", given, "--limit 6")
        for given in ("-m {home}/model/dense.pth", "-o e.json", "--split valid",
                      "--data {home}/data", "--limit 3", "--predictions p.txt", "--num-beams 3",
                      "--max-length 3", "--length 5", "--batch-tokens 4", "--dtype float16")
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
                      "--distance bi_score", "--iterative 1 --stack encoder")
    ),
    Case("rank_importance", "--method l1"),
    Case("rank_importance", "--stack decoder", f"{RANK} --iterative 1 --stack encoder"),
    Case("rank_importance", "--protect 1", f"{RANK} --iterative 1 --stack encoder"),
    Case("rank_importance", "--calibration c.npy", f"{RANK} --method stat"),
    Case("rank_importance", "--gqa whole-groups", f"{LM} --method stat --calibration c.npy"),
    Case("rank_importance", "--group 7", "--method trajectory --limit 4"),
    Case("rank_importance", "--seed 7", "--method random"),
    Case("rank_importance", "--device cuda", RANK, NO_GPU),
]  # fmt: skip
#: Whose effect other tests measure: it changes only what is on the disk after an interruption.
ELSEWHERE = {("model_level_finetuning", "--save-steps"), ("baseline_finetuning", "--save-steps")}


def test_no_option_is_left_out() -> None:
    for name in program.COMMANDS:
        command = program.main.get_command(click.Context(program.main), name)
        assert command is not None
        flags = {each.opts[0] for each in command.params if isinstance(each, options.Option)}
        seen = {word for case in CASES if case.command == name for word in case.given.split()}
        seen |= {flag for command, flag in ELSEWHERE if command == name}
        assert flags <= seen, name


def test_the_general_options_are_on_every_command() -> None:
    for name in program.COMMANDS:
        command = program.main.get_command(click.Context(program.main), name)
        assert command is not None
        # with its settings: click keeps the help option that it makes of the first context
        context = click.Context(command, **command.context_settings)
        assert {*cli.GENERAL} <= {*command.get_params(context)}


@dataclass(frozen=True)
class Left:
    """What a run leaves: exit code and message, its report, its files, and calls of the model."""

    code: int
    message: str
    report: str
    files: tuple[tuple[str, str], ...]
    calls: int


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number that grows with every look-up of an embedding."""
    seen, look_up = [0], torch.nn.functional.embedding

    def counted(*args: Any, **settings: Any) -> Any:
        seen[0] += 1
        return look_up(*args, **settings)

    monkeypatch.setattr(torch.nn.functional, "embedding", counted)
    return seen


def left_by(case: Case, given: str, folder: Path, home: Path, calls: list[int]) -> Left:
    """Run in a copy of the inputs, whose names are the defaults."""
    shutil.copytree(home, folder, symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    calls[0] = 0
    args = [word.format(home=folder) for word in f"{case.base} {given}".split()]
    ended = call(f"{case.command}.py", *args, cwd=folder)
    report = json.loads(ended.out) if ended.out else {}
    written = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and before.get(path) != path.stat().st_mtime_ns
    }
    timed = ("stats", "report.md", "e.json", ".csv", ".png")  # hold seconds
    kept = {name: digest for name, digest in written.items() if not name.endswith(timed)}
    return Left(
        ended.code,
        ended.err.splitlines()[-1] if ended.code else "",
        json.dumps(_untimed(report, folder), sort_keys=True),
        (*kept.items(), *((name, "") for name in written.keys() - kept.keys())),
        calls[0],
    )


def _untimed(value: Any, folder: Path) -> Any:
    """A report without seconds and speeds, and without what it only repeats of the options."""
    if isinstance(value, dict):
        return {
            key: _untimed(one, folder)
            for key, one in value.items()
            if "second" not in key and key not in ("settings", "dtype", "solver")
        }
    return str(value).replace(str(folder), "")


#: Command and what it is given -> what it left.
WITHOUT: dict[tuple[str, str], Left] = {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_option_acts(case: Case, home: Path, tmp_path: Path, calls: list[int]) -> None:
    key = (case.command, case.base)
    if key not in WITHOUT:
        WITHOUT[key] = left_by(case, "", tmp_path / "without", home, calls)
    given = left_by(case, case.given, tmp_path / "with", home, calls)
    if case.refused:
        if "cuda" in case.given and torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        assert given.code == 1
        assert case.refused in given.message
        return
    assert "leave it out" not in given.message
    assert given != WITHOUT[key]


#: A command line, and the option in it that would have no effect.
IDLE = [
    ("block_level_finetuning --solver ls --epochs 9", "--epochs"),
    ("block_level_finetuning --solver ls --lr 5", "--lr"),
    ("block_level_finetuning --solver ls --batch-size 5", "--batch-size"),
    ("block_level_finetuning --solver ls --seed 5", "--seed"),
    ("block_level_finetuning --solver ls --dtype bfloat16", "--dtype"),
    ("block_level_finetuning --solver grad --calibration c.npy", "--calibration"),
    ("block_level_finetuning --solver grad --ridge 0", "--ridge"),
    ("block_level_finetuning --solver grad --memory-budget 1G", "--memory-budget"),
    ("model_level_finetuning --rank 8", "--rank"),
    ("rank_importance --method l1 --seed 1", "--seed"),
    ("rank_importance --method l1 --data data", "--data"),
    ("rank_importance --method random --limit 3", "--limit"),
    ("rank_importance --method stat --distance bi_score", "--distance"),
    ("rank_importance --method stat --iterative 1", "--iterative"),
    ("rank_importance --method fisher --group 2", "--group"),
    ("rank_importance --method trajectory --calibration c.npy", "--calibration"),
    ("rank_importance --stack encoder", "--stack"),
    ("rank_importance --protect 1", "--protect"),
    ("rank_importance --gqa whole-groups", "--gqa"),
    ("rank_importance --calibration c.npy", "--calibration"),
    ("prune --seed 3", "--seed"),
    ("prune --scores {home}/l1.npz", "--scores"),
    ("prune -c {home}/other_prune.json --attention head_l1", "--attention"),
    ("evaluate -m {home}/classes.pth --num-beams 2", "--num-beams"),
    ("evaluate -m {home}/classes.pth --max-length 9", "--max-length"),
    ("config_generator --policy singles", "--policy"),
    ("config_generator --scores {home}/scores.npz", "--scores"),
    ("config_generator --metric parameters", "--metric"),
    ("config_generator --grid 8", "--grid"),
    ("config_generator --sizes 0.5 --ffn 0.5", "--ffn"),
    ("config_generator --drop-layers 1 --policy deepest --scores {home}/scores.npz", "--scores"),
]


@pytest.mark.parametrize(("line", "flag"), IDLE)
def test_an_option_without_effect_is_refused(line: str, flag: str, home: Path) -> None:
    name, *words = line.format(home=home).split()
    ended = call(f"{name}.py", *words, cwd=home)
    assert (ended.code, ended.out) == (2, "")
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"Error: {flag} ")
    assert last.endswith(f"leave it out. (see {name}.py --help)")


def test_a_number_type_that_a_solver_does_not_know(home: Path) -> None:
    ended = call("block_level_finetuning.py", "--dtype", "float16", cwd=home)
    assert (ended.code, ended.out) == (2, "")
    assert "--dtype float16: --solver hybrid trains in float32 or bfloat16" in ended.err


def test_whose_layers_go_one_by_one(home: Path) -> None:
    ended = call("rank_importance.py", "--iterative", 1, cwd=home)
    assert (ended.code, ended.out) == (2, "")
    assert "the model has encoder and decoder layers; say which with --stack." in ended.err


def test_texts_that_no_method_reads(home: Path, tmp_path: Path) -> None:
    """The data of a model may be named for every scheme."""
    words = ("-m", home / "model/dense.pth", "-c", home / "other_prune.json")
    ended = call("prune.py", *words, "--data", "nowhere", cwd=tmp_path)
    assert ended.code == 0
    assert "no method of this scheme looks at texts, so none are read." in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["modules.npy"]
