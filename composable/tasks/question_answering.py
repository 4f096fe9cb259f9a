"""Answers that are spans of a text (SQuAD 1.1 and 2.0): exact match and F1 of words."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from composable.errors import UserError
from composable.tasks import scores, squad
from composable.tasks.base import Score, Task, report, signature
from composable.tasks.losses import output_of
from composable.tasks.samples import Samples, has_token_types, measure, pad_labelled, pad_token
from composable.tasks.squad import Questions

PLACES = ("start_positions", "end_positions")


def find_spans(
    model: Any, batch: dict[str, Tensor], smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model on a batch; padding is no place of an answer.

    Returns:
        Logits of the start and the end, each (batch, length) and minus infinity for padding, and
        the mean of both cross-entropies, (batch,); all float32.
    """
    output = output_of(model, batch, PLACES)
    is_padding = batch["attention_mask"] == 0
    both = [
        logits.float().masked_fill(is_padding, -torch.inf)
        for logits in (output.start_logits, output.end_logits)
    ]
    losses = [
        _cross_entropy(logits, batch[name], is_padding, smoothing)
        for logits, name in zip(both, PLACES, strict=True)
    ]
    return both[0], both[1], (losses[0] + losses[1]) / 2


def _cross_entropy(logits: Tensor, places: Tensor, is_padding: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy over the tokens that are no padding: (batch,)."""
    odds = log_softmax(logits, 1)
    target = odds.gather(1, places[:, None])[:, 0]
    if not smoothing:
        return -target
    mean = odds.masked_fill(is_padding, 0.0).sum(1) / (~is_padding).sum(1)
    return -(1 - smoothing) * target - smoothing * mean


class QuestionAnswering(Task):
    """A span of a context for a question, or none."""

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    heads = ("ForQuestionAnswering",)
    main = "f1"
    tokens = 384  # of a question and a part of its context
    run = staticmethod(find_spans)
    read = staticmethod(squad.read)

    def outputs(self, labels: int | None) -> int | None:
        """Return two, start and end; a model of tokens' classes, say, comes with its own number."""
        super().outputs(labels)
        return 2

    def dataset(self, corpus: Questions, checkpoint: Any, is_sorted: bool = False) -> Samples:
        """Tokenise; a long context gives several samples, see `squad.windows`."""
        if not getattr(checkpoint.tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer ({type(checkpoint.tokenizer).__name__}) does not know which "
                "characters its tokens are of; one of the tokenizers library was expected."
            )
        longest, has_types = self.length(checkpoint), has_token_types(checkpoint)
        items = squad.windows(checkpoint.tokenizer, corpus.questions, longest, has_types)
        return Samples(items, is_sorted)

    def collator(self, checkpoint: Any) -> Any:
        """Return what pads the tokens; start_positions and end_positions are (batch,)."""
        return functools.partial(pad_labelled, pad=pad_token(checkpoint), labels=PLACES)

    def evaluate(
        self, checkpoint: Any, corpus: Questions, settings: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """Answer, and score by exact match and F1 as SQuAD's own programs do."""
        data = self.dataset(corpus, checkpoint)
        found = measure(checkpoint, data, self.collator(checkpoint), find_spans, settings)
        logits = [(row[0].numpy(), row[1].numpy()) for row in found.rows]
        best = squad.best_answers(corpus.questions, data.items, logits, checkpoint.tokenizer)
        threshold = settings.get("null_threshold") or 0.0
        texts = [each.text_at(threshold) if corpus.can_fail else each.text for each in best]
        lines = [" ".join(text.split()) for text in texts]
        longest, count = self.length(checkpoint), len(texts)
        said = signature(
            corpus,
            count,
            rules="squad-2.0" if corpus.can_fail else "squad-1.1",
            max_length=longest,
            stride=min(squad.STRIDE, longest // 3),
            n_best=squad.N_BEST,
            answer_tokens=squad.ANSWER_TOKENS,
            null_threshold=threshold if corpus.can_fail else "none",
            dtype=settings["dtype"],
        )
        both = _scores(corpus, texts, said)
        return lines, report(corpus, both, found.mean(2), count, found.seconds, windows=len(data))


def _scores(corpus: Questions, texts: list[str], said: str) -> dict[str, Score]:
    """Score answers by the rules of the version."""
    wanted = [_wanted(each.wanted, corpus.can_fail) for each in corpus.questions]
    pairs = list(zip(texts, wanted, strict=True))
    exact = [scores.exact_match(text, answers) for text, answers in pairs]
    shared = [scores.word_f1(text, answers, corpus.can_fail) for text, answers in pairs]
    answerable = sum(bool(each.answers) for each in corpus.questions)
    counts = {"questions": len(pairs), "answerable": answerable}
    return {
        "exact_match": Score("exact match", scores.per_cent(exact), said, counts),
        "f1": Score("F1", scores.per_cent(shared), said, counts),
    }


def _wanted(answers: list[str], can_fail: bool) -> list[str]:
    """Leave out answers of which nothing is left, as the program for version 2.0 does."""
    return [each for each in answers if scores.normalised(each)] or [""] if can_fail else answers


QUESTION_ANSWERING = QuestionAnswering()
