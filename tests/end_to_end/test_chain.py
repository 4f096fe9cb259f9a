"""The scripts one after another with their defaults, and what meets in compose_model.py."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from composable.formats import bundle
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.models.structure import Edit
from composable.training import callbacks
from tests import tiny
from tests.end_to_end.conftest import Ended, Workshop, call, files_in, save_model
from tests.paths import ROOT

#: The chain of the README: every script with no argument at all, and what it writes.
CHAIN = {
    "config_generator.py": ["conf.json"],
    "prune_scheme_generator.py": ["conf_prune.json"],
    "prune.py": ["modules.npy", "calibration.npy"],
    "compose_model.py": ["model/composed.pth"],
    "baseline_finetuning.py": ["model/baseline.pth", "stats_baseline.csv"],
    "block_level_finetuning.py": [
        "modules_finetuned.npy", "stats_block.csv", "stats_block_variants.csv",
        "stats_block_variants.png",
    ],
    "model_level_finetuning.py": ["model/finetuned.pth", "stats_model.csv"],
    "evaluate.py": [],
    "plot_loss.py": ["loss.png"],
}  # fmt: skip
TRAININGS = ("baseline_finetuning.py", "block_level_finetuning.py", "model_level_finetuning.py")
BLOCK = "block_level_finetuning.py"
HEADER = "epoch,training_loss,validation_loss,training_seconds,validation_seconds,learning_rate"
ATTENTION = "encoder.block.0.layer.0.SelfAttention"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Ended], dict[str, Any]]:
    """A working folder after the whole chain; what every script said, and which files it made."""
    folder = tmp_path_factory.mktemp("chain")
    runs, made = {}, {}
    save_model(folder / "model/dense.pth", tiny.corpus(folder / "corpus"))
    for script in CHAIN:
        before = files_in(folder)
        runs[script] = call(script, cwd=folder)
        made[script] = sorted(set(files_in(folder)) - set(before))
    return folder, runs, made


def zeros_are_masked(model: Checkpoint) -> bool:
    """Whether all masked weights are +0.0, bit by bit, and nearly no other weight is."""
    assert model.masks
    for name, mask in model.masks.items():
        weight = model.model.get_parameter(name).detach()
        if weight[~mask].view(torch.int32).any() or (weight[mask] == 0).any():
            return False
    return True


# --- the defaults --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", CHAIN)
def test_defaults_chain(chain: Any, script: str) -> None:
    folder, runs, made = chain
    run = runs[script]
    assert run.code == 0, run.err
    assert made[script] == sorted(CHAIN[script])
    report = json.loads(run.out)  # refuses anything beside one value
    assert run.out == json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    assert isinstance(report, dict)
    assert report["seconds"] > 0
    assert "Warning" not in run.err
    if CHAIN[script]:
        assert report["wrote"] == CHAIN[script][0]
    if script in TRAININGS:
        assert (folder / report["stats"]).read_text().splitlines()[0] == HEADER
        if script == BLOCK:
            assert (report["solver"], report["calibration"]) == ("hybrid", "calibration.npy")
            tokens = min(report["calibration_tokens"].values())
            assert report["tokens_per_input"] == pytest.approx(tokens / 48, abs=0.01)
            # the table: 6 attentions at 3 pairs of rates
            assert run.err.count("head_gram+l1") == 18
        else:
            assert "epoch 1: trained" in run.err
            assert report["epochs"] >= 1


def test_nothing_else_is_left(chain: Any) -> None:
    folder, _, _ = chain
    expected = [name for names in CHAIN.values() for name in names]
    corpus = [
        f"corpus/{split}.{side}" for split in ("train", "val", "test") for side in ("en", "de")
    ]
    assert files_in(folder) == sorted([*expected, *corpus, "model/dense.pth"])


def test_quiet_scripts_say_nothing(tmp_path: Path, workshop: Workshop) -> None:
    args = ["-m", workshop.model, "-p", workshop.modules, "-c", workshop.conf, "--epochs", 1]
    run = call("model_level_finetuning.py", "-q", *args, cwd=tmp_path)
    assert (run.code, run.err) == (0, "")


def test_configuration_0_is_composed_physically(chain: Any) -> None:
    """Default rates 0.25 and 0.3: 3 of 4 heads of 8 stay; floor(n * 0.3 + 0.5) weights go."""
    folder, runs, _ = chain
    composed = checkpoint.load(folder / "model/composed.pth")
    attentions = [m for m in composed.family.modules(tiny.t5()) if m.kind == "attention"]
    assert len(attentions) == 6
    for module in attentions:
        part = composed.model.get_submodule(module.name)
        shapes = [tuple(getattr(part, name).weight.shape) for name in "qkvo"]
        assert shapes == [(24, 32)] * 3 + [(32, 24)]
    counts = {name.rsplit(".", 2)[1]: int((~mask).sum()) for name, mask in composed.masks.items()}
    assert counts == {"o": 230, "wi": 461, "wo": 461}  # of 32 * 24 and 48 * 32
    assert len(composed.masks) == 6 + 2 * 4
    report = runs["compose_model.py"].report
    dense = sum(p.numel() for p in tiny.t5().parameters())
    assert report["parameters"] == dense - 6 * 4 * 8 * 32
    assert report["nonzero_parameters"] == report["parameters"] - 6 * 230 - 8 * 461


@pytest.mark.parametrize("name", ["composed", "baseline", "finetuned"])
def test_masked_weights_are_exactly_zero(chain: Any, name: str) -> None:
    model = checkpoint.load(chain[0] / f"model/{name}.pth")
    assert zeros_are_masked(model)
    composed = checkpoint.load(chain[0] / "model/composed.pth")
    assert model.structure == composed.structure
    assert all(torch.equal(mask, model.masks[n]) for n, mask in composed.masks.items())
    if name != "composed":
        moved = [
            not torch.equal(model.model.get_parameter(n), composed.model.get_parameter(n))
            for n in composed.masks
        ]
        assert all(moved)


def test_module_level_finetuning_helps(chain: Any) -> None:
    folder, runs, _ = chain
    report = runs["block_level_finetuning.py"].report
    assert report["mean_error_after"] < 0.97 * report["mean_error_before"]
    with open(folder / "stats_block_variants.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == report["variants"] == runs["prune.py"].report["variants"] == 34
    before, after = ([float(row[f"error_{when}"]) for row in rows] for when in ("before", "after"))
    assert sum(before) / 34 == pytest.approx(report["mean_error_before"], rel=1e-9)
    assert sum(after) / 34 == pytest.approx(report["mean_error_after"], rel=1e-9)
    assert all(a <= b for a, b in zip(after, before, strict=True))
    # what was pruned stays pruned, and the entries that are answered stay the same
    first, second = (bundle.open_bundle(folder / f"modules{end}.npy") for end in ("", "_finetuned"))
    for old, new in zip(first.load_all(), second.load_all(), strict=True):
        assert (old.module, old.entry, old.plain) == (new.module, new.entry, new.plain)
        assert old.kept_units == new.kept_units
        assert all(torch.equal(new.masks[name], mask) for name, mask in old.masks.items())
        assert all(not new.tensors[name][~mask].any() for name, mask in new.masks.items())


def test_written_variants_have_the_error_that_was_reported(chain: Any, tmp_path: Path) -> None:
    """Least squares said so; measured by the gradient form, which starts from its bundle."""
    folder, runs, _ = chain
    args = ("-m", folder / "model/dense.pth", "-p", folder / "modules_finetuned.npy")
    args += ("--solver", "grad", "--epochs", 1, "--dtype", "float32")
    again = call(BLOCK, *args, cwd=tmp_path).report
    reported = runs["block_level_finetuning.py"].report["mean_error_after"]
    assert again["mean_error_before"] == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize("script", ["baseline_finetuning.py", "block_level_finetuning.py"])
def test_masked_weights_are_zero_after_every_step(
    script: str, tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def look(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        parameters = dict(more["model"].named_parameters())
        assert self.masks
        seen.extend(
            not parameters[name].detach()[~mask].view(torch.int32).any()
            for name, mask in self.masks.items()
        )

    monkeypatch.setattr(callbacks.Masks, "on_step_end", look)
    model = workshop.composed if script.startswith("baseline") else workshop.model
    args = ["-m", model, "--epochs", 2, "--batch-size", 16]
    args += [] if script != BLOCK else ["-p", workshop.modules, "--solver", "grad"]
    assert call(script, *args, cwd=tmp_path).code == 0
    masks = len(checkpoint.load(workshop.composed).masks) if script.startswith("baseline") else 34
    assert len(seen) == 2 * 4 * masks  # 2 epochs of 60 / 16 steps
    assert all(seen)


def test_module_level_finetuning_brings_a_model_nearer_to_the_dense_one(
    chain: Any, tmp_path: Path
) -> None:
    """In logits: with random weights, a model that is nearer may well have the higher loss."""
    folder, runs, _ = chain
    args = ("-m", folder / "model/dense.pth", "-c", folder / "conf.json")
    call("compose_model.py", *args, "-p", folder / "modules_finetuned.npy", "-o", "tuned.pth",
         cwd=tmp_path)  # fmt: skip
    lines = [(folder / f"corpus/val.{side}").read_text().splitlines() for side in ("en", "de")]
    source, target = (
        tiny.tokenizer()(side, padding=True, return_tensors="pt")["input_ids"] for side in lines
    )
    paths = [folder / "model/dense.pth", tmp_path / "tuned.pth", folder / "model/composed.pth"]
    with torch.no_grad():
        dense, tuned, pruned = (
            checkpoint.load(path).model(input_ids=source, labels=target).logits for path in paths
        )
    assert (tuned - dense).square().mean() < (pruned - dense).square().mean()
    report = runs["model_level_finetuning.py"].report
    assert report["validation_loss"] < report["validation_loss_start"]


def test_evaluate_measures_what_the_chain_ended_with(chain: Any) -> None:
    folder, runs, _ = chain
    report = runs["evaluate.py"].report
    assert report["model"] == "model/finetuned.pth"
    assert (
        report["nonzero_parameters"]
        == runs["model_level_finetuning.py"].report["nonzero_parameters"]
    )
    assert report["data"]["name"] == "corpus"
    assert (report["sentences"], report["data"]["split"]) == (15, "test")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("model", ["model", "composed"])
def test_baseline_takes_dense_and_composed_models(
    tmp_path: Path, workshop: Workshop, model: str
) -> None:
    path = getattr(workshop, model)
    run = call("baseline_finetuning.py", "-m", path, "--epochs", 1, cwd=tmp_path)
    tuned, start = checkpoint.load(tmp_path / run.report["wrote"]), checkpoint.load(path)
    assert tuned.is_dense == (model == "model")
    assert (tuned.fingerprint == start.fingerprint) == (model == "composed")
    found = checkpoint.fingerprint_of(tuned.config, tuned.model.state_dict())
    assert (tuned.fingerprint == found) == tuned.is_dense


# --- as users call them --------------------------------------------------------------------------

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(tmp_path: Path, script: str) -> None:
    """What it says is compared with docs/commands.md by test_docs.py."""
    run = call(script, "-h", cwd=tmp_path)
    assert (run.code, run.err) == (0, "")
    assert run.out == call(script, "--help", cwd=tmp_path).out
    assert run.out.startswith("Usage: ")
    assert files_in(tmp_path) == []


def run_executable(script: str, *args: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ./script, with this Python the first one on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(ROOT / script), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_scripts_are_executable(tmp_path: Path) -> None:
    run = run_executable("prune.py", "-h", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert "Usage: prune.py" in run.stdout
    for script in SCRIPTS:
        assert os.access(ROOT / script, os.X_OK), script
        assert (ROOT / script).read_text().startswith("#!/usr/bin/env python3\n"), script


def test_stdout_and_stderr_of_a_process(tmp_path: Path, workshop: Workshop) -> None:
    """The report is alone on stdout even if a library prints; -q leaves stderr empty."""
    args = ["-m", workshop.model, "-p", workshop.modules, "--epochs", 2, "--device", "cpu"]
    quiet = run_executable("block_level_finetuning.py", "-q", *args, cwd=tmp_path)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert json.loads(quiet.stdout)["wrote"] == "modules_finetuned.npy"
    # the bytes that this process made
    assert (tmp_path / "modules_finetuned.npy").read_bytes() == workshop.finetuned.read_bytes()


# --- the same command twice ----------------------------------------------------------------------

TWICE = [
    ("config_generator.py", ["-m", "{model}"]),
    ("prune_scheme_generator.py", ["-i", "{conf}"]),
    ("prune.py", ["-m", "{model}", "-c", "{scheme}", "-p", "test.pth"]),
    ("compose_model.py", ["-m", "{model}", "-p", "{modules}", "-c", "{conf}", "-n", "1"]),
    ("baseline_finetuning.py", ["-m", "{composed}", "--epochs", "2"]),
    (BLOCK, ["-m", "{model}", "-p", "{modules}"]),
    (BLOCK, ["-m", "{model}", "-p", "{modules}", "--solver", "grad", "--epochs", "2"]),
    (
        "model_level_finetuning.py",
        ["-m", "{model}", "-p", "{finetuned}", "-c", "{conf}", "-n", "2", "--epochs", "2"],
    ),
    ("evaluate.py", ["-m", "{composed}", "--predictions", "out.de"]),
    ("plot_loss.py", ["{stats}"]),
]


@pytest.mark.parametrize(("script", "args"), TWICE)
def test_same_command_twice_gives_the_same_bytes(
    tmp_path: Path, workshop: Workshop, script: str, args: list[str]
) -> None:
    """In two folders, so that no path and no older output goes into a file."""
    contents = []
    for name in ("a", "b/c"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        run = call(script, *(arg.format(**vars(workshop)) for arg in args), cwd=folder)
        assert run.report["seconds"] > 0
        contents.append({path: content_of(folder / path) for path in files_in(folder)})
    assert contents[0]
    assert contents[0] == contents[1]


def content_of(path: Path) -> Any:
    """Bytes of a file; a stats CSV and the table of variants without their timing columns."""
    if path.suffix != ".csv":
        return path.read_bytes()
    times = slice(7, 8) if path.stem.endswith("_variants") else slice(3, 5)
    rows = list(csv.reader(path.read_text().splitlines()))
    for row in rows:
        del row[times]
    return rows


def test_seed_changes_a_training(tmp_path: Path, workshop: Workshop) -> None:
    """Dropout and order follow --seed: else equal bytes would prove nothing."""
    losses = []
    for seed in (1, 2, 1):
        args = ("-m", workshop.composed, "--epochs", 1, "--batch-size", 16, "--seed", seed)
        losses.append(call("baseline_finetuning.py", *args, cwd=tmp_path).report["validation_loss"])
    assert losses[0] == losses[2] != losses[1]


# --- what meets in one model ---------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, workshop: Workshop) -> "Bench":
    return Bench(tmp_path, workshop.model)


def has_heads(scheme: dict[str, list[Any]]) -> bool:
    """Whether an attention has a rate below 1 that names no method."""
    entries = [one if isinstance(one, dict) else {"rate": one} for one in scheme.get(ATTENTION, [])]
    return any("method" not in one and one["rate"] < 1 for one in entries)


class Bench:
    """A working folder for configurations written by hand."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model

    def prune(self, scheme: dict[str, list[Any]], output: str, *more: Any) -> dict[str, Any]:
        (self.folder / "conf_prune.json").write_text(json.dumps(scheme))
        heads = ("--attention", "head_l1") if has_heads(scheme) else ()
        args = ("-m", self.model, "-o", output, *heads, *more)
        return call("prune.py", *args, cwd=self.folder).report

    def compose(
        self,
        configuration: dict[str, Any],
        *bundles: str,
        script: str = "compose_model.py",
        more: tuple[Any, ...] = (),
    ) -> Ended:
        (self.folder / "conf.json").write_text(json.dumps([configuration]))
        given = [part for name in bundles for part in ("-p", name)]
        return call(script, "-q", "-m", self.model, *given, *more, cwd=self.folder)

    def refused(self, configuration: dict[str, Any], *bundles: str, **how: Any) -> str:
        """Compose, and return the one line that says why not."""
        before = files_in(self.folder)
        run = self.compose(configuration, *bundles, **how)
        assert (run.code, run.out) == (1, "")
        assert run.err.count("\n") == 1
        assert sorted({*files_in(self.folder), "conf.json"}) == sorted({*before, "conf.json"})
        return run.err


