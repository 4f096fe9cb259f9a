"""How much of a split is measured: a number of samples, or as many as have enough tokens."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from composable.calibration.batching import Texts
from composable.models.checkpoint import Checkpoint

#: Real tokens of a calibration set where no number of samples is given.
TOKENS = 65_536
#: Held-out texts have so many times fewer.
HELD_OUT_PART = 4
#: Samples (lines of a language model's text) that are read first where tokens count, and how many
#: times more each time after.
PORTION, GROWTH = 1024, 4


@dataclass(frozen=True)
class Amount:
    """How much of a split is measured.

    Attributes:
        samples: how many, from the start of the split; of a language model's text lines. None:
            `tokens` decides.
        tokens: samples (windows of a language model) are taken until every stack that they pass has
            so many real tokens, or there are no more. Patches of an image count, too.
    """

    samples: int | None = None
    tokens: int = TOKENS

    def part(self) -> "Amount":
        """Return a quarter of it, which is held out unless more is asked for."""
        samples = self.samples and -(-self.samples // HELD_OUT_PART)
        return Amount(samples, -(-self.tokens // HELD_OUT_PART))


def amounts(calibration: int | None, held_out: int | None) -> tuple[Amount, Amount]:
    """Return the amounts of the calibration texts and of the held-out ones, from their samples."""
    wanted = Amount(calibration)
    return wanted, wanted.part() if held_out is None else Amount(held_out)


def take(
    dense: Checkpoint,
    read: Callable[[int | None], Any],
    amount: Amount,
    limit: int | None = None,
) -> Texts:
    """Read so much of a split, and tokenise it.

    Where tokens count, ever more samples are read until there are enough, so that a large split
    is not tokenised for a small part of it.

    Args:
        dense: whose tokenizer, task and settings.
        read: a limit of samples (lines) -> a corpus of the split, as of `Task.read`.
        amount: how much.
        limit: samples (lines) to be read at most.
    """
    image_tokens = dense.family.image_tokens
    samples = amount.samples
    if samples is None and image_tokens is not None:
        samples = -(-amount.tokens // image_tokens(dense.model.config))  # all have as many
    if samples is not None:
        return Texts(dense, read(min(samples, limit or samples)))
    portion = PORTION
    corpus = read(min(portion, limit or portion))
    while True:
        texts = Texts(dense, corpus)
        count = _enough(texts.dataset.sizes, amount.tokens)
        # the last window of a portion may end where its text does
        if count is not None and count < len(texts):
            return texts.first(count)
        if limit and portion >= limit:
            return texts
        portion *= GROWTH
        more = read(min(portion, limit or portion))
        if more.sha256 == corpus.sha256:  # there are no more
            return texts
        corpus = more


def _enough(sizes: list[tuple[int, int]], tokens: int) -> int | None:
    """Return how many first samples have so many tokens on either side; None: all have fewer."""
    totals = zip(*(itertools.accumulate(side) for side in zip(*sizes, strict=True)), strict=True)
    return next((i for i, both in enumerate(totals, 1) if min(both) >= tokens), None)
