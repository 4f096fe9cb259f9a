"""The ranker fisher: against torch's gradients by a mask, one sample at a time, without padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composable import ranking, tasks
from composable.calibration.batching import GivenBatches, Texts
from composable.errors import UserError
from composable.formats.scores import Scores
from composable.models.checkpoint import Checkpoint
from composable.ranking import base
from composable.ranking.base import NoOptions
from composable.tasks.plain_texts import PlainTexts
from tests import tiny, tiny_tasks

FISHER = ranking.by_name("fisher")
SENTENCES = ["the man runs", "a dog in the street .", "house", "a woman plays with a red cat"]
HAVE_ONE_LENGTH = ("image_classification", "text_similarity")


def data_of(made: Checkpoint, folder: Path) -> Texts:
    """Samples of the model's task, texts of unequal lengths."""
    task = tasks.by_name(made.info["task"])
    tiny.corpus(folder) if task.name == "translation" else tiny_tasks.data(task.name, folder, 10)
    lines = [f"{line} ." * (n % 3 + 1) for n, line in enumerate(SENTENCES)]
    if task.name == "translation":
        for language in ("en", "de"):
            (folder / f"train.{language}").write_text("\n".join(lines) + "\n")
    elif task.name == "text_classification":
        rows = ["sentence\tlabel", *(f"{line}\t{n % 2}" for n, line in enumerate(lines))]
        (folder / "train.tsv").write_text("\n".join(rows) + "\n")
    elif task.name == "question_answering":
        asked = [
            tiny_tasks.asked(n, "who runs ?", it, it.split()[-1]) for n, it in enumerate(lines)
        ]
        paragraphs = [{"context": it, "qas": [q]} for it, q in zip(lines, asked, strict=True)]
        (folder / "train-v1.1.json").write_text(tiny_tasks.squad(paragraphs))
    texts = Texts(made, task.read(str(folder), None, "train", None))
    assert task.name in HAVE_ONE_LENGTH or len(set(texts.dataset.lengths)) > 1
    return texts


def loss_of(made: Checkpoint, item: dict[str, Any]) -> torch.Tensor:
    """The loss of one sample as transformers computes it, summed over what is predicted."""
    count, batch = 1, {k: torch.tensor(np.asarray(v))[None] for k, v in item.items()}
    if made.info["task"] == "language_modeling":  # which shifts by itself
        batch["labels"], count = batch["input_ids"].long(), len(item["input_ids"]) - 1
    elif made.info["task"] == "translation":
        count = len(item["labels"])
    if "input_ids" in batch:
        batch["input_ids"] = batch["input_ids"].long()
    return made.model(**batch).loss * count


def by_hand(made: Checkpoint, texts: Texts) -> dict[str, np.ndarray]:
    """Square the gradient by one mask for all tokens, of each sample alone."""
    modules = [m for m in made.family.modules(made.model) if m.kind in ("attention", "ffn")]
    squares = {m.name: torch.zeros(m.units, dtype=torch.float64) for m in modules}
    for number in range(len(texts)):
        masks = {m.name: torch.nn.Parameter(torch.ones(m.units)) for m in modules}
        hooks = []
        for m in modules:
            size = m.head_size if m.kind == "attention" else 1
            repeated = masks[m.name].repeat_interleave(size)
            hooks.append(
                made.model.get_submodule(m.output_path).register_forward_pre_hook(
                    lambda part, args, factors=repeated: (args[0] * factors,)
                )
            )
        loss_of(made, texts.dataset[number]).backward()
        for hook in hooks:
            hook.remove()
        for name, mask in masks.items():
            assert mask.grad is not None
            squares[name] += mask.grad.double() ** 2
    return {name: (total / len(texts)).numpy() for name, total in squares.items()}


def same(found: Scores, expected: dict[str, np.ndarray]) -> None:
    assert list(found.units) == list(expected)
    for name, one in found.units.items():
        assert expected[name].max() > 0
        np.testing.assert_allclose(
            one.importance, expected[name], 1e-3, 1e-5 * expected[name].max()
        )


@pytest.mark.parametrize("layout", tiny.ALL)
def test_gradients_of_every_family(layout: str, tmp_path: Path) -> None:
    made = tiny.dense(layout)
    texts = data_of(made, tmp_path)
    found = base.rank(FISHER, made, texts, NoOptions())
    same(found, by_hand(made, texts))
    for rows in (1, 3):
        same(
            FISHER.measure(made, GivenBatches(texts.batches(rows=rows)), NoOptions()),
            {name: one.importance for name, one in found.units.items()},
        )


@pytest.mark.parametrize(
    ("task", "kind"),
    [("question_answering", ""), ("text_similarity", ""), ("text_classification", "gpt2")],
)
def test_losses_of_every_task(task: str, kind: str, tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint(task, kind=kind)
    if made.family.prepare is not None:
        made.family.prepare(made.model)
    texts = data_of(made, tmp_path)
    same(base.rank(FISHER, made, texts, NoOptions()), by_hand(made, texts))


@pytest.mark.parametrize("layout", ["opt", "gpt2", "llama_gqa"])
def test_plain_texts_of_a_language_model_predict_themselves(layout: str) -> None:
    made = tiny.dense(layout)
    for side in ("right", "left"):
        made.tokenizer.padding_side = side
        texts = Texts(made, PlainTexts.of(SENTENCES))
        (batch,) = texts.batches()
        assert bool(batch["attention_mask"][:, 0].all()) == (side == "right")
        same(base.rank(FISHER, made, texts, NoOptions()), by_hand(made, texts))


@pytest.mark.parametrize(
    ("made", "task"),
    [(tiny.checkpoint(), "translation"), (tiny.dense("bert"), "text_classification"),
     (tiny_tasks.checkpoint("text_classification", kind="gpt2"), "text_classification")],
)  # fmt: skip
def test_plain_texts_without_labels(made: Checkpoint, task: str) -> None:
    texts = Texts(made, PlainTexts.of(SENTENCES, "texts.txt"))
    message = f"texts.txt: plain texts have no labels, which the loss of {task} is measured by; giv"
    with pytest.raises(UserError, match=message):
        base.rank(FISHER, made, texts, NoOptions())


def test_the_model_is_left_as_it_was() -> None:
    made = tiny.dense("llama")
    texts = Texts(made, PlainTexts.of(SENTENCES))
    first, *others = made.model.parameters()
    first.requires_grad_(False)
    made.model.train()
    FISHER.measure(made, texts, NoOptions())
    assert made.model.training
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in others)
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert not any(module._forward_pre_hooks for module in made.model.modules())


def test_gradients_that_are_not_finite() -> None:
    made = tiny.dense("llama")
    with torch.no_grad():
        made.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        UserError, match=r'layers\.0\.self_attn": the squared gradients of its units'
    ):
        FISHER.measure(made, Texts(made, PlainTexts.of(SENTENCES)), NoOptions())


def test_a_text_that_predicts_nothing_is_refused() -> None:
    made = tiny_tasks.checkpoint("language_modeling")
    texts = Texts(made, PlainTexts.of(["house"]))
    with pytest.raises(UserError, match="fisher: all importances are 0"):
        base.rank(FISHER, made, texts, NoOptions())
