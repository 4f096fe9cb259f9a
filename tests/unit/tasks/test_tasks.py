"""What every task has to do: data to batches, losses against plain ones, training, scores."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from composable import tasks
from composable.errors import UserError
from composable.tasks import base, samples
from composable.tasks.samples import BATCH_TOKENS, length_batches
from composable.training import train
from composable.training.options import Options
from tests import tiny_tasks

SETTINGS = {"device": "cpu", "dtype": "float32", "batch_tokens": BATCH_TOKENS}
#: Tasks, and for some of them a second kind of model.
KINDS = [*((task, "") for task in tiny_tasks.TASKS), ("language_modeling", "opt")]
KINDS += [("text_classification", "gpt2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("data")
    return {task: tiny_tasks.data(task, place / task) for task in tiny_tasks.TASKS}


def read(
    task: str, folders: dict[str, Path], split: str = "valid", limit: int | None = None
) -> Any:
    return tasks.by_name(task).read(str(folders[task]), None, split, limit)


def test_every_task_says_what_it_is() -> None:
    assert tasks.names() == ["translation", *tiny_tasks.TASKS]
    import transformers

    for name in tasks.names():
        task = tasks.by_name(name)
        assert task.name == name
        assert task.auto_class in dir(transformers)
        assert all(end.startswith(("For", "LM", "With")) for end in task.heads)


@pytest.mark.parametrize(
    ("name", "labels", "task"),
    [
        ("T5ForConditionalGeneration", 2, "translation"),
        ("MT5ForConditionalGeneration", 2, "translation"),
        ("BertForSequenceClassification", 3, "text_classification"),
        ("BertForSequenceClassification", 1, "text_similarity"),
        ("GPT2ForSequenceClassification", 2, "text_classification"),
        ("DistilBertForQuestionAnswering", 2, "question_answering"),
        ("OPTForCausalLM", 2, "language_modeling"),
        ("LlamaForCausalLM", 2, "language_modeling"),
        ("GPT2LMHeadModel", 2, "language_modeling"),
        ("ViTForImageClassification", 1000, "image_classification"),
        ("DeiTForImageClassificationWithTeacher", 1000, "image_classification"),
    ],
)
def test_task_of_an_architecture(name: str, labels: int, task: str) -> None:
    found = tasks.of_architecture(name, labels)
    assert found is not None
    assert found.name == task


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForTokenClassification", ""])
def test_heads_without_a_task(name: str) -> None:
    assert tasks.of_architecture(name, 2) is None


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_batches(task: str, kind: str, folders: dict[str, Path]) -> None:
    made = tiny_tasks.checkpoint(task, kind=kind)
    it, corpus = tasks.by_name(task), read(task, folders)
    assert (corpus.name, corpus.split, len(corpus.sha256)) == (str(folders[task]), "valid", 64)
    data = it.dataset(corpus, made)
    lengths = it.dataset(corpus, made, is_sorted=True).lengths
    assert sorted(lengths, reverse=True) == lengths
    assert sorted(data.lengths) == sorted(lengths)
    assert data.sizes == [(length, length) for length in data.lengths]
    assert len(data) == len(data.lengths) > 1
    assert max(data.lengths) <= it.length(made)
    batch = it.collator(made)([data[i] for i in range(len(data))])
    assert all(len(tensor) == len(data) for tensor in batch.values())
    names = {"input_ids", "attention_mask"} if made.tokenizer else {"pixel_values"}
    if kind == "" and task in ("text_classification", "text_similarity", "question_answering"):
        names |= {"token_type_ids"}
    answers = {"question_answering": {"start_positions", "end_positions"}}.get(task, {"labels"})
    assert set(batch) == names | answers
    if made.tokenizer:
        assert batch["attention_mask"].sum(1).tolist() == data.lengths
        assert batch["attention_mask"].dtype == batch["input_ids"].dtype == torch.int64
        is_padding = batch["attention_mask"] == 0
        assert (batch["input_ids"][is_padding] == 0).all()
        assert (is_padding.long().diff(dim=1) >= 0).all()  # on the right


def plain_losses(task: str, model: Any, item: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Loss of a batch of one sample, from all logits: sum and count."""
    inputs = {k: v for k, v in item.items() if "labels" not in k and "positions" not in k}
    output = model(**inputs)
    if task == "question_answering":
        pairs = (("start_positions", output.start_logits), ("end_positions", output.end_logits))
        found = [functional.cross_entropy(logits, item[name]) for name, logits in pairs]
        return float(sum(found)) / 2, 1
    if task == "language_modeling":
        logits, wanted = output.logits[0, :-1], item["input_ids"][0, 1:]
        return float(functional.cross_entropy(logits, wanted, reduction="sum")), len(wanted)
    if task == "text_similarity":
        return float((output.logits[0, 0] - item["labels"][0]) ** 2), 1
    return float(functional.cross_entropy(output.logits, item["labels"])), 1


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_losses_are_those_of_single_samples(task: str, kind: str, folders: dict[str, Path]) -> None:
    """Padding has no influence, and no model computes its own loss."""
    made = tiny_tasks.checkpoint(task, kind=kind)
    it = tasks.by_name(task)
    data, collate = it.dataset(read(task, folders), made), it.collator(made)
    batch = collate([data[i] for i in range(len(data))])
    step, measure = it.functions()
    with torch.no_grad():
        losses, counts = measure(made.model, batch)
        alone = [plain_losses(task, made.model, collate([data[i]])) for i in range(len(data))]
        total, count = step(made.model, batch)
    assert losses.shape == counts.shape == (len(data),)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([loss for loss, _ in alone], rel=1e-4, abs=1e-5)
    assert counts.tolist() == [number for _, number in alone]
    assert float(total) == pytest.approx(float(losses.sum()), rel=1e-5)
    assert int(count) == int(counts.sum())


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_smoothing_is_for_steps_alone(task: str, folders: dict[str, Path]) -> None:
    made, it = tiny_tasks.checkpoint(task), tasks.by_name(task)
    data = it.dataset(read(task, folders), made)
    batch = it.collator(made)([data[i] for i in range(len(data))])
    (plain, measure), (smooth, also) = it.functions(), it.functions(0.1)
    with torch.no_grad():
        assert torch.equal(measure(made.model, batch)[0], also(made.model, batch)[0])
        losses = [float(step(made.model, batch)[0]) for step in (plain, smooth)]
        assert all(map(torch.isfinite, map(torch.tensor, losses)))
        assert (losses[0] == losses[1]) == (task == "text_similarity")


