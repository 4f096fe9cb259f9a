"""What flows between the layers of a stack: states taken by hooks, and what is measured of them."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from composable.cli import shows_progress
from composable.errors import UserError
from composable.methods.layer_distance import LINEAR_FIT, Metric, Sums, Tokens
from composable.methods.linear_map import refit_residual
from composable.moments import eval_mode
from composable.solver import Gram, Regression, full_float32, regression_error
from composable.surgery import layer_lists

if TYPE_CHECKING:
    from composable.families import Family

log = logging.getLogger("composable")
Batch = Mapping[str, Tensor]
#: Tokens for each feature, for a linear map.
ENOUGH = 20
#: Numbers of two states of a stack: what enters layer `first`, what leaves layer `second` - 1.
Pair = tuple[int, int]


@dataclass(frozen=True)
class Reader:
    """Runs a model and reads the states of its stacks.

    Attributes:
        model: dense; where its parts lie, also on several devices, they are left.
        family: of the model.
        stacks: name -> its layers.
    """

    model: Any
    family: "Family"
    stacks: Mapping[str, nn.ModuleList]

    @classmethod
    def of(cls, model: Any, family: "Family") -> "Reader":
        """Find the stacks of a model."""
        return cls(model, family, layer_lists(model, family))

    @property
    def device(self) -> torch.device:
        """Where batches go; parts that are elsewhere fetch what they need by themselves."""
        device: torch.device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    def masks(self, batch: Batch) -> dict[str, Tensor]:
        """Mark the real tokens of every stack that a batch passes: (batch, length), bool."""
        return self.family.valid_tokens(self.model, batch)

    def read(self, batch: Batch, index: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Run a batch.

        Args:
            batch: from a collator.
            index: stack -> positions of tokens in the flattened batch.

        Returns:
            Stack -> what enters layer 0 and what leaves each layer: (tokens, features) each.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in index}
        with ExitStack() as hooks:
            for name, places in index.items():
                layers = self.stacks[name]
                hooks.callback(layers[0].register_forward_pre_hook(
                    _before(found[name], places), with_kwargs=True).remove)  # fmt: skip
                for layer in layers:
                    hook = layer.register_forward_hook(_after(found[name], places))
                    hooks.callback(hook.remove)
            moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with torch.inference_mode(), full_float32(self.device), eval_mode(self.model):
                self.family.run(self.model, moved)
        return found

    def without(self, stack: str, layers: Collection[int]) -> AbstractContextManager[ExitStack]:
        """Let some layers of a stack pass on their input, as if they were gone."""
        hooks = ExitStack()
        for layer in layers:
            # before those of `read`, which see what this one returns
            handle = self.stacks[stack][layer].register_forward_hook(_bypass, with_kwargs=True)
            hooks.callback(handle.remove)
        return hooks


def _bypass(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return states if isinstance(output, Tensor) else (states, *output[1:])


def _take(states: Tensor, places: Tensor) -> Tensor:
    return states.flatten(0, 1)[places.to(states.device)]


def _before(found: list[Tensor], places: Tensor) -> Any:
    def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(_take(args[0] if args else kwargs["hidden_states"], places))

    return hook


def _after(found: list[Tensor], places: Tensor) -> Any:
    def hook(layer: nn.Module, args: Any, output: Any) -> None:
        found.append(_take(output if isinstance(output, Tensor) else output[0], places))

    return hook


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


def moments(
    reader: Reader, batches: Sequence[Batch], pairs: Mapping[str, Sequence[Pair]]
) -> dict[tuple[str, Pair], Regression]:
    """Sum the moments of states a and of what is added to them until b, over all real tokens.

    Args:
        reader: of the model.
        batches: from a collator.
        pairs: stack -> which states are a and b.

    Returns:
        (stack, pair) -> moments with the inputs a and the targets b - a; those of one a share them.
    """
    grams: dict[tuple[str, int], Gram] = {}
    found: dict[tuple[str, Pair], Regression] = {}
    for batch in _bar(batches, "moments"):
        masks = reader.masks(batch)
        index = {name: masks[name].flatten().nonzero()[:, 0] for name in pairs if name in masks}
        for name, states in reader.read(batch, index).items():
            for first in dict.fromkeys(pair[0] for pair in pairs[name]):
                a = states[first].float()
                if (name, first) not in grams:
                    grams[name, first] = Gram.zeros(a.shape[1], a.device)
                gram = grams[name, first]
                gram.add(a)
                for pair in (pair for pair in pairs[name] if pair[0] == first):
                    if (name, pair) not in found:
                        found[name, pair] = Regression.of(gram, a.shape[1])
                    found[name, pair].add_targets(a, states[pair[1]].to(a) - a)
    return found


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


def _bar(batches: Sequence[Batch], what: str) -> Any:
    return tqdm(batches, what, unit="batch", disable=not shows_progress())
