"""Samples of token ids, padded to batches, and a model run over all of them."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from composable import files
from composable.errors import FormatError
from composable.linalg import kernels
from composable.progress import Stage

BATCH_TOKENS = 8192
#: Most tokens of a batch on a CPU: what a layer makes of them stays in its cache.
CPU_TOKENS = 2048


class Samples(Dataset[dict[str, Any]]):
    """Samples with `input_ids`, longest first where `is_sorted`.

    Attributes:
        items: the samples.
        lengths: tokens of every sample.
        sizes: the same twice, see `Task.dataset`.
    """

    def __init__(self, items: list[dict[str, Any]], is_sorted: bool = False):
        self.items = sorted(items, key=lambda item: -len(item["input_ids"])) if is_sorted else items
        self.lengths = [len(item["input_ids"]) for item in self.items]
        self.sizes = [(length, length) for length in self.lengths]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def positions(checkpoint: Any) -> int | None:
    """Return how many tokens the model has positions for; None where it has no such limit."""
    for part in _position_tables(checkpoint.model):
        # where padding has a position of its own, those before it are not used
        return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    config = checkpoint.model.config
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((int(count) for count in found if count), None)


def counts_padding(model: nn.Module) -> bool:
    """Tell whether padding has a position of its own, by which the model counts the others."""
    return any(part.padding_idx is not None for part in _position_tables(model))


def _position_tables(model: nn.Module) -> list[nn.Embedding]:
    named = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    return [part for part in named if isinstance(part, nn.Embedding)]


def most_tokens(checkpoint: Any, default: int) -> int:
    """Return the most tokens of a sample: `max_length` of the model file, or `default`.

    It is never more than the model has positions.
    """
    wanted = int(checkpoint.info.get("max_length") or default)
    return min(wanted, positions(checkpoint) or wanted)


def pad_token(checkpoint: Any) -> int:
    """Return the id that fills up a batch; the attention mask hides it."""
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    for found in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int) and found >= 0:
            return found
    return 0


def has_token_types(checkpoint: Any) -> bool:
    """Tell whether the model tells first and second texts apart, and the tokenizer does."""
    # a tokenizer of the general class says so of any model
    return (
        getattr(checkpoint.model.config, "type_vocab_size", 0) > 1
        and "token_type_ids" in checkpoint.tokenizer.model_input_names
    )


def check_tokens(rows: Sequence[Sequence[int]], place: Callable[[int], str]) -> None:
    """Refuse samples without a token, of which a model can say nothing.

    Args:
        rows: token ids of every sample.
        place: says for the message where a sample is, which it gets the number of, from 1.
    """
    for number, ids in enumerate(rows, 1):
        if not len(ids):
            raise FormatError(
                f"{place(number)}: the text has no token for this model's tokenizer; take it out."
            )


def labelled_samples(
    checkpoint: Any, corpus: Any, labels: Sequence[float], longest: int, is_sorted: bool
) -> Samples:
    """Tokenise `LabelledTexts`; of a pair with more than `longest` tokens the longer text is cut.

    Returns:
        Samples with labels, input_ids and, where the model wants them, token_type_ids: arrays of
        int32.
    """
    names = ["input_ids", *(["token_type_ids"] if has_token_types(checkpoint) else [])]
    found = checkpoint.tokenizer(
        corpus.texts,
        corpus.others,
        truncation=True,
        max_length=longest,
        return_attention_mask=False,
        return_token_type_ids=len(names) > 1,
    )
    check_tokens(found["input_ids"], lambda number: corpus.place(number - 1))
    items: list[dict[str, Any]] = [
        {name: np.array(found[name][i], dtype=np.int32) for name in names} | {"labels": label}
        for i, label in enumerate(labels)
    ]
    return Samples(items, is_sorted)


def padded(rows: Sequence[Sequence[int]], value: int, is_left: bool = False) -> Tensor:
    """Put rows of unequal lengths together, filled up on one side: (rows, longest), int64."""
    filled = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for line, row in zip(filled, rows, strict=True):
        line[len(line) - len(row) if is_left else 0 :][: len(row)] = row
    return torch.from_numpy(filled)


def pad_texts(
    items: Sequence[dict[str, Any]], pad: int, is_left: bool = False
) -> dict[str, Tensor]:
    """Pad samples to input_ids, attention_mask and, where they have them, token_type_ids."""
    rows = [item["input_ids"] for item in items]
    batch = {
        "input_ids": padded(rows, pad, is_left),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, is_left),
    }
    if "token_type_ids" in items[0]:
        batch["token_type_ids"] = padded([item["token_type_ids"] for item in items], 0)
    return batch


def with_positions(batch: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
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


def pad_labelled(
    items: list[dict[str, Any]], pad: int, labels: Sequence[str] = ("labels",)
) -> dict[str, Tensor]:
    """Pad samples; each of the `labels` becomes (batch,), int64 or float32 as its numbers are."""
    return pad_texts(items, pad) | {
        name: torch.tensor([item[name] for item in items]) for name in labels
    }


def labelled_collator(checkpoint: Any) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Return what pads labelled samples, and tell the model the token that it pads with.

    Some models look for the last token before the padding.
    """
    token = pad_token(checkpoint)
    checkpoint.model.config.pad_token_id = token
    return functools.partial(pad_labelled, pad=token)


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices by length, longest first, so that a batch hardly pads.

    Args:
        lengths: tokens of each row.
        batch_tokens: the longest row of a batch times its rows stays within this number.

    Yields:
        Indices of a batch, at least one; the first batch is the widest, so memory runs out
        at once or not at all.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, batch_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def identity_of(dataset: Any) -> str:
    """Hash a dataset as the model sees it, so that another tokenizer or length is another dataset.

    Args:
        dataset: with a length; its samples map names to numbers, lists, arrays or tensors. One that
            takes long to make its samples says its own `identity`.

    Returns:
        SHA-256, 64 hex digits: for every sample and name in sorted order the canonical JSON of
        [name, dtype, shape], then the values as little-endian bytes.
    """
    if own := getattr(dataset, "identity", None):
        return str(own)
    total = hashlib.sha256()
    for index in range(len(dataset)):
        for name, value in sorted(dataset[index].items()):
            array = np.ascontiguousarray(value)
            if array.dtype.hasobject:
                raise TypeError(f'"{name}" of a sample is no array of numbers: {value!r:.60}')
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            described = [name, array.dtype.str, list(array.shape)]
            total.update(files.canonical_json(described).encode())
            total.update(array.tobytes())
    return total.hexdigest()


