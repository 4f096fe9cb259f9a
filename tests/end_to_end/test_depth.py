"""The scripts of depth pruning: scores, pictures, configurations, composed models, folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from composable.calibration import collect
from composable.errors import MismatchError
from composable.formats import scores_file
from composable.formats.scores import BlockDistances, Scores
from composable.models import checkpoint, export
from composable.models.structure import Edit, removed_layers
from composable.ranking import base, layer_choice
from composable.ranking.layer_distance import LAYER_DISTANCE, LayerDistanceOptions
from tests import tiny, tiny_scores, tiny_tasks
from tests.end_to_end.conftest import Ended
from tests.end_to_end.conftest import call as call_in

LAYOUTS = ("t5", "bert", "distilbert", "opt", "gpt2", "llama_gqa", "vit")


def made_of(layout: str, folder: Path) -> tuple[Path, Path]:
    """A model file, and a folder with data of its task."""
    changes = {
        "t5": {"num_decoder_layers": 4}, "distilbert": {"n_layers": 4}
    }.get(layout, {"num_hidden_layers": 4})  # fmt: skip
    made = tiny.dense(layout, **changes)
    data = folder / "data"
    if layout == "t5":
        tiny.corpus(data)
    else:
        task = made.info["task"]
        tiny_tasks.data(task, data)
        if made.tokenizer is not None:
            made.tokenizer = tiny_tasks.tokenizer(task != "language_modeling")
    checkpoint.save(folder / "dense.pth", made)
    return folder / "dense.pth", data


def call(folder: Path, script: str, *args: Any) -> Ended:
    return call_in(script, *args, cwd=folder)


def ok(folder: Path, script: str, *args: Any) -> dict[str, Any]:
    ended = call(folder, script, *args)
    assert ended.code == 0, ended.err
    report: dict[str, Any] = json.loads(ended.out)
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_way(layout: str, tmp_path: Path) -> None:
    model, data = made_of(layout, tmp_path)
    stack = ["--stack", "decoder"] if layout == "t5" else []
    report = ok(
        tmp_path, "rank_importance.py", "-m", model, "--data", data,
        "--distance", "bi_score", "angular_token:0", "--iterative", 2, *stack,
    )  # fmt: skip
    names = {"t5": ["encoder", "decoder"]}.get(layout) or list(report["blocks"])
    assert list(report["blocks"]) == names
    assert set(report["blocks"][names[-1]]) == {"bi_score", "angular_token:0"}
    ok(tmp_path, "plot_importance.py")
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    choose = ("config_generator.py", "-m", model, "--scores", "scores.npz", *stack)
    ok(tmp_path, *choose, "--drop-layers", 1, 2, "--attention", 0.5, 0.25)
    ok(tmp_path, "prune_scheme_generator.py")
    ok(tmp_path, "prune.py", "-m", model, "--attention", "head_l1")
    scores = scores_file.load(tmp_path / "scores.npz").blocks(names[-1])
    first, _ = layer_choice.best_block(scores, 2)
    ok(tmp_path, "compose_model.py", "-m", model, "-n", 1, "-o", "composed.pth")
    composed = checkpoint.load(tmp_path / "composed.pth")
    removed = removed_layers(composed.structure, composed.family)
    assert [int(name.rpartition(".")[2]) for name in removed] == [first, first + 1]
    assert any(edit.action == "keep" for edit in composed.structure)
    if layout == "opt":
        ended = call(tmp_path, "export_model.py", "-m", "composed.pth", "-o", "folder")
        assert ended.code == 1
        assert "transformers builds OPT models with 4 heads in every attention" in ended.err
    ok(tmp_path, "export_model.py", "-m", "composed.pth", "-o", "padded", "--pad")
    again = type(composed.model).from_pretrained(tmp_path / "padded").eval()
    batch = tiny.inputs(composed)
    with torch.no_grad():
        expected = composed.model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-6, atol=1e-5)
    ok(tmp_path, *choose, "--drop-layers", 2, "--policy", "iterative")
    ok(tmp_path, "prune_scheme_generator.py")
    ok(tmp_path, "prune.py", "-m", model)
    ok(tmp_path, "compose_model.py", "-m", model, "-o", "composed.pth")
    composed = checkpoint.load(tmp_path / "composed.pth")
    report = ok(tmp_path, "export_model.py", "-m", "composed.pth", "-o", "folder")
    assert report["removed_layers"] == removed_layers(composed.structure, composed.family)
    order = scores_file.load(tmp_path / "scores.npz").order_of_layers(names[-1])
    gone = sorted(int(name.rpartition(".")[2]) for name in order.modules)
    again = type(composed.model).from_pretrained(tmp_path / "folder").eval()
    assert again.config.depth_pruning[names[-1]]["removed"] == gone
    batch = tiny.inputs(composed)
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batch).logits, composed.model(**batch).logits, rtol=0, atol=1e-5
        )
    if layout != "vit":
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")("a red dog")
        assert ids["input_ids"] == composed.tokenizer("a red dog")["input_ids"]
    # and back: a folder is a model like any other
    ok(tmp_path, "download_model.py", "-m", tmp_path / "folder", "-o", "back.pth")
    back = checkpoint.load(tmp_path / "back.pth")
    with torch.no_grad():
        torch.testing.assert_close(
            back.model(**batch).logits, composed.model(**batch).logits, rtol=0, atol=1e-5
        )
    if layout == "vit":
        assert back.info["image_processor"]["image_mean"] == [0.5]


def test_linear_maps_and_healing(tmp_path: Path) -> None:
    model, data = made_of("llama_gqa", tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("the man sits in the house\nthe red dog runs . a cat sleeps\n" * 3)
    rank = ("rank_importance.py", "-m", model, "--data", texts)
    fit = ok(tmp_path, *rank, "--distance", "linear_fit")
    assert [row["block_size"] for row in fit["blocks"]["decoder"]["linear_fit"]] == [1, 2, 3]
    dense = checkpoint.load(model)
    set_ = collect.calibration_set(dense, str(texts), None)
    how = LayerDistanceOptions(distances=("linear_fit",), largest=2, batch_size=2)
    scores_file.save(tmp_path / "scores.npz", base.rank(LAYER_DISTANCE, dense, set_, how))
    choose = ("config_generator.py", "-m", model, "--scores", "scores.npz")
    ok(tmp_path, *choose, "--drop-layers", 2, "--linear-map")
    (configuration,) = json.loads((tmp_path / "conf.json").read_text())
    ((name, entry),) = [(n, e) for n, e in configuration.items() if e]
    assert entry["method"] == "linear_map"
    assert int(entry["through"].rpartition(".")[2]) == int(name.rpartition(".")[2]) + 1
    ok(tmp_path, "prune_scheme_generator.py")
    report = ok(tmp_path, "prune.py", "-m", model, "--data", data)
    assert report["variants"] == 1
    tuned = ("block_level_finetuning.py", "-m", model, "--data", data, "--solver")
    for solver in (["ls"], ["grad", "--epochs", 1]):  # a map is made by prune.py, passes through
        ok(tmp_path, *tuned, *solver)
        ok(tmp_path, "compose_model.py", "-m", model, "-p", "modules_finetuned.npy", "-o", "a.pth")
        ok(tmp_path, "compose_model.py", "-m", model, "-p", "modules.npy", "-o", "b.pth")
        a, b = (checkpoint.load(tmp_path / name).model.state_dict() for name in ("a.pth", "b.pth"))
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    heal = ("model_level_finetuning.py", "-m", model, "-p", "modules.npy", "--data", data)
    for what in (["neighbours"], ["lora", "--rank", 2]):
        report = ok(tmp_path, *heal, "--heal", *what, "--epochs", 1, "--lr", 0.01)
        assert 0 < report["learning_parameters"] < report["parameters"]
        assert report["heal"] == what[0]
    ended = call(tmp_path, *heal, "--rank", 2)
    assert (ended.code, "--rank has no effect with --heal full" in ended.err) == (2, True)
    made = checkpoint.load(tmp_path / "b.pth")
    made.structure = (Edit(name, "map"),)  # whether or not a map was better than deletion
    with pytest.raises(MismatchError, match="a linear map stands in its place"):
        export.write(made, tmp_path / "b.pth", tmp_path / "folder")


def test_a_test_model_of_blocks_that_overlap(tmp_path: Path) -> None:
    """As --drop-layers 1 2 --linear-map gives them, and layers that would empty the stack."""
    model, data = made_of("opt", tmp_path)
    for lists in (["0,1", "1", "1,2,3"], ["0,1", "2,3"], ["0,1,2", "3"]):
        for maps in ([], ["--linear-map"]):
            ok(tmp_path, "config_generator.py", "-m", model, "--layers", *lists, *maps)
            ok(tmp_path, "prune_scheme_generator.py")
            texts = ["--data", data] if maps else []
            ok(tmp_path, "prune.py", "-m", model, "-p", "test.pth", *texts)
            assert len(checkpoint.load(tmp_path / "test.pth").model.model.decoder.layers) >= 1


def test_a_second_export_counts_in_the_original(tmp_path: Path) -> None:
    model, _ = made_of("opt", tmp_path)
    for turn in range(2):
        ok(tmp_path, "config_generator.py", "-m", model, "--layers", "1")
        ok(tmp_path, "prune_scheme_generator.py")
        ok(tmp_path, "prune.py", "-m", model)
        ok(tmp_path, "compose_model.py", "-m", model, "-p", "modules.npy", "-o", "composed.pth")
        ok(tmp_path, "export_model.py", "-m", "composed.pth", "-o", f"folder{turn}")
        model = tmp_path / f"dense{turn}.pth"
        ok(tmp_path, "download_model.py", "-m", tmp_path / f"folder{turn}", "-o", model)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "folder1")
    assert config.depth_pruning == {"decoder": {"removed": [1, 2], "kept": [0, 3]}}
    ended = call(tmp_path, "rank_importance.py", "-m", "composed.pth")
    assert ended.code == 1
    assert "is a composed model, rank_importance.py needs the dense one" in ended.err


def test_texts_under_the_usual_key(tmp_path: Path) -> None:
    model, data = made_of("opt", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a dog"}\n{"text": "the man sits in the house"}\n')
    report = ok(tmp_path, "rank_importance.py", "-m", model, "--data", "a.jsonl")
    assert (report["samples"], report["tokens"]) == (2, {"decoder": 8})
    assert report["tokens_per_input"] == round(8 / 48, 2)
    first = ok(tmp_path, "rank_importance.py", "-m", model, "--data", data)
    shorter = collect.calibration_set(checkpoint.load(model), str(data), None, max_length=5)
    assert len(shorter) > first["samples"]


def test_explicit_lists_and_the_simple_heuristic(tmp_path: Path) -> None:
    model, _ = made_of("opt", tmp_path)
    choose = ("config_generator.py", "-m", model)
    layer = "model.decoder.layers."

    def gone(*args: Any) -> list[list[str]]:
        ok(tmp_path, *choose, *args)
        found = json.loads((tmp_path / "conf.json").read_text())
        return [[n.removeprefix(layer) for n, rate in one.items() if rate == 1] for one in found]

    assert gone("--layers", "0,2", "1") == [["0", "2"], ["1"]]
    assert gone("--drop-layers", 0, 2, "--policy", "deepest") == [[], ["1", "2"]]
    protected = gone("--drop-layers", 2, "--policy", "deepest", "--protect", "1,3")
    assert protected == [["0", "2"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--drop-layers", 1], "the policy block needs scores"),
        (
            ["--drop-layers", 1, 2, "--attention", 0.5],
            "--attention has 1 values and --drop-layers has 2",
        ),
        (["--layers", "1", "--drop-layers", 1], "both say which layers go"),
        (["--layers", "9"], "layer 9: expected one of the decoder's layers 0 to 3"),
        (["--layers", "x"], "'x' is no list of numbers from 0, such as 3,4,5"),
        (["--layers", "0,1,2,3"], "all 4 decoder layers are at rate 1"),
        (
            ["--drop-layers", 1, "--stack", "encoder"],
            "stack encoder: this model has only decoder",
        ),
        (["--drop-layers", 1, "--scores", "none.npz"], "none.npz: No such file"),
        (["--drop-layers", 1, "--scores", "other.npz"], "other.npz: measured on another model"),
        (
            ["--drop-layers", 1, "--scores", "short.npz"],
            "the scores are of 3 layers, the decoder has 4",
        ),
        (["--scores", "short.npz"], "--scores has no effect without --drop-layers"),
        (["--policy", "singles"], "--policy has no effect without --drop-layers"),
        (["--layers", "1", "--protect", "1"], "--protect has no effect without --drop-layers"),
        (["--linear-map", "--attention", 0.5], "--linear-map has no effect without --drop-layers"),
        (
            ["--drop-layers", 1, "--policy", "deepest", "--scores", "short.npz"],
            "--scores has no effect with --policy deepest",
        ),
        (
            ["--drop-layers", 1, "--policy", "deepest", "--protect", 7],
            "protected layer 7: expected 0 to 3",
        ),
    ],
)
def test_bad_choices(tmp_path: Path, args: list[Any], message: str) -> None:
    model, _ = made_of("opt", tmp_path)
    values = np.zeros((3, 3))
    some = [BlockDistances("decoder", "x", np.where(np.tri(3)[::-1] > 0, values, np.nan), 1)]
    origin = tiny_scores.origin(3, stack="decoder")
    scores_file.save(tmp_path / "other.npz", Scores(origin, distances=some))
    np.savez(tmp_path / "short.npz", arr_0=values)
    ended = call(tmp_path, "config_generator.py", "-m", model, *args)
    of_options = ("has no effect", "both say", "values and", "is no list")
    assert ended.code == (2 if any(words in message for words in of_options) else 1)
    assert message in ended.err.splitlines()[-1]
    lines = ended.err.count("\n")
    assert lines == 1 + ended.err.count("short.npz: is of another program and does not say of whic")
    assert not (tmp_path / "conf.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--distance", "near"], 'unknown distance "near"; known are angular_all'),
        (["--data", "none"], "data none: no such file or folder"),
        (["--data", "empty.txt"], "empty.txt: no text in it"),
        (["--data", "b.jsonl"], 'no text under the key "text"'),
        (["--data", "a.json"], "a.json: .json is not read here; give a text a line"),
        (
            ["--data", "data", "--protect", 1],
            "--protect has no effect without --iterative",
        ),
        (
            ["--data", "data", "--iterative", 1, "--protect", 9],
            "protected layer 9: expected 0 to 3",
        ),
        (
            ["--data", "data", "--iterative", 1, "--stack", "encoder"],
            "stack encoder: only the decoder is measured here",
        ),
        (
            ["--data", "data", "--iterative", 4],
            "iterative is 4, by angular_all: expected 1",
        ),
        (
            ["--data", "data", "--distance", "angular_token:99"],
            "no sample of the calibration",
        ),
    ],
)
def test_bad_rankings(tmp_path: Path, args: list[Any], message: str) -> None:
    model, _ = made_of("opt", tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "b.jsonl").write_text('{"b": "a"}\n')
    (tmp_path / "a.json").write_text("[]")
    ended = call(tmp_path, "rank_importance.py", "-m", model, *args)
    assert ended.code == (2 if "has no effect" in message else 1)
    assert message in ended.err.splitlines()[-1]
    assert not (tmp_path / "scores.npz").exists()


def test_bad_pictures(tmp_path: Path) -> None:
    ended = call(tmp_path, "plot_importance.py")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    some = [BlockDistances("encoder", "x", np.array([[0.1, 0.2], [0.3, np.nan]]), 1)]
    scores_file.save(tmp_path / "a.npz", Scores(tiny_scores.origin(2), distances=some))
    for args, message in (
        (["-o", "a.pdf"], "pictures are PNG files; end the name in .png"),
        (["--distance", "y"], 'no scores by "y"; the file has x'),
    ):
        ended = call(tmp_path, "plot_importance.py", "a.npz", *args)
        assert (ended.code, ended.err.count("\n")) == (1 + ("-o" in args), 1)
        assert message in ended.err


def test_plain_texts_measure_the_encoder_alone(tmp_path: Path) -> None:
    model, _ = made_of("t5", tmp_path)
    (tmp_path / "a.txt").write_text("a dog runs .\nthe man sits\n")
    ended = call(tmp_path, "rank_importance.py", "-m", model, "--data", "a.txt")
    assert ended.code == 0, ended.err
    assert "plain texts have no targets: the decoder is not measured" in ended.err
    assert list(json.loads(ended.out)["blocks"]) == ["encoder"]
