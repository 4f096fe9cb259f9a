"""One split of a calibration set as a model sees it: tokenised once, in batches of any size."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from composable import tasks
from composable.models.checkpoint import Checkpoint
from composable.tasks import plain_texts
from composable.tasks.samples import BATCH_TOKENS, CPU_TOKENS, identity_of, length_batches
from composable.tasks.splits import short_name


class Texts:
    """One split of a calibration set, tokenised once.

    Args:
        dense: whose tokenizer, task and settings.
        corpus: of the model's task, or plain texts.

    Attributes:
        corpus: what was read.
        dataset: its samples as the model sees them.
    """

    def __init__(self, dense: Checkpoint, corpus: Any):
        is_plain = isinstance(corpus, plain_texts.PlainTexts)
        reader: Any = plain_texts if is_plain else tasks.by_name(dense.info["task"])
        self.corpus, self.dataset = corpus, reader.dataset(corpus, dense)
        self._collate = reader.collator(dense)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def name(self) -> str:
        """What was read, without its folder; "" of what was given from Python."""
        return short_name(self.corpus.name) if self.corpus else ""

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of every sample as the model sees it, see `identity_of`; 64 hex digits."""
        return identity_of(self.dataset)

    def first(self, count: int) -> "Texts":
        """Return the first `count` samples alone."""
        found = copy.copy(self)
        found.dataset = _First(self.dataset, count)
        found.__dict__.pop("identity", None)
        return found

    def batches(
        self, device: torch.device | str = "cpu", rows: int | None = None
    ) -> list[dict[str, Tensor]]:
        """Make batches of samples of like length, longest first.

        Args:
            device: for which batches are of a good size.
            rows: samples of a batch instead; its samples have longer sides of like length.
        """
        if rows:
            sizes = self.dataset.sizes
            order = sorted(range(len(sizes)), key=lambda i: (-max(sizes[i]), -sum(sizes[i])))
            chosen = [order[start : start + rows] for start in range(0, len(order), rows)]
        else:
            # on a CPU what a layer makes of a batch should stay in the cache
            size = CPU_TOKENS if torch.device(device).type == "cpu" else BATCH_TOKENS
            chosen = list(length_batches(self.dataset.lengths, size))
        return [self._collate([self.dataset[index] for index in indices]) for indices in chosen]


class _First:
    """The first `count` samples of a dataset."""

    def __init__(self, dataset: Any, count: int):
        self.dataset, self.count = dataset, count
        self.lengths, self.sizes = dataset.lengths[:count], dataset.sizes[:count]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.dataset[index]
        return item


class GivenBatches(Texts):
    """Batches of tensors that somebody else made, as the model takes them; they stay so."""

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