def test_bundles_of_two_methods_meet_in_one_model(bench: Bench) -> None:
    bench.prune({ATTENTION: [0.5]}, "heads.npy")
    bench.prune({WI: [0.4], f"{ATTENTION}.o": [0.4]}, "weights.npy", "--linear", "l1")
    assert (
        bench.compose({ATTENTION: 0.5, WI: 0.4}, "heads.npy", "weights.npy").report["variants"] == 2
    )
    composed = checkpoint.load(bench.folder / "model/composed.pth")
    attention = composed.model.get_submodule(ATTENTION)
    assert tuple(attention.q.weight.shape) == (16, 32)
    assert [len(edit.units) for edit in composed.structure] == [2]
    assert {name: int((~mask).sum()) for name, mask in composed.masks.items()} == {
        f"{WI}.weight": 614  # floor(48 * 32 * 0.4 + 0.5)
    }
    first = (bench.folder / "model/composed.pth").read_bytes()
    # both after one -p; and the history names the bundles in the order given
    assert (
        bench.compose({ATTENTION: 0.5, WI: 0.4}, "heads.npy", more=("-p", "weights.npy")).code == 0
    )
    assert (bench.folder / "model/composed.pth").read_bytes() == first
    assert composed.info["history"][-1]["composed"]["bundles"] == ["heads.npy", "weights.npy"]
    error = bench.refused({ATTENTION: 0.5, WI: 0.4}, "heads.npy")
    assert f'heads.npy: no variant of "{WI}" at rate 0.4 (has none)' in error
    # two variants of their own do not answer an attention that is pruned with its o
    error = bench.refused({ATTENTION: 0.5, f"{ATTENTION}.o": 0.4}, "heads.npy", "weights.npy")
    assert f'no variant of "{ATTENTION}" at rate 0.5 with o at rate 0.4' in error


