"""Depth pruning from Python: which layers of a model change little, and the model without them."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from composable import families
from composable.calibration.batching import GivenBatches, Texts
from composable.errors import ConfigError, UserError
from composable.formats.scores import Scores
from composable.models import in_memory, surgery
from composable.models.checkpoint import Checkpoint
from composable.models.export import record
from composable.models.structure import Edit, ordered
from composable.ranking import block_table as tables
from composable.ranking.base import origin_of
from composable.ranking.layer_choice import Choice
from composable.ranking.layer_distance import LAYER_DISTANCE, LayerDistanceOptions
from composable.reports.notebook import ShownScores
from composable.tasks.plain_texts import PlainTexts
from composable.tasks.samples import with_positions

log = logging.getLogger("composable")


def analyse(
    model: Any,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    distances: Sequence[str] | str = ("angular_all",),
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
        distances: names, see `linalg.state_distances`; the first is the main one.
        key: of the text.
        limit: the first so many samples (without a tokenizer: batches).
        max_length: tokens of a sample at most; by default 1,024, or fewer if the model has fewer
            positions.
        batch_size: samples of a batch; by default as many as are 2,048 tokens.
        largest: most layers of a block, for the distance linear_fit.

    Returns:
        Scores of every stack that the samples pass; of plain texts, the encoder's alone where there
        are two. They carry the fingerprint of the model, for which all of its weights are hashed,
        and are a picture in a notebook.

    Raises:
        UserError: unknown family or distance, no samples, a sample without tokens or text.
    """
    families.of(model)
    for name, value in (("limit", limit), ("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a number from 1.")
    if isinstance(dataset, str | Mapping):
        what = "one text" if isinstance(dataset, str) else "a dict, perhaps of splits"
        raise UserError(f"the calibration set is {what}; expected an iterable of samples.")
    names = (distances,) if isinstance(distances, str) else tuple(distances)
    options = LayerDistanceOptions(names, largest=largest, batch_size=batch_size)
    if not (some := list(islice(dataset, limit))):
        raise UserError("the calibration set is empty; give at least one sample.")
    dense = Checkpoint(model, tokenizer, {}, info={"max_length": max_length})
    texts = (
        GivenBatches([_batch(item, model) for item in some])
        if tokenizer is None
        else Texts(dense, PlainTexts.of([_text(item, key) for item in some]))
    )
    found = LAYER_DISTANCE.measure(dense, texts, options)
    origin = origin_of(LAYER_DISTANCE, in_memory.describe(model), texts, options)
    return ShownScores.of(replace(found, origin=origin))


def _text(item: Any, key: str) -> str:
    text = item if isinstance(item, str) else item.get(key) if isinstance(item, Mapping) else None
    if not isinstance(text, str):
        has = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise UserError(f'a sample has no text under the key "{key}" (it has {has}); give the key.')
    return text


def _batch(item: Any, model: Any) -> dict[str, Tensor]:
    """Complete a batch: a mask where there is none, positions where it is padded on the left."""
    if not isinstance(item, Mapping) or not all(isinstance(x, Tensor) for x in item.values()):
        raise UserError("samples are no batches of tensors; give a tokenizer with texts.")
    batch = dict(item)
    if "input_ids" in batch and batch["input_ids"].dim() == 1:  # a sample of a tokenised dataset
        batch = {name: tensor[None] for name, tensor in batch.items()}
    if "input_ids" in batch and "attention_mask" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return dict(with_positions(batch, model))


def best_cut(
    scores: Scores,
    count: int,
    *,
    stack: str | None = None,
    distance: str | None = None,
    policy: str = "block",
    protected: Collection[int] = (),
) -> list[int]:
    """Return the numbers of `count` layers that may go, see `layer_choice.Choice`."""
    choice = Choice(policy, scores, stack, distance, protected)
    return choice.layers(count, scores.blocks(stack).layers)


def block_table(
    scores: Scores,
    threshold: float | None = None,
    *,
    stack: str | None = None,
    distance: str | None = None,
) -> str:
    """Return the best block of every size, up to a distance of `threshold`, in Markdown."""
    return tables.as_markdown(list(tables.block_table(scores.blocks(stack, distance), threshold)))


def cut(
    model: Any, layers: Sequence[int], stack: str | None = None, scores: Scores | None = None
) -> Any:
    """Take layers out of a model for good, in place.

    Every config value that changes is logged, at level INFO of the logger "composable".

    Args:
        model: of transformers, of a supported family.
        layers: numbers in the model as it is now.
        stack: "encoder" or "decoder", where it has both.
        scores: by which the layers were chosen; the config keeps the distance, and the score of a
            block.

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
        used = scores.blocks(name)
        why["distance"] = used.distance
        if gone[-1] - gone[0] == len(gone) - 1:
            why["score"] = float(used.values[len(gone) - 1, gone[0]])
    record(model.config, name, gone, len(present), why)
    for key, value in model.config.to_dict().items():
        if before.get(key) != value:
            log.info("config: %s was %s, is %s", key, before.get(key), value)
    return model
