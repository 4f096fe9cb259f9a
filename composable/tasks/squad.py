"""Questions on contexts: SQuAD's JSON files, their tokens, and the spans that answer them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable import files
from composable.errors import FormatError
from composable.tasks import splits, text_files
from composable.tasks.samples import check_tokens
from composable.tasks.splits import Corpus

NAMES = {
    split: [f"{name}{end}" for name in names for end in ("", "-v1.1", "-v2.0")]
    for split, names in splits.NAMES.items()
}
WANTED = (
    "a file of SQuAD's form (.json, also .gz) or a folder with such files named train, valid (val, "
    "dev, validation) and test, with or without -v1.1 or -v2.0"
)
STRIDE = 128
#: Most tokens of a question.
QUESTION = 64
N_BEST = 20
ANSWER_TOKENS = 30
#: Questions that are tokenised together.
CHUNK = 512


@dataclass(frozen=True)
class Question:
    """A question on a text.

    Attributes:
        id: of the data set.
        text: the question.
        context: the text.
        answers: each a text and where in `context` it begins; none: it cannot be answered.
    """

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]

    @property
    def wanted(self) -> list[str]:
        """Texts of the answers; one empty text where it cannot be answered."""
        return [text for text, _ in self.answers] or [""]


@dataclass(frozen=True)
class Questions(Corpus):
    """A split.

    Attributes:
        questions: in the order of the file.
        can_fail: whether the data has questions without an answer (version 2.0).
    """

    questions: list[Question]
    can_fail: bool


def read(data: str | None, default: str | None, split: str, limit: int | None) -> Questions:
    """Read a split, see `Task.read`; `limit` counts questions, every tenth paragraph is held out.

    An answer that is not where its `answer_start` says is a FormatError.
    """
    find = functools.partial(splits.first_of, endings=(".json",))
    name, (place, *_) = splits.locate(data, default, split, NAMES, find, WANTED)
    groups, can_fail = _read(place.path)
    questions = [each for group in splits.share_of(groups, place.share) for each in group][:limit]
    if not questions:
        raise FormatError(f"{place.path}: no questions for {split}; at least one was expected.")
    content = [[one.id, one.text, one.context, *map(list, one.answers)] for one in questions]
    return Questions(name, split, place.label, files.digest_of(content), questions, can_fail)


def _read(path: Path) -> tuple[list[list[Question]], bool]:
    """Return the questions of every paragraph, and whether the file is of version 2.0."""
    try:
        content = text_files.parse_json(text_files.read_text(path))
        paragraphs = [each for article in content["data"] for each in article["paragraphs"]]
        groups = [[_question(path, each, asked) for asked in each["qas"]] for each in paragraphs]
        return groups, any("is_impossible" in asked for each in paragraphs for asked in each["qas"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: not a file of SQuAD's form ({type(error).__name__}: {error}); expected "
            "data[].paragraphs[].context and .qas[] with id, question, answers[].text and "
            ".answer_start."
        ) from error


def _question(path: Path, paragraph: dict[str, Any], asked: dict[str, Any]) -> Question:
    context = paragraph["context"]
    fails = asked.get("is_impossible")
    found = (asked.get("answers") or []) if fails else asked["answers"]
    if fails not in (None, False, True) or (fails and found):
        raise FormatError(
            f"{path}: question {asked['id']}: is_impossible is {fails!r:.40} and there are "
            f"{len(found)} answers; true without answers, or false, was expected."
        )
    answers = tuple((each["text"], each["answer_start"]) for each in found)
    question = asked["question"]
    for text in (context, question, *(text for text, _ in answers)):
        if not isinstance(text, str):
            raise FormatError(
                f"{path}: question {asked['id']}: {str(text)[:40]!r} stands where a text was "
                "expected."
            )
    for text, start in answers:
        if not isinstance(start, int):
            raise FormatError(
                f"{path}: question {asked['id']}: answer_start is {str(start)[:40]!r}; the number "
                "of a character was expected."
            )
        if start < 0 or context[start : start + len(text)] != text:
            raise FormatError(
                f"{path}: question {asked['id']}: the context has "
                f"{context[max(0, start) : start + len(text)]!r} at {start}, the answer is "
                f"{text!r}; correct answer_start."
            )
    return Question(str(asked["id"]), question.strip(), context, answers)


def windows(
    tokenizer: Any, questions: Sequence[Question], longest: int, has_types: bool
) -> list[dict[str, Any]]:
    """Tokenise questions; a long context gives several samples that overlap.

    Args:
        tokenizer: one that knows which characters its tokens are of.
        questions: a question of more than `QUESTION` tokens is cut.
        longest: tokens of question and context together; what does not fit goes into further
            samples, each of which has the last `STRIDE` tokens of the context of the one before. Of
            short samples stride and question are at most a third and a sixth.
        has_types: whether the samples have token_type_ids.

    Returns:
        Samples with `question` (its index), `input_ids`, perhaps `token_type_ids`, `offsets`
        (tokens, 2: the characters of the context, -1 for all other tokens), `start_positions` and
        `end_positions` of the first answer; where it does not lie in the sample, or there is none,
        both name the token that stands for no answer.
    """
    items = []
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        found = tokenizer(
            [_shortened(tokenizer, each.text, min(QUESTION, longest // 6)) for each in chunk],
            [each.context for each in chunk],
            truncation="only_second",
            max_length=longest,
            stride=min(STRIDE, longest // 3),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=has_types,
        )
        rows = range(len(found["input_ids"]))
        owners = [0, *found["overflow_to_sample_mapping"]]  # counted from 1
        said = [f"question {questions[start + index].id}" for index in owners]
        check_tokens(found["input_ids"], said.__getitem__)
        items += [_window(tokenizer, found, row, start, questions) for row in rows]
    return items


def _shortened(tokenizer: Any, text: str, tokens: int) -> str:
    """Cut a question after so many tokens."""
    if len(text) <= tokens:
        return text
    settings = {"truncation": True, "max_length": tokens, "return_offsets_mapping": True}
    found = tokenizer(text, add_special_tokens=False, **settings)
    return text[: found["offset_mapping"][-1][1]] if found["offset_mapping"] else text


def _window(
    tokenizer: Any, found: Any, row: int, first: int, questions: Sequence[Question]
) -> dict[str, Any]:
    """Make a sample of one row of tokens."""
    index = first + found["overflow_to_sample_mapping"][row]
    ids = np.array(found["input_ids"][row], dtype=np.int32)
    offsets = np.array(found["offset_mapping"][row], dtype=np.int32).reshape(-1, 2)
    is_context = np.array([part == 1 for part in found.sequence_ids(row)])
    offsets[~is_context] = -1
    start, end = _place(questions[index], offsets, null_place(tokenizer, ids))
    item = {"question": index, "input_ids": ids, "offsets": offsets}
    item |= {"start_positions": start, "end_positions": end}
    if "token_type_ids" in found:
        item["token_type_ids"] = np.array(found["token_type_ids"][row], dtype=np.int32)
    return item


def null_place(tokenizer: Any, ids: NDArray[np.int32]) -> int:
    """Place of the token that stands for no answer: that of the class, or else the first."""
    places = (ids == tokenizer.cls_token_id).nonzero()[0] if tokenizer.cls_token_id else []
    return int(places[0]) if len(places) else 0


def _place(question: Question, offsets: NDArray[np.int32], null: int) -> tuple[int, int]:
    """First and last token of the first answer; the null token twice where it is not there."""
    context = (offsets[:, 0] >= 0).nonzero()[0]
    if not question.answers or not len(context):
        return null, null
    text, begin = question.answers[0]
    starts, ends = offsets[context].T
    if starts[0] > begin or ends[-1] < begin + len(text):
        return null, null
    first = context[(starts <= begin).nonzero()[0][-1]]
    last = context[(ends >= begin + len(text)).nonzero()[0][0]]
    return int(first), int(max(first, last))


@dataclass(frozen=True)
class Answer:
    """The best span of a question, and what no answer is worth.

    Attributes:
        text: of the span.
        score: its logits of start and end together.
        null: the lowest sum of both logits of the null token, over all samples of the question.
    """

    text: str
    score: float
    null: float

    def text_at(self, threshold: float) -> str:
        """Return the text; "" where no answer is better by more than `threshold`."""
        return "" if self.null - self.score > threshold else self.text


def best_answers(
    questions: Sequence[Question],
    items: Sequence[dict[str, Any]],
    logits: Sequence[tuple[Any, Any]],
    tokenizer: Any,
) -> list[Answer]:
    """Find the best span of every question.

    Args:
        questions: of the corpus.
        items: their samples, from `windows`.
        logits: of each sample those of start and end, each (tokens,).
        tokenizer: the model's.

    Returns:
        For each question the span with the largest sum of logits, among the `N_BEST` likeliest
        starts and ends within the context of each sample, of at most `ANSWER_TOKENS` tokens. Equal
        sums: the one that comes first.
    """
    spans: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    nulls = [np.inf] * len(questions)
    for item, (starts, ends) in zip(items, logits, strict=True):
        index, null = item["question"], null_place(tokenizer, item["input_ids"])
        nulls[index] = min(nulls[index], float(starts[null] + ends[null]))
        score, first, last = _best_span(np.asarray(starts), np.asarray(ends), item["offsets"])
        if score > spans[index][0]:
            begin, end = item["offsets"][first, 0], item["offsets"][last, 1]
            spans[index] = score, questions[index].context[begin:end].strip()
    return [Answer(text, score, null) for (score, text), null in zip(spans, nulls, strict=True)]


def _best_span(
    starts: NDArray[Any], ends: NDArray[Any], offsets: NDArray[np.int32]
) -> tuple[float, int, int]:
    """Sum of logits, first and last token of the best span in a sample; minus infinity: none."""
    context = (offsets[:, 0] >= 0).nonzero()[0]
    firsts, lasts = (
        np.sort(context[np.argsort(-side[context], kind="stable")[:N_BEST]])
        for side in (starts, ends)
    )
    lengths = lasts[None, :] - firsts[:, None] + 1
    sums = starts[firsts][:, None] + ends[lasts][None, :]
    sums = np.where((lengths >= 1) & (lengths <= ANSWER_TOKENS), sums, -np.inf)
    if not sums.size or not np.isfinite(sums.max()):
        return -np.inf, 0, 0
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[row, column]), int(firsts[row]), int(lasts[column])