def test_finetuning_scripts_take_several_bundles(bench: Bench) -> None:
    bench.prune({ATTENTION: [0.5]}, "heads.npy")
    bench.prune({WI: [0.4]}, "weights.npy")
    names = ("heads.npy", "weights.npy")
    more = ("--epochs", 1)
    tuned = bench.compose({}, *names, script="block_level_finetuning.py", more=more)
    assert tuned.report["variants"] == 2
    found = bundle.open_bundle(bench.folder / "modules_finetuned.npy").records
    assert [record.module for record in found] == [ATTENTION, WI]
    script = "model_level_finetuning.py"
    run = bench.compose({ATTENTION: 0.5, WI: 0.4}, *names, script=script, more=more)
    model = checkpoint.load(bench.folder / run.report["wrote"])
    assert zeros_are_masked(model)
    assert tuple(model.model.get_submodule(ATTENTION).q.weight.shape) == (16, 32)


def test_equal_variants_of_two_bundles_are_one(bench: Bench) -> None:
    bench.prune({WI: [0.4]}, "a.npy")
    bench.prune({WI: [0.4, 0.2]}, "b.npy")
    assert bench.compose({WI: 0.4}, "a.npy", "b.npy").code == 0
    script, more = "block_level_finetuning.py", ("--epochs", 1)
    run = bench.compose({}, "a.npy", "b.npy", script=script, more=more)
    assert run.report["variants"] == 2