def test_smoothed_spans_are_those_of_torch(folders: dict[str, Path]) -> None:
    """Of a sample without padding."""
    made, it = tiny_tasks.checkpoint("question_answering"), tasks.by_name("question_answering")
    data = it.dataset(read(it.name, folders), made)
    batch = it.collator(made)([data[0]])
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if "positions" not in k}
        output = made.model(**inputs)
        expected = [
            float(functional.cross_entropy(logits, batch[name], label_smoothing=0.2))
            for name, logits in (
                ("start_positions", output.start_logits),
                ("end_positions", output.end_logits),
            )
        ]
        found = it.functions(0.2)[0](made.model, batch)[0]
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_training_lowers_the_loss(task: str, folders: dict[str, Path], tmp_path: Path) -> None:
    made, it = tiny_tasks.checkpoint(task, seed=1), tasks.by_name(task)
    corpora = tuple(read(task, folders, split) for split in ("train", "valid"))
    options = Options(
        epochs=3, batch_size=4, lr=0.03, early_stop=0, device="cpu", checkpoint_dir=tmp_path
    )
    outcome = train.run(
        made.model, {}, train.data_of(made, corpora), it.functions(), options, {"x": task}
    )
    losses = [row["validation_loss"] for row in outcome.rows]
    assert len(losses) == 4
    assert min(losses[1:]) < 0.9 * losses[0]


def evaluate(task: str, folders: dict[str, Path], made: Any, **settings: Any) -> Any:
    corpus = read(task, folders, "test")
    return tasks.by_name(task).evaluate(made, corpus, SETTINGS | settings)


SCORES = {
    "text_classification": {"accuracy", "f1", "matthews"},
    "text_similarity": {"spearman", "pearson"},
    "question_answering": {"exact_match", "f1"},
    "language_modeling": {"perplexity", "bits_per_byte"},
    "image_classification": {"top1", "top5"},
}


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_reports(task: str, folders: dict[str, Path]) -> None:
    made = tiny_tasks.checkpoint(task)
    lines, report = evaluate(task, folders, made)
    assert len(lines) == report["samples"] == report["data"]["count"] > 1
    assert not any("\n" in line for line in lines)
    assert report["samples_per_second"] > 0
    assert set(report["data"]) == {"name", "split", "file", "count", "sha256"}
    found = {key for key, value in report.items() if isinstance(value, dict)} - {"data"}
    assert found == SCORES[task]
    assert tasks.by_name(task).main in found
    for key in found:
        said = report[key]["signature"]
        for part in (
            f"data:{task}|file:",
            "|split:test|",
            f"|count:{len(lines)}|",
            "|dtype:float32",
        ):
            assert part in said
        assert f"|sha256:{report['data']['sha256'][:12]}|" in said
        assert f"|torch:{torch.__version__}|transformers:" in said
    measure = tasks.by_name(task).functions()[1]
    data = tasks.by_name(task).dataset(read(task, folders, "test"), made)
    with torch.no_grad():
        batch = tasks.by_name(task).collator(made)([data[i] for i in range(len(data))])
        losses, counts = measure(made.model, batch)
    assert report["loss"] == pytest.approx(float(losses.sum() / counts.sum()), rel=1e-4)


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_answers_depend_on_no_batch(task: str, folders: dict[str, Path]) -> None:
    made = tiny_tasks.checkpoint(task)
    together, report = evaluate(task, folders, made)
    alone, single = evaluate(task, folders, made, batch_tokens=1)
    main = tasks.by_name(task).main
    if task in ("language_modeling", "text_similarity"):
        together, alone = ([float(line) for line in lines] for lines in (together, alone))
        assert together == pytest.approx(alone, abs=1e-3)
    else:
        assert together == alone
    assert single[main]["value"] == pytest.approx(report[main]["value"], rel=1e-3)


