"""evaluate.py and report.py through their commands, on a tiny model and a tiny corpus."""

import contextlib
import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
import torch
from click.testing import CliRunner, Result

import evaluate
import report
from composable import __version__, tasks
from composable.models import checkpoint, cost
from composable.models.structure import Edit
from composable.models.surgery import apply_structure
from composable.tasks import translation_decode
from composable.tasks.translation_decode import is_plain, length_batches, translate
from tests import tiny
from tests.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with a prefix, and a corpus, in one folder."""
    place = tmp_path_factory.mktemp("evaluate")
    tiny.corpus(place / "data")
    model = tiny.checkpoint()
    model.info["prefix"] = "a cat : "
    checkpoint.save(place / "model.pth", model)
    return place


def run(command, *arguments: object) -> Result:
    return CliRunner().invoke(command, ["-q", *(str(argument) for argument in arguments)])


def evaluated(folder: Path, *arguments: object) -> dict:
    result = run(
        evaluate.main, "-m", folder / "model.pth", "--data", folder / "data",
        "--max-length", 12, *arguments,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_report_is_complete(folder: Path, tmp_path: Path) -> None:
    output, lines = tmp_path / "eval.json", tmp_path / "out.de"
    found = evaluated(folder, "-o", output, "--predictions", lines)
    model = checkpoint.load(folder / "model.pth").model
    references = (folder / "data/test.de").read_text(encoding="utf-8")
    translations = lines.read_text(encoding="utf-8").splitlines()
    assert len(translations) == found["sentences"] == found["data"]["count"] == 15
    assert found["bleu"]["value"] == pytest.approx(
        sacrebleu.corpus_bleu(translations, [references.splitlines()]).score, abs=1e-4
    )
    assert found["bleu"]["signature"].endswith(f"version:{sacrebleu.__version__}")
    assert found["bleu_thesis"]["signature"].startswith("torchtext.bleu_score|")
    assert found["parameters"] == cost.parameters(model)
    assert found["sparsity"] == 0
    assert found["macs_per_token"] == found["macs_per_token_nonzero"] > 0
    assert (found["source_length"], found["target_length"]) == (32, 32)
    assert found["file_bytes"] == (folder / "model.pth").stat().st_size
    assert found["data"]["split"] == "test"
    assert found["data"]["reference_sha256"] == hashlib.sha256(references.encode()).hexdigest()
    assert found["sentences_per_second"] > 0
    assert found["versions"]["composable"] == __version__
    assert set(found["versions"]) == {"composable", "torch", "transformers", "sacrebleu"}
    assert found["settings"]["num_beams"] == 1
    dtypes = {"cpu": "float32", "cuda": "bfloat16"}
    assert found["settings"]["dtype"] == dtypes[found["settings"]["device"]]
    written = json.loads(output.read_text(encoding="utf-8"))
    found.pop("seconds")
    assert written == found


def test_loss_is_the_token_cross_entropy(folder: Path) -> None:
    """Sentence by sentence without padding, summed over tokens: no batching, no collator."""
    loaded = checkpoint.load(folder / "model.pth")
    pairs = [
        (folder / f"data/val.{language}").read_text(encoding="utf-8").splitlines()
        for language in ("en", "de")
    ]
    total, tokens = 0.0, 0
    for source, target in zip(*pairs, strict=True):
        inputs = torch.tensor([loaded.tokenizer("a cat : " + source)["input_ids"]])
        labels = torch.tensor([loaded.tokenizer(target)["input_ids"]])
        with torch.no_grad():
            total += float(loaded.model(input_ids=inputs, labels=labels).loss) * labels.numel()
        tokens += labels.numel()
    found = evaluated(folder, "--split", "valid")
    assert found["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert found["data"]["split"] == "valid"


def test_limit_takes_the_first(folder: Path, tmp_path: Path) -> None:
    for name, limit in (("all", ()), ("few", ("--limit", 3))):
        evaluated(folder, "--predictions", tmp_path / name, *limit)
    whole, few = ((tmp_path / name).read_text().splitlines() for name in ("all", "few"))
    assert few == whole[:3]


def test_pruned_model_costs_less(folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load(folder / "model.pth")
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    weight = model.model.get_parameter(name)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[0] = False
    with torch.no_grad():
        weight[0] = 0
    model.masks[name] = mask
    checkpoint.save(tmp_path / "model.pth", model)
    (tmp_path / "data").symlink_to(folder / "data")
    found = evaluated(tmp_path, "--length", 8)
    zeros = weight.shape[1]
    assert found["parameters"] - found["nonzero_parameters"] == zeros
    assert found["sparsity"] == pytest.approx(zeros / found["parameters"], abs=1e-6)
    less = found["macs_per_token"] - found["macs_per_token_nonzero"]
    assert less == pytest.approx(zeros * 8 / 16, abs=0.02)


def sentences() -> list[str]:
    return [f"a {w} " * n + "runs ." for n, w in enumerate(("man", "dog", "cat", "child", "house"))]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_translations_depend_on_no_batch_and_keep_order(batch_tokens: int, beams: int) -> None:
    model = tiny.checkpoint(seed=3)
    together = translate(model.model, model.tokenizer, sentences(), beams, batch_tokens, 10)
    alone = [
        translate(model.model, model.tokenizer, [line], beams, 4096, 10)[0] for line in sentences()
    ]
    assert together == alone
    assert len(set(alone)) > 1  # an order could be wrong


def test_greedy_equals_a_loop_over_logits() -> None:
    model = tiny.checkpoint(seed=3)
    text = "the woman sleeps in the red house ."
    inputs = torch.tensor([model.tokenizer(text)["input_ids"]])
    tokens = [0]
    with torch.no_grad():
        while len(tokens) < 11 and tokens[-1] != 1:
            logits = model.model(input_ids=inputs, decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
    expected = " ".join(model.tokenizer.decode(tokens, skip_special_tokens=True).split())
    assert translate(model.model, model.tokenizer, [text], max_length=10) == [expected]


@pytest.mark.parametrize("kind", ["t5", "gated", "pruned"])
@pytest.mark.parametrize("batch_tokens", [30, 4096])
def test_greedy_equals_generate(
    kind: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentences that end early leave the batch; the others must not notice."""
    model = tiny.checkpoint(seed=3, gated=kind == "gated")
    if kind == "pruned":
        prune(model)
    lines = [f"a {' '.join(tiny.WORDS[5 * n : 6 * n + 3])} ." for n in range(8)] * 3
    torch.manual_seed(2)
    with torch.no_grad():  # so that the end token comes at times, early and late
        model.model.lm_head.weight[1] = torch.randn(32)
    met: list[int] = []
    hook = model.model.lm_head.register_forward_hook(lambda *call: met.append(len(call[2])))
    found = translate(model.model, model.tokenizer, lines, 1, batch_tokens, 12)
    hook.remove()
    if batch_tokens == 4096:
        assert met == sorted(met, reverse=True)
        assert len(set(met)) > 2, "no sentence left early"
    monkeypatch.setattr(translation_decode, "is_plain", lambda _: False)
    assert found == translate(model.model, model.tokenizer, lines, 1, batch_tokens, 12)
    assert len({len(line.split()) for line in found}) > 3