@dataclass
class Measured:
    """What a model gave for every sample.

    Attributes:
        rows: of every sample, in the order of the dataset; on the CPU.
        seconds: that the model ran.
    """

    rows: list[tuple[Tensor, ...]]
    seconds: float

    def mean(self, index: int) -> float:
        """Mean of one of the tensors over all samples."""
        return float(torch.stack([row[index] for row in self.rows]).double().mean())


def measure(
    checkpoint: Any,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    function: Callable[[Any, dict[str, Tensor]], tuple[Tensor, ...]],
    settings: dict[str, Any],
) -> Measured:
    """Run a model over a dataset in batches of samples of like length.

    Args:
        checkpoint: its model is moved to the device and set to eval mode.
        dataset: with `lengths`.
        collate: makes a batch.
        function: (model, batch) -> tensors, each (batch, ...).
        settings: device, dtype and batch_tokens; on a CPU a batch has at most `CPU_TOKENS`.
    """
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    model = checkpoint.model.to(device).eval()
    size = settings.get("batch_tokens") or BATCH_TOKENS
    size = min(size, CPU_TOKENS) if torch.device(device).type == "cpu" else size
    rows: list[tuple[Tensor, ...]] = [()] * len(dataset)
    started = time.perf_counter()
    with (
        Stage(None, "evaluate", len(dataset), unit="samples") as stage,
        torch.inference_mode(),
        kernels.autocast(device, dtype),
        kernels.for_cpu(model, device, max(dataset.lengths)),
    ):
        for chosen in length_batches(dataset.lengths, size):
            batch = collate([dataset[i] for i in chosen])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found = [tensor.float().cpu() for tensor in function(model, batch)]
            for place, *parts in zip(chosen, *found, strict=True):
                rows[place] = tuple(parts)
            stage.update(len(chosen))
    return Measured(rows, time.perf_counter() - started)