def test_bfloat16_is_in_the_signature(folders: dict[str, Path]) -> None:
    made = tiny_tasks.checkpoint("text_classification")
    _, report = evaluate("text_classification", folders, made, dtype="bfloat16")
    assert "|dtype:bfloat16|" in report["accuracy"]["signature"]
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_a_model_that_gives_no_numbers_is_refused(task: str, folders: dict[str, Path]) -> None:
    made = tiny_tasks.checkpoint(task)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(UserError, match="the model's loss is nan, a finite number was expected"):
        evaluate(task, folders, made)


@pytest.mark.parametrize(("value", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf)])
def test_every_score_is_finite(value: float, loss: float) -> None:
    with pytest.raises(UserError, match=f"the model's {'BLEU' if loss == 1 else 'loss'} is "):
        base.measured({"bleu": base.Score("BLEU", value, "")}, loss)


@pytest.mark.parametrize("task", tiny_tasks.TASKS)
def test_limit_takes_the_first(task: str, folders: dict[str, Path]) -> None:
    """Of a text the first lines, of the others the first samples."""
    made, it = tiny_tasks.checkpoint(task), tasks.by_name(task)
    whole, few = read(task, folders, "test"), read(task, folders, "test", 3)
    assert few.sha256 != whole.sha256
    assert (few.name, few.split, few.file) == (whole.name, whole.split, whole.file)
    if task == "language_modeling":
        assert whole.text.startswith(few.text)
        assert few.text.count("\n") == 3
        return
    assert len(it.dataset(few, made)) == 3
    for name, values in vars(few).items():
        if isinstance(values, list):
            assert list(getattr(whole, name)[:3]) == values


def test_tokens_are_bounded_by_the_positions() -> None:
    made = tiny_tasks.checkpoint("question_answering")
    assert tasks.by_name("question_answering").length(made) == 64
    for wanted, expected in ((48, 48), (500, 64), (None, 64)):
        made.info["max_length"] = wanted
        assert samples.most_tokens(made, 128) == expected
    assert samples.positions(tiny_tasks.checkpoint("text_classification", kind="gpt2")) == 64
    assert samples.positions(tiny_tasks.checkpoint("language_modeling", kind="opt")) == 64


def test_positions_before_that_of_padding_do_not_count() -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    made = tiny_tasks.checkpoint("text_classification")
    config = RobertaConfig(**{**tiny_tasks.ENCODER, "type_vocab_size": 1, "pad_token_id": 1})
    made.model = RobertaForSequenceClassification(config).eval()
    longest = samples.positions(made)
    assert longest == 62
    ids = torch.full((1, longest + 1), 5)
    made.model(ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        made.model(ids)
    assert not samples.has_token_types(made)


def test_padding_takes_the_models_own_token() -> None:
    made = tiny_tasks.checkpoint("text_classification")
    assert samples.pad_token(made) == 0
    made.model.config.pad_token_id = 7
    assert samples.pad_token(made) == 7
    made.model.config.pad_token_id = None
    made.tokenizer.pad_token = None
    made.tokenizer.eos_token = "<sep>"
    assert samples.pad_token(made) == 3
    made.tokenizer.eos_token = None
    assert samples.pad_token(made) == 0


def test_a_classifier_without_a_padding_token_gets_one(folders: dict[str, Path]) -> None:
    """It would refuse batches, for it looks for the last token before the padding."""
    made = tiny_tasks.checkpoint("text_classification", kind="gpt2")
    expected, _ = evaluate("text_classification", folders, made)
    made.model.config.pad_token_id = None
    assert evaluate("text_classification", folders, made)[0] == expected


def test_batches_are_small_on_a_cpu(folders: dict[str, Path], monkeypatch: Any) -> None:
    made, met = tiny_tasks.checkpoint("text_classification"), []
    monkeypatch.setattr(samples, "CPU_TOKENS", 40)
    hook = made.model.register_forward_pre_hook(
        lambda _, args, kwargs: met.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    evaluate("text_classification", folders, made)
    hook.remove()
    assert len(met) > 1
    assert max(met) <= 40


def test_corpora_are_equal_where_their_texts_are(folders: dict[str, Path]) -> None:
    for task in tiny_tasks.TASKS:
        if task != "image_classification":
            first, second = read(task, folders), read(task, folders)
            assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_length_batches_are_where_they_were() -> None:
    from composable.tasks import translation_decode

    assert translation_decode.length_batches is length_batches