@pytest.mark.parametrize(
    "script", ["compose_model.py", "model_level_finetuning.py", "block_level_finetuning.py"]
)
def test_two_different_variants_for_one_entry_are_refused(bench: Bench, script: str) -> None:
    bench.prune({WI: [0.4]}, "raw.npy")
    tuning = ("--epochs", 1, "-o", "tuned.npy")
    made = bench.compose({}, "raw.npy", script="block_level_finetuning.py", more=tuning)
    assert made.code == 0, made.err
    error = bench.refused({WI: 0.4}, "raw.npy", "tuned.npy", script=script)
    assert f'"{WI}"' in error
    assert "rate 0.4" in error
    assert "raw.npy" in error
    assert "tuned.npy" in error


def test_explicit_and_plain_entries(bench: Bench) -> None:
    """A plain variant answers an entry that names its method; the reverse does not hold."""
    explicit = {"rate": 0.5, "method": "head_l1"}
    bench.prune({ATTENTION: [0.5]}, "plain.npy")
    bench.prune({ATTENTION: [explicit]}, "explicit.npy")
    assert bench.compose({ATTENTION: 0.5}, "plain.npy").code == 0
    plain = checkpoint.load(bench.folder / "model/composed.pth")
    for name in ("plain.npy", "explicit.npy"):
        assert bench.compose({ATTENTION: explicit}, name).code == 0
        found = checkpoint.load(bench.folder / "model/composed.pth")
        assert found.structure == plain.structure
    error = bench.refused({ATTENTION: 0.5}, "explicit.npy")
    assert f'explicit.npy: no variant of "{ATTENTION}" at rate 0.5 (has 0.5 (head_l1))' in error
    # one variant that was made for both answers both
    assert bench.prune({ATTENTION: [0.5, explicit]}, "both.npy")["variants"] == 1
    for entry in (0.5, explicit):
        assert bench.compose({ATTENTION: entry}, "both.npy").code == 0