def test_a_model_with_settings_of_its_own_goes_through_generate() -> None:
    model = tiny.checkpoint(seed=3)
    plain = translate(model.model, model.tokenizer, sentences(), max_length=10)
    model.model.generation_config.no_repeat_ngram_size = 1
    found = translate(model.model, model.tokenizer, sentences(), max_length=10)
    assert found != plain
    for line in found:
        assert len(set(line.split())) == len(line.split()), "a word is repeated"


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"max_length": 20, "num_beams": 4}, True),
        ({"eos_token_id": [1, 2]}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"forced_bos_token_id": 3}, False),
        ({"decoder_start_token_id": None}, False),
    ],
)
def test_which_settings_are_plain(change: dict, plain: bool) -> None:
    model = tiny.t5()
    for name, value in change.items():
        setattr(model.generation_config, name, value)
    assert is_plain(model) == plain


@pytest.mark.parametrize("width", [64, 6000, 32128, 997])
def test_likeliest_token(width: int) -> None:
    torch.manual_seed(width)
    logits = torch.randn(50, 1, width)
    logits[0] = 1.0
    logits[1, 0, [5, width - 1]] = 9.0
    assert torch.equal(translation_decode._likeliest(logits), logits.argmax(-1))


def test_bfloat16_runs_and_leaves_the_weights(folder: Path) -> None:
    found = evaluated(folder, "--dtype", "bfloat16", "--limit", 4)
    assert found["settings"]["dtype"] == "bfloat16"
    model = tiny.checkpoint()
    translate(model.model, model.tokenizer, ["a dog ."], max_length=3, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}


