"""Questions: SQuAD's files, windows over long contexts, spans against plain loops, scores."""

import gzip
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from composable.errors import FormatError, UserError
from composable.tasks import squad
from composable.tasks.question_answering import QUESTION_ANSWERING
from composable.tasks.squad import Answer, Question
from tests import tiny_tasks
from tests.tiny_tasks import asked

CONTEXT = "the old dog runs in the garden . the good man sits on the house ."
SETTINGS = {"device": "cpu", "dtype": "float32"}


def paragraph(*questions: Any, context: str = CONTEXT) -> dict[str, Any]:
    return {"context": context, "qas": list(questions)}


def write(path: Path, *paragraphs: dict[str, Any], version: str = "1.1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tiny_tasks.squad(list(paragraphs), version))
    return path


def read(path: Path, split: str = "test", limit: int | None = None) -> squad.Questions:
    return squad.read(str(path), None, split, limit)


def test_files_of_both_versions(tmp_path: Path) -> None:
    one = asked(1, "  who runs ? ", CONTEXT, "the old dog", "dog")
    none = asked(2, "who sleeps ?", CONTEXT, fails=True) | {"plausible_answers": []}
    write(tmp_path / "a" / "dev-v1.1.json", paragraph(one))
    found = read(tmp_path / "a")
    assert found.questions == [
        Question("q1", "who runs ?", CONTEXT, (("the old dog", 0), ("dog", 8)))
    ]
    assert (found.file, found.split, found.can_fail) == ("dev-v1.1.json", "test", False)
    write(tmp_path / "b" / "train-v2.0.json", paragraph(one | {"is_impossible": False}, none))
    (tmp_path / "b" / "train-v2.0.json.gz").write_bytes(
        gzip.compress((tmp_path / "b" / "train-v2.0.json").read_bytes())
    )
    second = read(tmp_path / "b" / "train-v2.0.json.gz")
    assert second.can_fail
    assert [each.wanted for each in second.questions] == [["the old dog", "dog"], [""]]
    assert read(tmp_path / "b" / "train-v2.0.json", limit=1).can_fail  # whatever the limit is


def test_what_is_held_out_are_paragraphs(tmp_path: Path) -> None:
    many = [
        paragraph(*(asked(10 * i + j, "who ?", CONTEXT, "dog") for j in range(2)))
        for i in range(12)
    ]
    path = write(tmp_path / "train.json", *many)
    valid = read(tmp_path, "valid")
    assert [each.id for each in valid.questions] == ["q0", "q1", "q100", "q101"]
    assert len(read(tmp_path, "train").questions) == 20
    assert valid.file == "train.json[1of10]"
    assert len(read(path, "test").questions) == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not a file of SQuAD's form \(JSONDecodeError"),
        ("[]", "not a file of SQuAD's form"),
        ('{"data": [{}]}', r"KeyError: 'paragraphs'\); expected data\[\]\.paragraphs"),
        (
            '{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 1}]}]}]}',
            "KeyError: 'answers'",
        ),
        ('{"data": []}', "no questions for test"),
        (
            '{"data": [{"paragraphs": [{"context": "a dog", "qas": [{"id": "q", "question": "?", '
            '"answers": [{"text": "dog", "answer_start": 1}]}]}]}]}',
            "question q: the context has ' do' at 1, the answer is 'dog'; correct answer_start",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "a dog", "qas": [{"id": "q", "question": "?", '
            '"answers": [{"text": "dog", "answer_start": 1e400}]}]}]}]}',
            "question q: answer_start is 'inf'; the number of a character was expected",
        ),
        *(
            (
                '{"data": [{"paragraphs": [{"context": "a dog", "qas": [{"id": "q", "question": '
                f'"?", "is_impossible": {fails}, "answers": '
                '[{"text": "dog", "answer_start": 2}]}]}]}]}',
                f"question q: is_impossible is {said} and there are 1 answers; true without",
            )
            for fails, said in (("true", "True"), ('"false"', "'false'"))
        ),
    ],
)  # fmt: skip
def test_refused_with_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(FormatError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("context", "text", "answer"),
    [(None, "who", "a"), (["a"], "who", "a"), ("a", None, "a"), ("a", 5, "a"), ("None", "w", None)],
)
def test_what_is_no_text_is_refused(context: Any, text: Any, answer: Any, tmp_path: Path) -> None:
    asked = {"id": "q", "question": text, "answers": [{"text": answer, "answer_start": 0}]}
    content = {"data": [{"paragraphs": [{"context": context, "qas": [asked]}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"question q: .* stands where a text was expected"):
        read(tmp_path)


@pytest.mark.parametrize("start", [None, 1.5, "1", [0]])
def test_the_place_of_an_answer_is_a_number(start: Any, tmp_path: Path) -> None:
    asked = {"id": "q", "question": "?", "answers": [{"text": "a", "answer_start": start}]}
    content = {"data": [{"paragraphs": [{"context": "a dog", "qas": [asked]}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"question q: answer_start is .*; the number of a char"):
        read(tmp_path)


def test_an_empty_context_answers_nothing(tmp_path: Path) -> None:
    """As long as the sample has a token, be it of the question or of the tokenizer."""
    made = tiny_tasks.checkpoint("question_answering")
    lines = [
        {"context": "", "qas": [asked(1, "who ?", "")]},
        {"context": "the dog", "qas": [asked(2, "", "the dog", "dog")]},
    ]
    corpus = read(write(tmp_path / "dev.json", *lines))
    settings = {"device": "cpu", "dtype": "float32"}
    for is_special in (True, False):
        made.tokenizer = tiny_tasks.tokenizer(is_special)
        answers, report = QUESTION_ANSWERING.evaluate(made, corpus, settings)
        assert answers[0] == ""
        assert answers[1] != ""
        assert math.isfinite(report["loss"])
    corpus = read(write(tmp_path / "dev.json", {**lines[0], "qas": [asked(3, " ", "")]}))
    with pytest.raises(FormatError, match="question q3: the text has no token"):
        QUESTION_ANSWERING.dataset(corpus, made)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no test split; expected a file of SQuAD's form \(\.json"):
        read(tmp_path)


def windows(longest: int, *questions: Question) -> list[dict[str, Any]]:
    return squad.windows(tiny_tasks.tokenizer(), questions, longest, True)


def question(text: str, context: str, *answers: str, number: int = 1) -> Question:
    found = tuple((each, context.index(each)) for each in answers)
    return Question(f"q{number}", text, context, found)


def spans(text: str, item: dict[str, Any]) -> list[str]:
    return [text[a:b] for a, b in item["offsets"] if a >= 0]


def test_one_window() -> None:
    one = question("who sits ?", CONTEXT, "good man")
    (item,) = windows(64, one)
    tokens = tiny_tasks.tokenizer().convert_ids_to_tokens(item["input_ids"][:5])
    assert tokens == ["<cls>", "who", "sits", "?", "<sep>"]
    assert item["token_type_ids"].tolist() == [0] * 5 + [1] * 17
    assert spans(CONTEXT, item) == CONTEXT.split()
    assert (item["offsets"][:5] == -1).all()
    first, last = item["start_positions"], item["end_positions"]
    begin, end = item["offsets"][first, 0], item["offsets"][last, 1]
    assert CONTEXT[begin:end] == "good man"


def test_long_contexts_give_windows_that_overlap() -> None:
    """Question 3 tokens, 3 special ones: 14 of 20 are left for the context, 6 of them again."""
    words = [tiny_tasks.WORDS[i % 9] for i in range(40)]
    context = " ".join(words)
    items = windows(20, question("who sits ?", context))
    found = [spans(context, item) for item in items]
    assert [len(part) for part in found] == [14, 14, 14, 14, 8]
    for i, part in enumerate(found):
        assert part == words[8 * i : 8 * i + 14]
    assert all(len(item["input_ids"]) <= 20 for item in items)
    assert [item["question"] for item in items] == [0] * 5


def test_an_answer_counts_where_it_lies_whole() -> None:
    """Elsewhere both places are that of the first token, which stands for no answer."""
    context = " ".join(["dog"] * 9 + ["good", "man"] + ["cat"] * 20)
    items = windows(16, question("who ?", context, "good man"))
    places = []
    for item in items:
        first, last = item["start_positions"], item["end_positions"]
        has_all = {"good", "man"} <= set(spans(context, item))
        assert (first > 0) == (last > 0) == has_all
        if has_all:
            places.append(context[item["offsets"][first, 0] : item["offsets"][last, 1]])
    assert places
    assert set(places) == {"good man"}
    assert len(places) < len(items)


def test_an_answer_within_a_word_takes_the_word() -> None:
    (item,) = windows(64, Question("q", "who ?", "a dog .", (("og", 3),)))
    first, last = item["start_positions"], item["end_positions"]
    assert first == last
    assert item["offsets"][first].tolist() == [2, 5]


def test_questions_without_an_answer() -> None:
    (item,) = windows(64, question("who sleeps ?", CONTEXT))
    assert (item["start_positions"], item["end_positions"]) == (0, 0)


def test_long_questions_are_cut() -> None:
    items = windows(60, question(" ".join(["who"] * 50), CONTEXT, "dog"))
    assert (items[0]["token_type_ids"] == 0).sum() == 60 // 6 + 2
    assert spans(CONTEXT, items[0]) == CONTEXT.split()


def test_many_questions_are_tokenised_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [question("who ?", f"{CONTEXT} {'dog ' * i}", "man", number=i) for i in range(7)]
    expected = windows(24, *many)
    monkeypatch.setattr(squad, "CHUNK", 3)
    found = windows(24, *many)
    assert [item["question"] for item in found] == [item["question"] for item in expected]
    assert len({item["question"] for item in found}) == 7
    for one, two in zip(found, expected, strict=True):
        assert one["input_ids"].tolist() == two["input_ids"].tolist()
        assert (one["offsets"] == two["offsets"]).all()


def best_by_loops(items: list[dict[str, Any]], logits: list[Any]) -> tuple[float, Any]:
    """All pairs of starts and ends, without the cut to the likeliest."""
    best: tuple[float, Any] = (-np.inf, None)
    for number, (item, (starts, ends)) in enumerate(zip(items, logits, strict=True)):
        for first, last in itertools.product(range(len(item["input_ids"])), repeat=2):
            is_context = item["offsets"][first, 0] >= 0 and item["offsets"][last, 0] >= 0
            if is_context and 0 <= last - first < squad.ANSWER_TOKENS:
                score = float(starts[first]) + float(ends[last])
                if score > best[0] + 1e-9:
                    best = (score, (number, first, last))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_best_spans_against_a_loop(seed: int) -> None:
    """At most 20 tokens of context in a window, so that all are among the likeliest."""
    context = " ".join(f"{tiny_tasks.WORDS[i % 9]}" for i in range(50))
    one = question("who ?", context)
    items = windows(24, one)
    generator = np.random.default_rng(seed)
    logits = [
        tuple(generator.normal(size=len(item["input_ids"])).astype(np.float32) for _ in range(2))
        for item in items
    ]
    (found,) = squad.best_answers([one], items, logits, tiny_tasks.tokenizer())
    score, (number, first, last) = best_by_loops(items, logits)
    begin, end = items[number]["offsets"][first, 0], items[number]["offsets"][last, 1]
    assert found.text == context[begin:end]
    assert found.score == pytest.approx(score)
    assert found.null == pytest.approx(min(float(s[0] + e[0]) for s, e in logits))


def test_answers_have_30_tokens_at_most() -> None:
    context = " ".join(["dog"] * 50)
    one = question("who ?", context)
    (item,) = windows(64, one)
    starts, ends = np.zeros(len(item["input_ids"])), np.zeros(len(item["input_ids"]))
    starts[4], ends[4 + 29], ends[4 + 30] = 9, 8, 9
    (found,) = squad.best_answers([one], [item], [(starts, ends)], tiny_tasks.tokenizer())
    assert found.text.split() == ["dog"] * 30
    assert found.score == 17


def test_only_the_20_likeliest_starts_and_ends_are_paired() -> None:
    """Here all likely starts come after all likely ends: no span is left."""
    context = " ".join(["dog"] * 50)
    one = question("who ?", context)
    (item,) = windows(64, one)
    starts, ends = np.zeros(len(item["input_ids"])), np.zeros(len(item["input_ids"]))
    starts[30:50], ends[4:24] = 1, 1
    (found,) = squad.best_answers([one], [item], [(starts, ends)], tiny_tasks.tokenizer())
    assert (found.text, found.score) == ("", -np.inf)
    starts[29] = 2  # the last of the 20 likeliest makes room for it
    ends[29] = 2
    (found,) = squad.best_answers([one], [item], [(starts, ends)], tiny_tasks.tokenizer())
    assert (found.text, found.score) == ("dog", 4)


def test_threshold_of_no_answer() -> None:
    answer = Answer("dog", score=5.0, null=6.0)
    assert answer.text_at(0.0) == ""
    assert answer.text_at(0.99) == ""
    assert answer.text_at(1.0) == "dog"
    assert Answer("dog", 5.0, 4.0).text_at(0.0) == "dog"
    assert Answer("", -np.inf, 4.0).text_at(0.0) == ""


def evaluate(path: Path, seed: int = 0, **settings: Any) -> Any:
    made = tiny_tasks.checkpoint("question_answering", seed=seed)
    corpus = read(path)
    return QUESTION_ANSWERING.evaluate(made, corpus, SETTINGS | settings)


def test_answers_come_from_the_model(tmp_path: Path) -> None:
    """A head that knows the answer: starts and ends are the words that follow "good"."""
    folder = tiny_tasks.data("question_answering", tmp_path)
    made = tiny_tasks.checkpoint("question_answering")
    corpus = read(folder)
    data = QUESTION_ANSWERING.dataset(corpus, made)
    answers = {bytes(item["input_ids"]): item for item in data.items}

    class Head(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
            logits = torch.zeros(2, *input_ids.shape)
            for i, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
                item = answers[bytes(ids[mask.bool()].numpy().astype(np.int32))]
                logits[0, i, item["start_positions"]] = logits[1, i, item["end_positions"]] = 9
            return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])

    made.model = Head()  # type: ignore[assignment]
    made.model.config = SimpleNamespace(
        pad_token_id=0, max_position_embeddings=64, type_vocab_size=2
    )
    lines, report = QUESTION_ANSWERING.evaluate(made, corpus, SETTINGS)
    assert lines == [each.answers[0][0] for each in corpus.questions]
    assert report["exact_match"]["value"] == report["f1"]["value"] == 100
    assert report["exact_match"]["counts"] == {"questions": 10, "answerable": 10}
    assert (
        "|rules:squad-1.1|max_length:64|stride:21|n_best:20|answer_tokens:30|"
        in (report["f1"]["signature"])
    )


def test_version_2_may_answer_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "dev-v2.0.json",
        paragraph(
            asked(1, "who runs ?", CONTEXT, "dog", fails=False),
            asked(2, "who sleeps ?", CONTEXT, fails=True),
        ),
        version="v2.0",
    )
    never, report = evaluate(path, null_threshold=1e6)
    assert all(never)
    assert report["f1"]["counts"] == {"questions": 2, "answerable": 1}
    always, all_null = evaluate(path, null_threshold=-1e6)
    assert always == ["", ""]
    assert all_null["exact_match"]["value"] == all_null["f1"]["value"] == 50
    assert "|rules:squad-2.0|" in report["f1"]["signature"]
    assert "|null_threshold:-1000000.0|" in all_null["f1"]["signature"]


def test_version_1_always_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "dev.json", paragraph(asked(1, "who runs ?", CONTEXT, "dog")))
    lines, report = evaluate(path, null_threshold=-1e6)
    assert all(lines)
    assert "|null_threshold:none|" in report["f1"]["signature"]


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    made = tiny_tasks.checkpoint("question_answering")
    made.tokenizer = object()
    path = write(tmp_path / "dev.json", paragraph(asked(1, "who runs ?", CONTEXT, "dog")))
    with pytest.raises(UserError, match=r"the tokenizer \(object\) does not know which characters"):
        QUESTION_ANSWERING.dataset(read(path), made)
