"""What the methods of a scheme need beside the weights, read or measured once for all of them."""

import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from composable.calibration import collect
from composable.calibration.batching import Texts
from composable.errors import UserError
from composable.formats.config import Scheme
from composable.formats.scores import Scores
from composable.methods import random
from composable.methods.base import Need
from composable.models.checkpoint import Checkpoint
from composable.variants import pruning
from composable.variants.pruning import Sources


@dataclass(frozen=True)
class Read:
    """Where evidence comes from.

    Attributes:
        data: see `calibration.collect.calibrate`, as for the next four.
        limit: the first so many samples.
        calibration: file of the statistics.
        memory_budget: bytes.
        device: where they are measured.
        scores: for the method ranked, of this model.
        gqa: how heads leave, which scores must agree with.
        seed: of the method random.
    """

    data: Any
    limit: int | None
    calibration: Path
    memory_budget: int
    device: str
    scores: Scores | None
    gqa: str
    seed: int


@dataclass(frozen=True)
class Measured:
    """Evidence for methods, what a report says of it, and what a bundle remembers."""

    sources: Sources
    facts: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


def measure(dense: Checkpoint, scheme: Scheme, needs: Collection[Need], read: Read) -> Measured:
    """Read or measure what the methods of a scheme need.

    Args:
        dense: the dense model.
        scheme: module -> entries.
        needs: see `pruning.needs`.
        read: where from.

    Raises:
        NoDataError: there are no texts.
        UserError: scores of heads that leave in another way; a calibration of other texts.
    """
    facts: dict[str, Any] = {}
    origin: dict[str, Any] = {}
    inputs = states = importance = None
    texts: tuple[Texts, ...] = ()
    if "scores" in needs and read.scores is not None:
        found, origin["scores"] = read.scores, _checked(read.scores, read.gqa)
        importance = lambda name: torch.from_numpy(found.importance(name))  # noqa: E731
    if "seed" in needs:
        origin["seed"] = read.seed
    if "inputs" in needs:
        calibration, texts = collect.calibrate(
            dense,
            read.calibration,
            read.data,
            read.limit,
            read.memory_budget,
            read.device,
            held_out=False,
        )
        inputs, facts = calibration.inputs, collect.facts_of(calibration)
    if "states" in needs:
        blocks = pruning.blocks_of(scheme)
        states = collect.block_moments(
            dense, blocks, read.data, read.limit, read.device, texts=texts
        )
    seeds = functools.partial(random.seed_of, read.seed)
    return Measured(Sources(inputs, states, importance, seeds), facts, origin)


def _checked(scores: Scores, gqa: str) -> dict[str, Any]:
    """Return what a bundle remembers of scores that it was made by."""
    origin = scores.origin
    measured = origin.options.get("gqa", gqa) if origin else gqa
    if measured != gqa:
        raise UserError(
            f"gqa {gqa}: the scores are of heads that leave {measured}; say the same here, or "
            "measure the scores again."
        )
    return {"method": origin.method, "options": dict(origin.options)} if origin else {}