def test_nothing_to_translate() -> None:
    model = tiny.checkpoint()
    assert translate(model.model, model.tokenizer, []) == []


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([3, 5, 4], 10, [[1, 2], [0]]),
        ([3, 5, 4], 4, [[1], [2], [0]]),
        ([2, 2, 2, 2], 4, [[0, 1], [2, 3]]),
        ([9], 1, [[0]]),
        ([], 10, []),
    ],
)
def test_length_batches(lengths: list[int], tokens: int, expected: list[list[int]]) -> None:
    assert list(length_batches(lengths, tokens)) == expected


def test_defaults_agree_with_the_library() -> None:
    defaults = {option.name: option.default for option in evaluate.main.params}
    assert defaults["batch_tokens"] == translation_decode.BATCH_TOKENS
    assert tasks.by_name("translation").answer_tokens == translation_decode.MAX_LENGTH
    assert cost.SOURCE_LENGTH == cost.TARGET_LENGTH == 32
    assert Path(defaults["model"]) == Path("model/finetuned.pth")


EVALUATE = [sys.executable, str(ROOT / "evaluate.py"), "-m", "model.pth", "--data", "data"]


def test_as_a_process_stdout_is_json_and_stderr_has_no_bars(folder: Path) -> None:
    result = subprocess.run(
        [*EVALUATE, "--limit", "4"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["sentences"] == 4
    assert result.stderr == "", "four sentences are no long work"


@pytest.mark.parametrize("is_quiet", [False, True])
def test_on_a_terminal_it_shows_bars_unless_quiet(folder: Path, is_quiet: bool) -> None:
    main, side = pty.openpty()
    command = [*EVALUATE, "--limit", "4", *(["-q"] if is_quiet else [])]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=side) as process:
        os.close(side)
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["sentences"] == 4
    shown = b""
    with contextlib.suppress(OSError):  # its other end is closed
        while part := os.read(main, 1 << 16):
            shown += part
    os.close(main)
    assert process.returncode == 0
    assert (shown == b"") if is_quiet else (b"4/4 sentences" in shown)


# ---- report.py


def evaluation(
    bleu: float,
    parameters: int = 1000,
    nonzero: int = 1000,
    macs: float = 500.0,
    rate: float = 50.0,
) -> dict:
    score = {"name": "BLEU", "value": bleu, "signature": "nrefs:1|version:9", "interval_95": 4.04}
    return {
        "bleu": score,
        "sentences_per_second": rate,
        "parameters": parameters,
        "nonzero_parameters": nonzero,
        "macs_per_token": macs,
        "source_length": 32,
        "target_length": 32,
        "data": {"name": "data", "split": "test", "count": 7, "sha256": "ab"},
        "settings": {"num_beams": 1, "max_length": 80, "dtype": "float32"},
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A pipeline's folder with two configurations, numbers 0 and 10 (not in order of the text)."""
    files = {"eval_dense": evaluation(36.0)}
    for index, nonzero in ((0, 700), (10, 400)):
        files[f"eval_pruned_{index}"] = evaluation(1.25)
        files[f"eval_block_{index}"] = evaluation(20.5)
        files[f"eval_model_{index}"] = evaluation(33.333, 800, nonzero, 250.0, 62.5)
    files["json/block"] = {"seconds": 61.04}
    files["json/model_0"] = {"seconds": 12.345}
    (tmp_path / "json").mkdir()
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "loss.png").write_bytes(b"png")
    return tmp_path


def test_report_table(out: Path) -> None:
    result = run(report.main, "-d", out)
    assert result.exit_code == 0, result.output
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.strip() == result.stderr.strip()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    costs = ["800", "30.0%", "250", "50.0%", "1.25"]
    assert cells[2] == ["dense", "36.00", "", "", "", "1,000", "0.0%", "500", "100.0%", "1.00", "-"]
    assert cells[3] == ["0", "", "1.25", "20.50", "33.33", *costs, "12.3"]
    assert cells[4] == ["10", "", "1.25", "20.50", "33.33", "800", "60.0%", *costs[2:], "-"]
    assert len(cells) == 5
    for note in (
        "nrefs:1|version:9",
        "7 sentences of data (test)",
        str(out / "loss.png"),
        str(out / "quality.png"),
        "61.0",
        "95 % lie within 4.0 of the dense model's BLEU",
        "relative to the dense model's 50, ",
    ):
        assert note in text
    assert "ontrol" not in text  # which was not run
    assert (out / "quality.png").stat().st_size > 1000
    found = json.loads(result.stdout)
    assert found["configurations"] == [0, 10]
    assert found["rows"][1]["bleu_block"] == 20.5
    assert found["rows"][2]["sparsity"] == pytest.approx(0.6)


def test_report_names_configurations_by_their_rates(out: Path) -> None:
    attention = "encoder.block.{}.layer.0.SelfAttention"
    rates = [{attention.format(i): rate for i in range(2)} for rate in (0.25, 0.5)]
    (out / "conf.json").write_text(json.dumps(rates))
    for stage in ("pruned", "block", "model"):
        (out / f"eval_{stage}_1.json").write_text(json.dumps(evaluation(12.0)))
    found = json.loads(run(report.main, "-d", out).stdout)
    names = [row["configuration"] for row in found["rows"]]
    assert names == ["dense", "0: heads 25 %", "1: heads 50 %"]
    assert found["configurations"] == [0, 1]


def test_report_of_a_control_says_what_it_is(out: Path) -> None:
    for index in (0, 10):
        (out / f"eval_baseline_{index}.json").write_text(json.dumps(evaluation(30.0)))
    result = run(report.main, "-d", out)
    assert "Control: as pruned, then fine-tuned as a whole." in result.stderr
    assert " 30.00 |" in result.stderr


@pytest.mark.parametrize(
    "change",
    [{"sentences_per_second": None}, {"settings": {"num_beams": 1, "max_length": 80}}],
    ids=["old report", "other dtype"],
)
def test_report_compares_no_speeds_that_were_not_measured_alike(out: Path, change: dict) -> None:
    one = evaluation(33.3, 800, 700, 250.0) | change
    (out / "eval_model_0.json").write_text(json.dumps(one))
    rows = json.loads(run(report.main, "-d", out).stdout)["rows"]
    assert [row["speed"] for row in rows] == [1.0, None, 1.25]


def test_report_without_an_interval_says_nothing_of_chance(out: Path) -> None:
    dense = evaluation(36.0)
    del dense["bleu"]["interval_95"]
    (out / "eval_dense.json").write_text(json.dumps(dense))
    assert "hance" not in run(report.main, "-d", out).stderr


@pytest.mark.parametrize("name", ["eval_dense", "eval_block_10", "eval_model_0", "eval_pruned_0"])
def test_report_names_the_missing_file(out: Path, name: str) -> None:
    (out / f"{name}.json").unlink()
    result = run(report.main, "-d", out)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {out / name}.json: missing; run evaluate.py -o")
    assert result.stderr.count("\n") == 1
    assert not (out / "report.md").exists()


def test_report_without_configurations(out: Path) -> None:
    for path in out.glob("eval_*_*.json"):
        path.unlink()
    result = run(report.main, "-d", out)
    assert result.exit_code == 1
    assert "eval_pruned_0.json: missing" in result.stderr


def test_report_without_a_picture(out: Path) -> None:
    (out / "loss.png").unlink()
    result = run(report.main, "-d", out)
    assert (result.exit_code, json.loads(result.stdout)["plot"]) == (0, None)
    assert "loss.png" not in (out / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bleu": {"value": 1.0, "signature": "other"}}, "the signature is other"),
        ({"data": {"count": 3}}, "the data is {'count': 3}"),
        ({"settings": {"num_beams": 4}}, "the number of beams is 4"),
        ({"settings": {"num_beams": 1, "max_length": 9}}, "the maximum length is 9"),
        ({"source_length": 8}, "the length for the MACs is (8, 32)"),
    ],
)
def test_report_refuses_to_compare_unlike_evaluations(
    out: Path, change: dict, message: str
) -> None:
    (out / "eval_block_0.json").write_text(json.dumps(evaluation(1.0) | change))
    result = run(report.main, "-d", out)
    assert result.exit_code == 1
    assert f"eval_block_0.json: {message}" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", 'no valid "bleu.value"'),
        ("[]", 'no valid "bleu.value"'),
        ('{"bleu": 3}', 'no valid "bleu.value"'),
        (json.dumps(evaluation(1.0) | {"parameters": None}), 'no valid "parameters"'),
        (json.dumps(evaluation(1.0) | {"source_length": "8"}), 'no valid "source_length"'),
        (json.dumps(evaluation(1.0) | {"parameters": True}), 'no valid "parameters"'),
        (json.dumps(evaluation(True)), 'no valid "bleu.value"'),
        (json.dumps(evaluation(1.0) | {"settings": 7}), 'no valid "settings"'),
        (json.dumps(evaluation(1.0) | {"settings": {"dtype": None}}), 'no valid "settings.dtype"'),
        ("no json", "not a JSON file"),
    ],
)
def test_report_refuses_other_files(out: Path, content: str, message: str) -> None:
    (out / "eval_dense.json").write_text(content)
    result = run(report.main, "-d", out)
    assert result.exit_code == 1
    assert f"eval_dense.json: {message}" in result.stderr
    assert result.stderr.count("\n") == 1


