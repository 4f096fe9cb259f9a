"""Depth pruning from Python: which layers of a model change little, and the model without them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composable import families, files, importance, layer_states, surgery
from composable.checkpoint import Checkpoint
from composable.errors import ConfigError, UserError
from composable.importance import Distances, Scores
from composable.layer_states import Batch, Reader
from composable.methods.layer_distance import Metric
from composable.tasks.samples import most_tokens, pad_token

log = logging.getLogger("composable")
#: Key of a config under which a cut is recorded.
RECORD = "depth_pruning"
LONGEST = 1024
#: Tokens of a batch, with its padding.
BATCH_TOKENS = 2048


def analyse(
    model: Any,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    metrics: Sequence[str] = ("angular_all",),
    key: str = "text",
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    largest: int | None = None,
) -> Scores:
    """Measure how much every block of layers changes its input, in one pass of the model.

    Args:
        model: of transformers, of a supported family; it stays where it is, on any devices.
        dataset: texts, or mappings with a text under `key`; a stream is read to `limit` and no
            further. Without a tokenizer: batches, as the model takes them, padded on either side.
        tokenizer: of the model; decoders get their padding where it says, others on the right.
        metrics: names, see `methods.layer_distance`; the first is the main one.
        key: of the text.
        limit: the first so many samples (without a tokenizer: batches).
        max_length: tokens of a sample at most; by default 1,024, or fewer if the model has fewer
            positions.
        batch_size: samples of a batch; by default as many as are 2,048 tokens.
        largest: most layers of a block, for the metric linear_fit.

    Returns:
        Scores of every stack that the samples pass; of plain texts, the encoder's alone where there
        are two.

    Raises:
        UserError: unknown family or metric, no samples, a sample without tokens or text.
    """
    family = families.of(model)
    wanted = [Metric.parse(name) for name in metrics]
    some = list(islice(dataset, limit))
    if not some:
        raise UserError("the calibration set is empty; give at least one sample.")
    if tokenizer is None:
        batches: list[Batch] = [_batch(item) for item in some]
    else:
        texts = [_text(item, key) for item in some]
        made = Checkpoint(model, tokenizer, {}, info={"max_length": max_length})
        batches = list(text_batches(made, texts, batch_size))
    found = layer_states.measure(Reader.of(model, family), batches, wanted, largest)
    return scores_of(found, getattr(model.config, "name_or_path", ""))


def scores_of(
    found: Sequence[layer_states.Measured], model: str = "", fingerprint: str = ""
) -> Scores:
    """Turn what was measured into what is stored."""
    distances = [Distances(x.stack, x.metric, x.values.numpy(), x.samples) for x in found]
    return Scores(distances, model=model, fingerprint=fingerprint)


def _text(item: Any, key: str) -> str:
    text = item if isinstance(item, str) else item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(text, str):
        has = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise UserError(f'a sample has no text under the key "{key}" (it has {has}); give the key.')
    return text


def _batch(item: Any) -> Batch:
    if not isinstance(item, Mapping) or not all(isinstance(x, Tensor) for x in item.values()):
        raise UserError("samples are no batches of tensors; give a tokenizer with texts.")
    return with_positions(item)


def text_batches(
    checkpoint: Checkpoint, texts: Sequence[str], batch_size: int | None = None
) -> Iterator[Batch]:
    """Tokenise texts and pad them to batches of samples of like length, longest first.

    Args:
        checkpoint: model, tokenizer and perhaps a `max_length` in its info.
        texts: one a sample.
        batch_size: samples; by default as many as are `BATCH_TOKENS`.
    """
    tokenizer, longest = checkpoint.tokenizer, most_tokens(checkpoint, LONGEST)
    found = tokenizer(list(texts), truncation=True, max_length=longest, verbose=False)["input_ids"]
    # an encoder sees the same whichever side is padded; its positions count from the left
    is_left = tokenizer.padding_side == "left" and "encoder" not in checkpoint.family.stacks
    order = sorted(range(len(found)), key=lambda i: -len(found[i]))
    while order:
        size = batch_size or max(1, BATCH_TOKENS // max(1, len(found[order[0]])))
        rows = [found[i] for i in order[:size]]
        yield _padded(rows, pad_token(checkpoint), is_left)
        order = order[size:]


def _padded(rows: Sequence[Sequence[int]], pad: int, is_left: bool) -> Batch:
    length = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if is_left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return with_positions({"input_ids": ids, "attention_mask": mask})


def with_positions(batch: Batch) -> Batch:
    """Count positions from the first real token where a batch is padded on the left.

    `generate` does so by itself, a plain forward pass does not.
    """
    mask = batch.get("attention_mask")
    if mask is None and "input_ids" in batch:
        mask = torch.ones_like(batch["input_ids"])
    if mask is None or "decoder_input_ids" in batch:
        return batch
    if "position_ids" in batch or bool(mask[:, 0].all()):
        return {**batch, "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {**batch, "attention_mask": mask, "position_ids": positions}


def best_cut(
    scores: Scores, count: int, *, stack: str | None = None, metric: str | None = None
) -> list[int]:
    """Return the numbers of the `count` contiguous layers that change their input least."""
    first, _ = importance.best_block(scores.of(stack, metric), count)
    return list(range(first, first + count))


def block_table(
    scores: Scores,
    threshold: float | None = None,
    *,
    stack: str | None = None,
    metric: str | None = None,
) -> str:
    """Return the best block of every size as a Markdown table, up to a distance of `threshold`."""
    return importance.as_markdown(list(importance.block_table(scores.of(stack, metric), threshold)))


def cut(model: Any, layers: Sequence[int], stack: str | None = None) -> Any:
    """Take layers out of a model for good, in place; every config value that changes is logged.

    Args:
        model: of transformers, of a supported family.
        layers: numbers in the model as it is now.
        stack: "encoder" or "decoder", where it has both.

    Returns:
        The same model. Its config says under "depth_pruning" which layers of the original are gone.

    Raises:
        ConfigError: no such layers, or all of them.
        UserError: unknown family; a model of two stacks leaves open which one is meant.
    """
    family = families.of(model)
    lists = surgery.layer_lists(model, family)
    if stack is None and len(lists) > 1:
        raise UserError(f"the model has {' and '.join(lists)}; say which stack.")
    name = stack or next(iter(lists))
    if name not in lists:
        raise UserError(f"the model has no {name}; it has {' and '.join(lists)}.")
    present = lists[name]
    gone = sorted(set(layers))
    if gone and not 0 <= gone[0] <= gone[-1] < len(present):
        raise ConfigError(f"layers {gone} of the {name}: it has 0 to {len(present) - 1}.")
    if len(gone) == len(present):
        raise ConfigError(f"all {len(gone)} {name} layers would go; keep at least one of them.")
    before = model.config.to_dict()
    path = next(p for p, module in model.named_modules() if module is present)
    record = dict(getattr(model.config, RECORD, None) or {})
    numbers = record.get(name, {}).get("kept", list(range(len(present))))
    surgery.remove_layers(model, family, [f"{path}.{layer}" for layer in gone])
    kept = [number for i, number in enumerate(numbers) if i not in gone]
    removed = sorted({*record.get(name, {}).get("removed", []), *numbers} - set(kept))
    setattr(model.config, RECORD, record | {name: {"removed": removed, "kept": kept}})
    for key, value in model.config.to_dict().items():
        if before.get(key) != value:
            log.info("config: %s was %s, is %s", key, before.get(key), value)
    return model


def save(
    model: Any,
    folder: Path | str,
    tokenizer: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a plain transformers folder, whole or not at all; AutoModel reads it.

    Args:
        model: dense, or without some layers.
        folder: to be made; it may exist if it is empty.
        tokenizer: written beside it, where there is one.
        extra: name -> content of further JSON files.

    Raises:
        UserError: there is something in the folder.
        OSError: it cannot be written.
    """
    with files.atomic_folder(Path(folder)) as inner:
        family = families.of(model)
        if family.restore is not None:
            family.restore(model)
        model.save_pretrained(inner)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
        for name, content in (extra or {}).items():
            files.write_json(inner / name, content)
