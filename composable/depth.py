"""Depth pruning from Python: which layers of a model change little, and the model without them."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from composable import families
from composable.calibration.batching import Texts
from composable.calibration.layer_states import Batch, Reader
from composable.errors import ConfigError, UserError
from composable.formats.scores_file import Scores
from composable.linalg.state_distances import Metric
from composable.models import surgery
from composable.models.checkpoint import Checkpoint
from composable.models.export import record
from composable.models.structure import Edit, ordered
from composable.ranking import layer_choice, layer_distance
from composable.ranking.layer_choice import Choice
from composable.ranking.layer_distance import scores_of
from composable.tasks.plain_texts import PlainTexts
from composable.tasks.samples import with_positions

log = logging.getLogger("composable")


def analyse(
    model: Any,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    metrics: Sequence[str] | str = ("angular_all",),
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
    for name, value in (("limit", limit), ("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a number from 1.")
    if isinstance(dataset, str | Mapping):
        what = "one text" if isinstance(dataset, str) else "a dict, perhaps of splits"
        raise UserError(f"the calibration set is {what}; expected an iterable of samples.")
    names = [metrics] if isinstance(metrics, str) else metrics
    wanted = [Metric.parse(name) for name in names]
    some = list(islice(dataset, limit))
    if not some:
        raise UserError("the calibration set is empty; give at least one sample.")
    if tokenizer is None:
        batches: list[Batch] = [_batch(item, model) for item in some]
    else:
        texts = [_text(item, key) for item in some]
        made = Checkpoint(model, tokenizer, {}, info={"max_length": max_length})
        batches = list(Texts(made, PlainTexts.of(texts)).batches(rows=batch_size))
    found = layer_distance.measure(Reader.of(model, family), batches, wanted, largest)
    return scores_of(found, getattr(model.config, "name_or_path", ""))


def _text(item: Any, key: str) -> str:
    text = item if isinstance(item, str) else item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(text, str):
        has = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise UserError(f'a sample has no text under the key "{key}" (it has {has}); give the key.')
    return text


def _batch(item: Any, model: Any) -> Batch:
    """Complete a batch: a mask where there is none, positions where it is padded on the left."""
    if not isinstance(item, Mapping) or not all(isinstance(x, Tensor) for x in item.values()):
        raise UserError("samples are no batches of tensors; give a tokenizer with texts.")
    batch = dict(item)
    if "input_ids" in batch and batch["input_ids"].dim() == 1:  # a sample of a tokenised dataset
        batch = {name: tensor[None] for name, tensor in batch.items()}
    if "input_ids" in batch and "attention_mask" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return with_positions(batch, model)


def best_cut(
    scores: Scores,
    count: int,
    *,
    stack: str | None = None,
    metric: str | None = None,
    policy: str = "block",
    protected: Collection[int] = (),
) -> list[int]:
    """Return the numbers of `count` layers that may go, see `layer_choice.Choice`."""
    choice = Choice(policy, scores, stack, metric, protected)
    return choice.layers(count, scores.of(stack).layers)


def block_table(
    scores: Scores,
    threshold: float | None = None,
    *,
    stack: str | None = None,
    metric: str | None = None,
) -> str:
    """Return the best block of every size as a Markdown table, up to a distance of `threshold`."""
    return layer_choice.as_markdown(
        list(layer_choice.block_table(scores.of(stack, metric), threshold))
    )


def cut(
    model: Any, layers: Sequence[int], stack: str | None = None, scores: Scores | None = None
) -> Any:
    """Take layers out of a model for good, in place.

    Every config value that changes is logged, at level INFO of the logger "composable".

    Args:
        model: of transformers, of a supported family.
        layers: numbers in the model as it is now.
        stack: "encoder" or "decoder", where it has both.
        scores: by which the layers were chosen; metric and score of a block are kept in the config.

    Returns:
        The same model. Its config says under "depth_pruning" which layers of the original are gone.

    Raises:
        ConfigError: no such layers, or all of them.
        UserError: unknown family; a model of two stacks leaves open which one is meant.
    """
    family = families.of(model)
    paths = surgery.layer_paths(model, family)
    if stack is None and len(paths) > 1:
        raise UserError(f"the model has {' and '.join(paths)}; say which stack.")
    name = stack or next(iter(paths))
    if name not in paths:
        raise UserError(f"the model has no {name}; it has {' and '.join(paths)}.")
    present = model.get_submodule(paths[name])
    gone = sorted(set(layers))
    if gone and not 0 <= gone[0] <= gone[-1] < len(present):
        raise ConfigError(f"layers {gone} of the {name}: it has 0 to {len(present) - 1}.")
    if len(gone) == len(present):
        raise ConfigError(f"all {len(gone)} {name} layers would go; keep at least one of them.")
    before = model.config.to_dict()
    edits = ordered(Edit(f"{paths[name]}.{layer}", "remove") for layer in gone)
    surgery.apply_structure(model, family, edits)
    why: dict[str, Any] = {}
    if scores is not None and gone:
        used = scores.of(name)
        is_block = gone[-1] - gone[0] == len(gone) - 1
        why["metric"] = used.metric
        why |= {"score": float(used.values[len(gone) - 1, gone[0]])} if is_block else {}
    record(model.config, name, gone, len(present), why)
    for key, value in model.config.to_dict().items():
        if before.get(key) != value:
            log.info("config: %s was %s, is %s", key, before.get(key), value)
    return model
