"""The Python interface: what it makes is what the commands write for the same choices."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import composable
from composable.errors import UserError
from composable.formats import bundle, scores_file
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint, fingerprint_of
from tests import tiny, tiny_tasks
from tests.end_to_end.conftest import call
from tests.paths import ROOT

PAGE = ROOT / "docs" / "python.md"


def save(made: Checkpoint, data: Path, path: Path) -> None:
    """Write a model that names its data, so that nothing else has to."""
    made.info["data"] = str(data)
    checkpoint.save(path, made)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    save(tiny.checkpoint(), tiny.corpus(folder / "corpus"), folder / "dense.pth")
    return folder / "dense.pth"


@pytest.fixture(scope="module")
def dense(model: Path) -> Checkpoint:
    return composable.load(model)


def logits(made: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = made.model(**tiny.inputs(made)).logits
    return found


def ok(folder: Path, script: str, *args: Any) -> dict[str, Any]:
    ended = call(script, *args, cwd=folder)
    assert ended.code == 0, ended.err
    report: dict[str, Any] = json.loads(ended.out)
    return report


def test_import_leaves_torch_alone() -> None:
    code = (
        "import sys, composable\n"
        "assert {'load', 'prune', 'fit', 'compose', 'fine_tune', 'evaluate', 'depth'}"
        " <= {*composable.__all__} <= {*dir(composable)}\n"
        "assert not hasattr(composable, 'other')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_name_is_there() -> None:
    for name in composable.__all__:
        assert getattr(composable, name).__doc__


def test_the_whole_way_is_that_of_the_commands(
    model: Path, dense: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = fingerprint_of(dense.config, dense.model.state_dict())
    wanted = composable.configuration(dense, attention=0.5, ffn=0.5, linear=0.25)
    variants = composable.prune(dense, wanted)
    fitted = composable.fit(dense, variants, epochs=1)
    composed = composable.compose(dense, fitted, wanted)
    tuned = composable.fine_tune(composed, epochs=1)
    measured = composable.evaluate(tuned)
    assert list(empty.iterdir()) == []
    assert fingerprint_of(dense.config, dense.model.state_dict()) == before
    assert dense.info["history"] == []

    run = ("config_generator.py", "-m", model, "--attention", 0.5, "--ffn", 0.5, "--linear", 0.25)
    ok(tmp_path, *run)
    written = json.loads((tmp_path / "conf.json").read_text())[0]
    assert {name: rate for name, rate in written.items() if rate} == wanted
    ok(tmp_path, "prune_scheme_generator.py")
    ok(tmp_path, "prune.py", "-m", model)
    ok(tmp_path, "block_level_finetuning.py", "-m", model, "--epochs", 1)
    for name, ours in (("modules.npy", variants), ("modules_finetuned.npy", fitted)):
        theirs = bundle.open_bundle(tmp_path / name).records
        digests = {variant.module: variant.digest for variant in ours.variants}
        assert digests == {record.module: record.digest for record in theirs}
        stats = {variant.module: variant.stats for variant in ours.variants}
        assert stats == {record.module: record.stats for record in theirs}
    ok(tmp_path, "compose_model.py", "-m", model, "-p", "modules_finetuned.npy", "-o", "c.pth")
    torch.testing.assert_close(
        logits(composed), logits(checkpoint.load(tmp_path / "c.pth")), rtol=0, atol=0
    )
    ok(tmp_path, "model_level_finetuning.py", "-m", model, "--epochs", 1, "-o", "t.pth")
    theirs = checkpoint.load(tmp_path / "t.pth")
    torch.testing.assert_close(logits(tuned), logits(theirs), rtol=0, atol=0)
    assert not torch.equal(logits(tuned), logits(composed))
    report = ok(tmp_path, "evaluate.py", "-m", "t.pth")
    for key in ("bleu", "bleu_thesis", "loss", "parameters", "macs_per_token", "sparsity", "data"):
        assert measured.report[key] == report[key]
    assert measured.score.value == report["bleu"]["value"]
    assert len(measured.predictions) == report["sentences"]
    # files of either side are taken by the other
    again = composable.compose(dense, tmp_path / "modules_finetuned.npy", wanted)
    torch.testing.assert_close(logits(again), logits(composed), rtol=0, atol=0)
    bundle.write(tmp_path / "ours.npy", fitted)
    checkpoint.save(tmp_path / "ours.pth", tuned)
    ok(tmp_path, "compose_model.py", "-m", model, "-p", "ours.npy", "-o", "again.pth")
    assert (tmp_path / "again.pth").read_bytes() != b""
    assert composable.load(tmp_path / "ours.pth").structure == theirs.structure


def test_methods_are_per_kind(model: Path, dense: Checkpoint, tmp_path: Path) -> None:
    """A method that prunes heads and neurons is asked for one of them only."""
    wanted = composable.configuration(dense, attention=0.5, ffn=0.5)
    made = composable.prune(dense, [wanted], attention="random", seed=3)
    used = {variant.kind: variant.entry.method for variant in made.variants}
    assert used == {"attention": "random", "ffn": "exchange"}
    other = composable.prune(dense, wanted, attention="random", ffn="random", seed=3)
    same = {variant.module: variant.digest for variant in other.variants}
    for variant in made.variants:
        assert (same[variant.module] == variant.digest) is (variant.kind == "attention")
    by_weights = composable.prune(dense, wanted, attention="head_l1", ffn="neuron_l1")
    composable.compose(dense, by_weights, wanted)
    composable.compose(dense, [made, other], {k: r for k, r in wanted.items() if "SelfA" in k})


def test_several_configurations_share_variants(dense: Checkpoint) -> None:
    half = composable.configuration(dense, attention=0.5)
    heads = [name for name, rate in half.items() if rate]
    other = half | {heads[0]: 0.25}
    made = composable.prune(dense, [half, other], attention="head_l1")
    assert len(made.variants) == len(half) + 1
    scheme = {heads[0]: [0.5, 0.25], **{name: [0.5] for name in heads[1:]}}
    again = composable.prune(dense, scheme, attention="head_l1")
    assert [v.digest for v in again.variants] == [v.digest for v in made.variants]
    sizes = [
        sum(p.numel() for p in composable.compose(dense, made, one).model.parameters())
        for one in (half, other)
    ]
    assert sizes[0] < sizes[1] < sum(p.numel() for p in dense.model.parameters())


def test_sizes_are_those_of_the_command(model: Path, dense: Checkpoint, tmp_path: Path) -> None:
    ok(tmp_path, "rank_importance.py", "-m", model, "--method", "stat")
    ok(tmp_path, "rank_importance.py", "-m", model, "--method", "l1", "-o", "l1.npz")
    scores, l1 = composable.rank(dense, "stat"), composable.rank(dense, "l1")
    theirs = scores_file.load(tmp_path / "scores.npz")
    assert scores.origin == theirs.origin
    for name, one in theirs.units.items():
        np.testing.assert_array_equal(scores.importance(name), one.importance)
    for given, options in (
        ({}, ()),
        ({"scores": scores}, ("--scores", "scores.npz")),
        ({"scores": tmp_path / "scores.npz", "metric": "parameters"},
         ("--scores", "scores.npz", "--metric", "parameters")),
        ({"scores": l1, "allocation": "global"}, ("--scores", "l1.npz", "--allocate", "global")),
        ({"scores": scores, "grid": 4}, ("--scores", "scores.npz", "--grid", 4)),
    ):  # fmt: skip
        ok(tmp_path, "config_generator.py", "-m", model, "--sizes", 0.7, *options)
        written = json.loads((tmp_path / "conf.json").read_text())[0]
        found = composable.configuration(dense, size=0.7, **given)  # type: ignore[arg-type]
        assert found == {name: rate for name, rate in written.items() if rate}
    made = composable.prune(dense, found, attention="ranked", ffn="ranked", scores=scores)
    for variant in made.variants:
        importance = scores.importance(variant.module)
        gone = [i for i in range(len(importance)) if i not in set(variant.kept_units or ())]
        assert max(importance[gone]) < min(importance[variant.kept_units])


def test_layers_and_texts_from_python(tmp_path: Path) -> None:
    """A language model that knows no data: calibrated on texts, a layer removed by distance."""
    made = tiny_tasks.checkpoint("language_modeling")
    words = ("man", "dog", "cat", "house", "garden", "street")
    texts = [f"the {a} runs in the {b} ." for a in words for b in words]
    scores = composable.depth.analyse(made.model, texts, made.tokenizer)
    [layer] = composable.depth.best_cut(scores, 1)
    shorter = composable.configuration(made, layers=[layer], ffn=0.5)
    fitted = composable.fit(made, composable.prune(made, shorter, data=texts), data=texts)
    for variant in fitted.variants:
        if variant.learns:
            assert variant.stats["error_after"] <= variant.stats["error_before"]
    composed = composable.compose(made, fitted, shorter)
    assert composed.model.config.num_hidden_layers == made.model.config.num_hidden_layers - 1
    data = tiny_tasks.data("language_modeling", tmp_path / "data")
    assert composable.evaluate(composed, data=data, max_length=16).score.name == "perplexity"
    ranked = composable.rank(made, data=texts, distances=("bi_score",))
    assert ranked.blocks().distance == "bi_score"


def test_what_is_in_half_precision_stays_so() -> None:
    made = tiny_tasks.checkpoint("language_modeling")
    made.model.bfloat16()
    texts = [f"the {mood} man runs in the house ." for mood in ("good", "bad", "nice", "old")] * 5
    wanted = composable.configuration(made, ffn=0.5)
    composed = composable.compose(made, composable.prune(made, wanted, data=texts), wanted)
    assert made.model.dtype == composed.model.dtype == torch.bfloat16


def test_results_show_themselves(dense: Checkpoint) -> None:
    measured = composable.evaluate(dense, limit=4, split="valid")
    shown: Any = measured
    assert f"{measured.score.value:.2f}" in shown._repr_html_()
    assert re.search(rf"^BLEU +{measured.score.value:.2f}( ± [0-9.]+)?$", repr(measured), re.M)
    assert repr(dense).startswith("<Checkpoint tiny: dense, translation, ")
    distances: Any = composable.rank(dense)
    assert distances._repr_png_().startswith(b"\x89PNG")
    assert "angular_all" in repr(distances)
    units: Any = composable.rank(dense, "l1")
    assert units._repr_png_().startswith(b"\x89PNG")
    wanted = composable.configuration(dense, ffn=0.5)
    variants: Any = composable.prune(dense, wanted, ffn="neuron_l1")
    assert repr(variants) == f"<Bundle of {len(wanted)} variants of {len(wanted)} modules>"
    assert variants._repr_html_().count("neuron_l1") == len(wanted)


FFN = "encoder.block.0.layer.1.DenseReluDense"
ERRORS: list[tuple[Callable[[Checkpoint], Any], str]] = [
    (lambda d: composable.load("no/such.pth"), "no/such.pth: no such model file"),
    (lambda d: composable.load("embedded", dtype="int8"), "dtype int8: expected float32"),
    (lambda d: composable.configuration(d, attention=1.5), "attention: rate 1.5 is not a number"),
    (lambda d: composable.configuration(d, size=0.5, ffn=0.5), "size: chooses all rates"),
    (lambda d: composable.configuration(d, size=0.5, metric="bytes"), "metric bytes: unknown"),
    (lambda d: composable.configuration(d, gqa="per-group"), "gqa: has a meaning with size only"),
    (lambda d: composable.configuration(d, grid=4), "grid: has a meaning with size only"),
    (
        lambda d: composable.configuration(d, size=0.5, allocation="best"),
        "allocation best: unknown",
    ),
    (lambda d: composable.configuration(d, layers=[0]), "name one of them as the stack"),
    (
        lambda d: composable.configuration(d, layers=[2], stack="encoder"),
        "layer 2: expected one of the",
    ),
    (lambda d: composable.configuration(d, layers=[-1], stack="encoder"), "layer -1: expected"),
    (lambda d: composable.configuration(d, layers=[0], stack="middle"), "stack middle: this model"),
    (lambda d: composable.prune(d, {"nothing": 0.5}), 'configuration 0: no module "nothing"'),
    (lambda d: composable.prune(d, {FFN: object()}), "configuration 0"),
    (lambda d: composable.prune(d, {FFN: [0.5, 2]}), "scheme: "),
    (lambda d: composable.prune(d, {FFN: 0.5}, ffn="head_l1"), "ffn head_l1: it does not prune"),
    (lambda d: composable.prune(d, {FFN: 0.5}, ffn="x"), 'unknown method "x"'),
    (lambda d: composable.prune(d, {FFN: 0.5}, gqa="all"), "gqa all: expected"),
    (lambda d: composable.prune(d, {FFN: 0.5}, limit=0), "limit 0: expected"),
    (lambda d: composable.prune(d, {FFN: 0.5}, data=["a dog"]), "data: texts alone say too little"),
    (lambda d: composable.prune(d, {FFN: 0.5}, ffn="ranked"), "needs a file of scores"),
    (lambda d: composable.prune(d, {FFN: 0.5}, scores=composable.rank(d, "l1")), "scores: no mod"),
    (lambda d: composable.prune(d, {FFN: 0.5}, ffn="neuron_l1", limit=3), "limit: no method here"),
    (lambda d: composable.rank(d, "l1", limit=3), "l1 reads no data"),
    (lambda d: composable.rank(d, "l1", seed=3), "seed: l1 has no such option"),
    (lambda d: composable.rank(d, "x"), 'unknown way of measuring importance "x"'),
    (lambda d: composable.fit(d, bundle_of(d), solver="sgd"), "solver sgd: unknown"),
    (lambda d: composable.fit(d, bundle_of(d), solver="ls", lr=1.0), "lr: the solver ls"),
    (lambda d: composable.fit(d, bundle_of(d), solver="grad", ridge=1.0), "ridge: the solver grad"),
    (lambda d: composable.fit(d, bundle_of(d), solver="grad", data=["a"]), "data: the solver grad"),
    (lambda d: composable.fit(d, bundle_of(d), lr=-1.0), "lr -1.0: expected a number above 0"),
    (lambda d: composable.fit(d, bundle_of(d), epochs=0), "epochs 0: expected a number from 1"),
    (lambda d: composable.fit(tiny.checkpoint(1), bundle_of(d)), "made for another model"),
    (lambda d: composable.compose(d, bundle_of(d), {FFN: 0.25}), "the bundle: no variant of"),
    (lambda d: composable.prune(composed_of(d), {}), "dense: is a composed model; pruning needs"),
    (lambda d: composable.fine_tune(d, heal="all"), "heal all: unknown"),
    (lambda d: composable.fine_tune(d, data="nowhere"), "nowhere"),
    (lambda d: composable.evaluate(d, split="all"), "split all: expected train, valid or test"),
    (lambda d: composable.evaluate(d, max_length=0), "max_length 0: expected a number from 1"),
]


def bundle_of(dense: Checkpoint) -> bundle.Bundle:
    return composable.prune(dense, {FFN: 0.5}, ffn="neuron_l1")


def composed_of(dense: Checkpoint) -> Checkpoint:
    return composable.compose(dense, bundle_of(dense), {FFN: 0.5})


@pytest.mark.parametrize(("call_it", "said"), ERRORS, ids=[said for _, said in ERRORS])
def test_errors_are_one_clear_line(
    call_it: Callable[[Checkpoint], Any], said: str, dense: Checkpoint
) -> None:
    with pytest.raises(UserError) as caught:
        call_it(dense)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert not re.search(r"(?<![\w-])--[a-z]", message)


def test_arguments_that_a_model_file_or_a_task_does_not_have(model: Path) -> None:
    with pytest.raises(UserError, match=r"task: .* is a model file"):
        composable.load(model, task="translation")
    made = tiny_tasks.checkpoint("text_classification")
    for name in ("num_beams", "max_length"):
        with pytest.raises(UserError, match=f"{name} 3: has no meaning for text_classification"):
            composable.evaluate(made, **{name: 3})  # type: ignore[arg-type]


def blocks() -> str:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert found
    return "\n".join(found)


def test_the_page_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of docs/python.md, on a tiny model in the place of the embedded one."""
    monkeypatch.chdir(tmp_path)
    exec(blocks().replace('"embedded"', repr(str(model))), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.pth", "modules.npy"]


@pytest.mark.nightly
def test_the_page_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks(), {})


def test_the_notebook_was_run() -> None:
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [each for each in outputs if each["output_type"] == "error"]
    shown = {kind for each in outputs for kind in each.get("data", {})}
    assert {"text/html", "image/png"} <= shown
    for name in re.findall(r"composable\.(\w+)\(", json.dumps(code)):
        assert name in composable.__all__
