"""Layer distance: how much every block of layers changes its input, measured in one pass."""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from composable.calibration.batching import Texts
from composable.calibration.layer_states import ENOUGH, Batch, Reader, moments
from composable.errors import ConfigError, UserError
from composable.formats.scores import BlockDistances, Order, Scores
from composable.linalg.solver import regression_error
from composable.linalg.state_distances import LINEAR_FIT, Distance, Sums, Tokens
from composable.methods.linear_map import refit_residual
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import layer_paths
from composable.progress import Stage
from composable.ranking.base import Ranker
from composable.ranking.layer_choice import check_protected

log = logging.getLogger("composable")
BUDGET = 2 * 1024**3


@dataclass(frozen=True)
class LayerDistanceOptions:
    """Options of the ranker layer_distance.

    Attributes:
        distances: names, see `linalg.state_distances`; the first is the main one.
        iterative: let so many layers go one by one, by the main distance; None: none.
        stack: whose layers go one by one; None where there is one stack alone.
        protect: numbers of the layers that stay then.
        largest: most layers of a block by linear_fit; None: all.
        memory_budget: bytes for the moments of linear_fit; None: `BUDGET`.
        batch_size: samples of a batch; None: as many as have tokens for one.
    """

    distances: Sequence[str] = ("angular_all",)
    iterative: int | None = None
    stack: str | None = None
    protect: Sequence[int] = ()
    largest: int | None = None
    memory_budget: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown names, and what would have no effect.

        Raises:
            UserError: there is one.
        """
        for name in self.distances:
            Distance.parse(name)
        for name in ("largest", "memory_budget"):
            value = getattr(self, name)
            if value is not None and LINEAR_FIT not in self.distances:
                raise UserError(f"{name} is {value}, but only {LINEAR_FIT} has it; leave it out.")


def _measure(dense: Checkpoint, texts: Texts | None, options: LayerDistanceOptions) -> Scores:
    assert texts is not None  # it reads them
    wanted = [Distance.parse(name) for name in dict.fromkeys(options.distances)]
    reader = Reader(dense.model, dense.family)
    batches = texts.batches(reader.device, options.batch_size)
    removing = _removing(reader, batches, wanted, options)
    budget = options.memory_budget or BUDGET
    found = measure(reader, batches, wanted, options.largest, budget)
    if removing is None:
        return Scores(distances=found)
    paths = layer_paths(dense.model, dense.family)
    order, scores = removing.order(batches)
    names, protected = (
        [f"{paths[removing.stack]}.{layer}" for layer in layers]
        for layers in (order, sorted(removing.protected))
    )
    return Scores(distances=found, orders=[Order(names, scores, removing.distance.name, protected)])


def measure(
    reader: Reader,
    batches: Sequence[Batch],
    distances: Sequence[Distance],
    largest: int | None = None,
    budget: int = BUDGET,
) -> list[BlockDistances]:
    """Measure all blocks of all stacks by several distances, in one pass.

    `LINEAR_FIT` alone takes a pass of its own, and more where its moments do not fit the budget.

    Args:
        reader: of the model.
        batches: from a collator; padding on either side.
        distances: what to measure.
        largest: most layers of a block, for `LINEAR_FIT`; others always take all.
        budget: bytes for the moments of `LINEAR_FIT`.

    Returns:
        Stack by stack, the distances in the order given.

    Raises:
        UserError: a sample has no real token; a state is not finite; no sample is long enough for a
            distance; nothing to measure.
    """
    if not distances:
        raise UserError("no distance was asked for; name at least one.")
    of_tokens = [one for one in distances if one.formula != LINEAR_FIT]
    found = {
        (name, distance.name): BlockDistances(name, distance.name, values.numpy(), count)
        for name, total in _sums(reader, batches, of_tokens).items()
        for distance, values, count in zip(of_tokens, total.results(), total.counts, strict=True)
    }
    for distance in distances:
        if distance.formula == LINEAR_FIT:
            for one in _fit_errors(reader, batches, distance, largest, budget):
                found[one.stack, one.distance] = one
    names = dict.fromkeys(stack for stack, _ in found)
    ordered = [found[name, distance.name] for name in names for distance in distances]
    for one in ordered:
        _check(one)
    return ordered


def _sums(
    reader: Reader, batches: Sequence[Batch], distances: Sequence[Distance]
) -> dict[str, Sums]:
    """Add up the distances of every stack, in one pass."""
    sums: dict[str, Sums] = {}
    for batch in Stage(batches, "measure", unit="batches") if distances else ():
        masks = reader.masks(batch)
        places = {name: Tokens.of(mask, distances) for name, mask in masks.items()}
        read = reader.read(batch, {name: found.index for name, found in places.items()})
        for name, states in read.items():
            total = sums.setdefault(name, Sums(distances, len(reader.stacks[name])))
            total.add(states, places[name])
    return sums


def _check(one: BlockDistances) -> None:
    if one.samples == 0:
        raise UserError(
            f"{one.distance}: no sample of the calibration set has so many {one.stack} tokens; "
            "take longer ones, or another token."
        )
    rows, columns = np.indices(one.values.shape)
    used = one.values[rows + columns < one.layers]
    if one.distance != LINEAR_FIT and not np.isfinite(used).all():
        raise UserError(
            f"{one.distance}: distances between {one.stack} states are not finite; check the "
            "model's weights and the number type it runs in."
        )


@dataclass(frozen=True)
class Removing:
    """How layers leave one by one: the one that changes its input least, then again without it.

    Attributes:
        reader: of the model.
        distance: any but `LINEAR_FIT`.
        stack: whose layers.
        count: how many go.
        protected: layers that stay.

    Raises:
        UserError: so many cannot go.
    """

    reader: Reader
    distance: Distance
    stack: str
    count: int
    protected: Collection[int] = ()

    def __post_init__(self) -> None:
        layers = len(self.reader.stacks[self.stack])
        most = layers - max(1, len(set(self.protected)))
        if not 1 <= self.count <= most or self.distance.formula == LINEAR_FIT:
            raise UserError(
                f"iterative is {self.count}, by {self.distance.name}: expected 1 to {most} of the "
                f"{self.stack}'s {layers} layers, and another distance than {LINEAR_FIT}."
            )

    def order(self, batches: Sequence[Batch]) -> tuple[list[int], list[float]]:
        """Measure.

        Returns:
            Numbers of the layers in the order in which they go, and the distance of each then.
        """
        gone: list[int] = []
        scores: list[float] = []
        for _ in range(self.count):
            left = [i for i in range(len(self.reader.stacks[self.stack])) if i not in gone]
            values = self._singles(batches, gone, left)
            able = [place for place, layer in enumerate(left) if layer not in self.protected]
            best = min(able, key=lambda place: float(values[place]))
            gone.append(left[best])
            scores.append(float(values[best]))
        return gone, scores

    def _singles(self, batches: Sequence[Batch], gone: list[int], left: list[int]) -> Tensor:
        """Distances of the layers that are left."""
        sums = Sums([self.distance], len(left))
        with self.reader.without(self.stack, gone):
            for batch in Stage(batches, f"without {len(gone)} layers", unit="batches"):
                tokens = Tokens.of(self.reader.masks(batch)[self.stack], [self.distance])
                states = self.reader.read(batch, {self.stack: tokens.index})[self.stack]
                sums.add([states[0], *(states[layer + 1] for layer in left)], tokens)
        return sums.results()[0][0]


def _fit_errors(
    reader: Reader, batches: Sequence[Batch], distance: Distance, largest: int | None, budget: int
) -> Iterator[BlockDistances]:
    """Yield ln of the mean squared residual of the best linear map from a to b, stack by stack."""
    masks = reader.masks(batches[0])
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    for name in masks:
        layers, width = len(reader.stacks[name]), reader.model.config.hidden_size
        values = torch.full((layers, layers), torch.nan, dtype=torch.float64)
        reach = min(largest or layers, layers)
        size = 8 * width**2 * (reach + 1)  # the inputs of a start, and every block from there
        at_once = max(1, budget // size)
        count = 0
        for begin in range(0, layers, at_once):
            pairs = [
                (first, last)
                for first in range(begin, min(begin + at_once, layers))
                for last in range(first + 1, min(first + reach, layers) + 1)
            ]
            for (_, (first, last)), found in moments(reader, batches, {name: pairs}).items():
                weight, bias = refit_residual(found)
                count = found.inputs.count
                error = regression_error(found, weight, bias) / (count * width)
                values[last - first - 1, first] = math.log(max(error, 1e-300))
        if count < ENOUGH * width:
            log.warning(
                "%s: %d tokens for states of width %d: with less than %d for each feature the fit "
                "is better on these texts than on others; take more text.",
                *(distance.name, count, width, ENOUGH),
            )
        yield BlockDistances(name, distance.name, values.numpy(), samples)


def _removing(
    reader: Reader,
    batches: Sequence[Batch],
    distances: Sequence[Distance],
    options: LayerDistanceOptions,
) -> Removing | None:
    """Check before the first pass which layers are to go one by one.

    Raises:
        ConfigError: a protected layer does not exist, or is given where no layer goes.
        UserError: so many layers cannot go; two stacks leave open which one is meant, or there is
            no such stack.
    """
    if options.iterative is None:
        if options.stack or options.protect:
            raise ConfigError("stack and protect say which layers go one by one; give iterative.")
        return None
    names, stack = list(reader.masks(batches[0])), options.stack
    if stack is None and len(names) > 1:
        raise UserError(f"the model has {' and '.join(names)}; name one of them as the stack.")
    if stack is not None and stack not in names:
        raise UserError(f"stack {stack}: only the {' and '.join(names)} is measured here.")
    name = stack or names[0]
    check_protected(options.protect, len(reader.stacks[name]))
    return Removing(reader, distances[0], name, options.iterative, options.protect)


LAYER_DISTANCE = Ranker(
    name="layer_distance",
    reference="Gromov et al. 2024 (arXiv 2403.17887), Men et al. 2024 (arXiv 2403.03853)",
    measure=_measure,
    options=LayerDistanceOptions,
    reads_texts=True,
)