def test_an_explicit_entry_through_the_whole_chain(bench: Bench) -> None:
    configurations = [
        {ATTENTION: {"rate": 0.5, "method": "head_l1"}, f"{ATTENTION}.o": 0.3},
        {ATTENTION: 0.5, f"{ATTENTION}.o": 0.3},
    ]
    (bench.folder / "conf.json").write_text(json.dumps(configurations))
    assert call("prune_scheme_generator.py", cwd=bench.folder).report["variants_needed"] == 2
    scheme = json.loads((bench.folder / "conf_prune.json").read_text())
    assert scheme == {
        ATTENTION: [
            {"rate": 0.5, "method": "head_l1", "parts": {"o": 0.3}},
            {"rate": 0.5, "parts": {"o": 0.3}},
        ]
    }
    assert bench.prune(scheme, "modules.npy")["variants"] == 1
    (bench.folder / "conf.json").write_text(json.dumps(configurations))
    for index in (0, 1):
        run = call("compose_model.py", "-m", bench.model, "-n", index, cwd=bench.folder)
        assert run.report["configuration"] == index
    # made for the explicit entry alone: the heads answer no plain number, though o would
    bench.prune({ATTENTION: scheme[ATTENTION][:1]}, "explicit.npy")
    assert bench.compose(configurations[0], "explicit.npy").code == 0
    error = bench.refused(configurations[1], "explicit.npy")
    assert "at rate 0.5 with o at rate 0.3 (has 0.5 (head_l1) with o at rate 0.3 (l1))" in error


