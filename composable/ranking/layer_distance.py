"""Layer distance: how much every block of layers changes its input, measured in one pass."""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from composable.calibration.layer_states import ENOUGH, Batch, Reader, _bar, moments
from composable.errors import ConfigError, UserError
from composable.formats.scores_file import Distances, Removal, Scores
from composable.linalg.solver import regression_error
from composable.linalg.state_distances import LINEAR_FIT, Metric, Sums, Tokens
from composable.methods.linear_map import refit_residual
from composable.ranking import layer_distance
from composable.ranking.layer_choice import check_protected

if TYPE_CHECKING:
    pass

log = logging.getLogger("composable")


@dataclass(frozen=True)
class Measured:
    """Distances in one stack by one metric.

    Attributes:
        stack: "encoder" or "decoder".
        metric: name.
        values: (layers, layers) float64 by block size - 1 and first layer; NaN where there is none.
        samples: that it was taken of.
        tokens: real ones of all samples.
    """

    stack: str
    metric: str
    values: Tensor
    samples: int
    tokens: int


def measure(
    reader: Reader,
    batches: Sequence[Batch],
    metrics: Sequence[Metric],
    largest: int | None = None,
    budget: int = 2 * 1024**3,
) -> list[Measured]:
    """Measure all blocks of all stacks by several metrics, in one pass.

    `LINEAR_FIT` alone takes a pass of its own, and more where its moments do not fit the budget.

    Args:
        reader: of the model.
        batches: from a collator; padding on either side.
        metrics: what to measure.
        largest: most layers of a block, for `LINEAR_FIT`; others always take all.
        budget: bytes for the moments of `LINEAR_FIT`.

    Returns:
        Stack by stack, the metrics in the order given.

    Raises:
        UserError: a sample has no real token; a state is not finite; no sample is long enough for a
            metric; nothing to measure.
    """
    if not metrics:
        raise UserError("no metric was asked for; name at least one.")
    plain = [metric for metric in metrics if metric.formula != LINEAR_FIT]
    sums: dict[str, Sums] = {}
    tokens: dict[str, int] = {}
    for batch in _bar(batches, "measure") if plain else ():
        masks = reader.masks(batch)
        places = {name: Tokens.of(mask, plain) for name, mask in masks.items()}
        read = reader.read(batch, {name: found.index for name, found in places.items()})
        for name, states in read.items():
            sums.setdefault(name, Sums(plain, len(reader.stacks[name]))).add(states, places[name])
            tokens[name] = tokens.get(name, 0) + int(masks[name].sum())
    found = {
        (name, metric.name): Measured(name, metric.name, values, count, tokens[name])
        for name, total in sums.items()
        for metric, values, count in zip(plain, total.results(), total.counts, strict=True)
    }
    for metric in metrics:
        if metric.formula == LINEAR_FIT:
            found |= {(one.stack, one.metric): one
                      for one in _fit_errors(reader, batches, metric, largest, budget)}  # fmt: skip
    names = dict.fromkeys(stack for stack, _ in found)
    ordered = [found[name, metric.name] for name in names for metric in metrics]
    for one in ordered:
        _check(one)
    return ordered


def _check(one: Measured) -> None:
    if one.samples == 0:
        raise UserError(
            f"{one.metric}: no sample of the calibration set has so many {one.stack} tokens; take "
            "longer ones, or another token."
        )
    used = ~torch.ones_like(one.values).tril(-1).flip(1).bool()
    if one.metric != LINEAR_FIT and not bool(torch.isfinite(one.values[used]).all()):
        raise UserError(
            f"{one.metric}: distances between {one.stack} states are not finite; check the model's "
            "weights and the number type it runs in."
        )


@dataclass(frozen=True)
class Removing:
    """How layers leave one by one: the one that changes its input least, then again without it.

    Attributes:
        reader: of the model.
        metric: any but `LINEAR_FIT`.
        stack: whose layers.
        count: how many go.
        protected: layers that stay.

    Raises:
        UserError: so many cannot go.
    """

    reader: Reader
    metric: Metric
    stack: str
    count: int
    protected: Collection[int] = ()

    def __post_init__(self) -> None:
        layers = len(self.reader.stacks[self.stack])
        most = layers - max(1, len(set(self.protected)))
        if not 1 <= self.count <= most or self.metric.formula == LINEAR_FIT:
            raise UserError(
                f"--iterative {self.count} by {self.metric.name}: expected 1 to {most} of the "
                f"{self.stack}'s {layers} layers, and another metric than {LINEAR_FIT}."
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
        sums = Sums([self.metric], len(left))
        with self.reader.without(self.stack, gone):
            for batch in _bar(batches, f"without {len(gone)} layers"):
                tokens = Tokens.of(self.reader.masks(batch)[self.stack], [self.metric])
                states = self.reader.read(batch, {self.stack: tokens.index})[self.stack]
                sums.add([states[0], *(states[layer + 1] for layer in left)], tokens)
        return sums.results()[0][0]


def _fit_errors(
    reader: Reader, batches: Sequence[Batch], metric: Metric, largest: int | None, budget: int
) -> Iterator[Measured]:
    """Yield ln of the mean squared residual of the best linear map from a to b, stack by stack."""
    masks = reader.masks(batches[0])
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    for name in masks:
        layers, width = len(reader.stacks[name]), reader.model.config.hidden_size
        values = torch.full((layers, layers), torch.nan, dtype=torch.float64)
        starts = list(range(layers))
        reach = min(largest or layers, layers)
        size = 8 * width**2 * (reach + 1)  # the inputs of a start, and every block from there
        at_once = max(1, budget // size)
        count = 0
        for begin in range(0, layers, at_once):
            pairs = [
                (first, last)
                for first in starts[begin : begin + at_once]
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
                *(metric.name, count, width, ENOUGH),
            )
        yield Measured(name, metric.name, values, samples, count)


def removing(
    reader: Reader,
    batches: Sequence[Batch],
    metric: Metric,
    stack: str | None,
    count: int | None,
    protected: Collection[int],
) -> Removing | None:
    """Check before the first pass what `--iterative` asks for.

    Raises:
        ConfigError: a protected layer does not exist; options without --iterative.
        UserError: so many layers cannot go; two stacks leave open which one is meant.
    """
    if count is None:
        if stack or protected:
            raise ConfigError("--stack and --protect need --iterative N; add it, or leave them.")
        return None
    names = list(reader.masks(batches[0]))
    if stack is None and len(names) > 1:
        raise UserError(f"the model has {' and '.join(names)}; say which with --stack.")
    if stack is not None and stack not in names:
        raise UserError(f"--stack {stack}: only the {' and '.join(names)} is measured here.")
    name = stack or names[0]
    check_protected(protected, len(reader.stacks[name]))
    return Removing(reader, metric, name, count, protected)


def removal(asked: Removing, batches: Sequence[Batch]) -> Removal:
    """Measure the order in which layers go."""
    order, scores = asked.order(batches)
    return Removal(asked.stack, order, scores, asked.metric.name, sorted(asked.protected))


def scores_of(
    found: Sequence[layer_distance.Measured], model: str = "", fingerprint: str = ""
) -> Scores:
    """Turn what was measured into what is stored."""
    distances = [Distances(x.stack, x.metric, x.values.numpy(), x.samples) for x in found]
    return Scores(distances, model=model, fingerprint=fingerprint)
