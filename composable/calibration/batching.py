"""Batches of a calibration set: samples of like length, longest first."""

import functools
from typing import Any

import torch
from torch import Tensor

from composable import tasks
from composable.errors import UserError
from composable.models.checkpoint import Checkpoint
from composable.tasks.plain_texts import PlainTexts
from composable.tasks.samples import (
    Samples,
    counts_padding,
    identity_of,
    length_batches,
    most_tokens,
    pad_texts,
    pad_token,
)

# tokens of both stacks in a batch; on a CPU what a layer makes of a batch should stay in the cache
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}


class Texts:
    """One split of a calibration set as a model sees it: tokenised once, in batches of any size.

    Args:
        dense: whose tokenizer, task and settings.
        corpus: of the task.

    Attributes:
        corpus: what was read.
        dataset: its samples as the model sees them.
    """

    def __init__(self, dense: Checkpoint, corpus: Any):
        task = tasks.by_name(dense.info["task"])
        self.corpus, self.dataset = corpus, task.dataset(corpus, dense)
        self._collate = task.collator(dense)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def name(self) -> str:
        """What was read; "" of texts and batches that were given from Python."""
        return self.corpus.name if self.corpus else ""

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of every sample as the model sees it: ids, labels, pixels; 64 hex digits."""
        return identity_of(self.dataset)

    def batches(
        self, device: torch.device | str = "cpu", rows: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Make batches of samples of like length, longest first.

        Args:
            device: for which batches are of a good size.
            rows: samples of a batch instead.
        """
        size = BATCH_TOKENS["cpu" if torch.device(device).type == "cpu" else "cuda"]
        return [
            self._collate([self.dataset[index] for index in indices])
            for indices in length_batches(self.dataset.lengths, size, rows)
        ]


def batches_of(
    dense: Checkpoint, corpus: Any, device: str, rows: int | None = None
) -> list[dict[str, Tensor]]:
    """Tokenise a corpus and make batches of it, see `Texts.batches`."""
    return Texts(dense, corpus).batches(device, rows)


LONGEST = 1024


class PlainTextSamples(Texts):
    """Texts without a task, tokenised once; decoders get their padding where the tokenizer says.

    Args:
        dense: model, tokenizer and perhaps a `max_length` in its info.
        corpus: its texts, one a sample.
    """

    def __init__(self, dense: Checkpoint, corpus: PlainTexts):
        tokenizer, longest = dense.tokenizer, most_tokens(dense, LONGEST)
        found = tokenizer(corpus.texts, truncation=True, max_length=longest, verbose=False)
        if not all(found["input_ids"]):
            raise UserError("a text of the calibration set has no token; leave empty ones out.")
        # an encoder sees the same whichever side is padded; its positions count from the left
        is_left = tokenizer.padding_side == "left" and dense.family.stacks == ("decoder",)
        self.corpus = corpus
        self.dataset = Samples([{"input_ids": ids} for ids in found["input_ids"]])
        self._collate = lambda items: with_positions(
            pad_texts(items, pad_token(dense), is_left), dense.model
        )


class GivenBatches(Texts):
    """Batches of tensors that somebody else made; they stay as they are.

    Args:
        batches: as the model takes them.
    """

    def __init__(self, batches: list[dict[str, Tensor]]):
        self.corpus = None
        self.dataset = batches

    def __len__(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.dataset)

    @functools.cached_property
    def identity(self) -> str:
        """As of other texts; batches of other sizes, or padded on another side, are others."""
        return identity_of(
            [
                {name: (t.float() if t.is_floating_point() else t).detach().cpu()
                 for name, t in batch.items()}
                for batch in self.dataset
            ]
        )  # fmt: skip

    def batches(
        self, device: torch.device | str = "cpu", rows: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Return the batches."""
        return list(self.dataset)


def with_positions(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Let a model count positions from the first real token of a row that is padded on the left.

    `generate` does so by itself, a plain forward pass does not. Models that find their positions by
    the padding itself, and those without (encoder-decoders here), need no help.
    """
    mask = batch.get("attention_mask")
    if mask is None or bool(mask[:, 0].all()) or "position_ids" in batch:
        return batch
    if model.config.is_encoder_decoder or counts_padding(model):
        return batch
    return {**batch, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