@pytest.mark.parametrize("script", ["compose_model.py", "model_level_finetuning.py"])
def test_a_pair_missing_from_a_hand_edited_scheme_is_named(
    tmp_path: Path, workshop: Workshop, script: str
) -> None:
    scheme = json.loads(workshop.scheme.read_text())
    assert scheme[ATTENTION] == [
        {"rate": heads, "parts": {"o": weights}}
        for heads, weights in ((0.25, 0.3), (0.5, 0.3), (0.25, 0.5))
    ]
    del scheme[ATTENTION][2], scheme[WI][1]
    (tmp_path / "conf_prune.json").write_text(json.dumps(scheme))
    shutil.copy(workshop.conf, tmp_path / "conf.json")
    made = call("prune.py", "-m", workshop.model, "--attention", "head_l1", cwd=tmp_path)
    assert made.report["variants"] == 32
    args = ("-q", "-m", workshop.model, "-p", "modules.npy", "-n")
    before = files_in(tmp_path)
    run = call(script, *args, 2, cwd=tmp_path)
    assert (run.code, run.out, run.err.count("\n")) == (1, "", 1)
    assert f'no variant of "{ATTENTION}" at rate 0.25 with o at rate 0.5' in run.err
    assert "change configuration 2" in run.err
    assert files_in(tmp_path) == before
    assert call("compose_model.py", *args, 0, cwd=tmp_path).code == 0