def prune(model: checkpoint.Checkpoint) -> tuple[str, str, str]:
    """Take all heads of an attention, two of another one, and an ffn."""
    attention, cross = (
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    )
    ffn = "decoder.block.0.layer.2.DenseReluDense"
    gone = Edit(attention, "remove"), Edit(ffn, "remove")
    model.structure = (*gone, Edit(cross, "keep", (1, 3)))
    apply_structure(model.model, model.family, model.structure)
    return attention, cross, ffn


def test_removed_modules_cost_nothing_and_still_translate(folder: Path, tmp_path: Path) -> None:
    """An attention without heads, one with two, no ffn: through a file and the command."""
    model = checkpoint.load(folder / "model.pth")
    dense = cost.macs(model.model, model.family).by_module
    attention, cross, ffn = prune(model)
    checkpoint.save(tmp_path / "model.pth", model)
    (tmp_path / "data").symlink_to(folder / "data")
    found = evaluated(tmp_path)
    left = sum(dense.values()) - dense[attention] - dense[ffn] - dense[cross] // 2
    assert found["macs_per_token"] == pytest.approx(left / 64, abs=0.01)
    gone = 4 * 32 * 32 + 4 * 32 * 16 + 2 * 32 * 48
    assert found["sparsity"] == pytest.approx(gone / (found["parameters"] + gone), abs=1e-5)