def test_only_needed_variants_have_to_be_sound(tmp_path: Path, workshop: Workshop) -> None:
    """A damaged variant of another configuration is never read."""
    reader = bundle.open_bundle(workshop.modules)
    record = next(r for r in reader.records if r.module == WI and r.entry.rate == 0.5)
    damaged = bytearray(workshop.modules.read_bytes())
    values = reader.load(record).tensors["weight"]
    needle = values[values != 0].numpy().tobytes()[:64]
    assert damaged.count(needle) == 1
    damaged[damaged.index(needle) + 9] ^= 1
    (tmp_path / "modules.npy").write_bytes(damaged)
    args = ("-q", "-m", workshop.model, "-c", workshop.conf, "-n")
    assert call("compose_model.py", *args, 0, cwd=tmp_path).code == 0
    run = call("compose_model.py", *args, 2, "-o", "two.pth", cwd=tmp_path)
    assert (run.code, run.err.count("\n")) == (1, 1)
    assert f'tensor "weight" of "{WI}" is damaged' in run.err
    assert not (tmp_path / "two.pth").exists()


# --- prune.py -p ---------------------------------------------------------------------------------


def test_test_model_has_the_first_variant_of_every_module(bench: Bench) -> None:
    scheme = {ATTENTION: [0.25, 0.5], WI: [0.5, 0.1], "decoder.block.1.layer.2.DenseReluDense": [1]}
    report = bench.prune(scheme, "modules.npy", "-p", "model/test.pth")
    assert (report["variants"], report["test_model"]) == (5, "model/test.pth")
    made = checkpoint.load(bench.folder / "model/test.pth")
    assert tuple(made.model.get_submodule(ATTENTION).q.weight.shape) == (24, 32)
    assert {name: int((~mask).sum()) for name, mask in made.masks.items()} == {f"{WI}.weight": 768}
    assert Edit("decoder.block.1.layer.2.DenseReluDense", "remove") in made.structure
    assert call("evaluate.py", "-q", "-m", "model/test.pth", cwd=bench.folder).code == 0


def test_rate_1_through_the_scripts(bench: Bench) -> None:
    """An attention, an ffn and a layer at rate 1 are gone; the model goes on working."""
    configuration = {
        ATTENTION: 1,
        "decoder.block.0.layer.2.DenseReluDense": 1,
        "encoder.block.1": 1,
    }
    bench.prune({name: [rate] for name, rate in configuration.items()}, "modules.npy")
    assert bench.compose(configuration, "modules.npy").code == 0
    composed = checkpoint.load(bench.folder / "model/composed.pth")
    assert composed.structure == tuple(Edit(name, "remove") for name in sorted(configuration))
    run = call("evaluate.py", "-q", "-m", "model/composed.pth", "--limit", 4, cwd=bench.folder)
    assert run.report["parameters"] < sum(p.numel() for p in tiny.t5().parameters())
    script, more = "block_level_finetuning.py", ("--epochs", 1)
    run = bench.compose(configuration, "modules.npy", script=script, more=more)
    assert run.report["mean_error_after"] is None
    script = "model_level_finetuning.py"
    assert bench.compose(configuration, "modules.npy", script=script, more=more).code == 0
