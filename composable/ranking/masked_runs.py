"""Runs of a dense model with units masked: from their layer on, many at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from composable.families import Module
from composable.linalg.manifold import normalized
from composable.models.checkpoint import Checkpoint
from composable.ranking.base import unit_modules
from composable.tasks.losses import output_of

Batch = dict[str, Tensor]
#: What a padded place of a question's logits gets: nothing of the probability.
NEVER = -1e4


@dataclass(frozen=True)
class Layer:
    """A layer, and its attentions and ffn in the order in which they run."""

    path: str
    stack: str
    modules: tuple[Module, ...]


@dataclass
class DenseRun:
    """What the dense model makes of one batch.

    Attributes:
        batch: on the model's device.
        rows: stack -> places of the tokens that count in the flattened batch.
        leaving: path of a layer -> its states, (batch, length, width).
        features: of every ffn's output that is compared, (tokens, width), of length 1; by number
            in the trajectory.
        answers: logits, (rows, classes).
        rests: what layers, and what stands for attentions, return beside their states.
    """

    batch: Batch
    rows: dict[str, Tensor]
    leaving: dict[str, Tensor]
    features: list[Tensor]
    answers: Tensor
    rests: dict[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Inside:
    """What flows through the modules of one layer in the dense model, on one batch.

    Attributes:
        inputs: name of a module -> what enters its output linear, (tokens, units * size).
        outputs: name of a module -> what leaves that, as it left.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class MaskedRuns:
    """Runs a dense model as if some units gave 0.

    What a unit adds is a product of two things that are known, its inputs to the output linear of
    its module and the columns that read them. So a masked module needs no run of its own, and
    nothing before it; only what comes after it runs, for many units side by side.

    Args:
        dense: the dense model, in float32, in eval mode and where it should run.
        batches: from a collator.
        include_pads: whether padding counts like real tokens.

    Attributes:
        layers: in the order in which they run; the encoder's come before the decoder's.
        runs: what the dense model makes of every batch.
        features: number of every layer's ffn in the trajectory, by path of the layer.
    """

    def __init__(
        self, dense: Checkpoint, batches: Sequence[Mapping[str, Tensor]], include_pads: bool = False
    ) -> None:
        self.model: Any = dense.model
        self.family = dense.family
        self.include_pads = include_pads
        device = next(self.model.parameters()).device
        self._batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        self.layers = self._layers(dense)
        self.features = {
            layer.path: number
            for number, layer in enumerate(it for it in self.layers if _ffn(it) is not None)
        }
        self.runs = [self._dense_run(batch) for batch in self._batches]

    def tokens(self, number: int) -> int:
        """Tokens whose features of a number are compared."""
        return sum(len(run.features[number]) for run in self.runs)

    def _layers(self, dense: Checkpoint) -> list[Layer]:
        """Find the layers that a batch passes, and the order of what is in them."""
        order: list[str] = []
        known = {module.name: module for module in unit_modules(dense)}
        with ExitStack() as hooks:
            for name, module in known.items():
                linear = self.model.get_submodule(module.output_path)
                hook = linear.register_forward_hook(lambda *_, name=name: order.append(name))
                hooks.enter_context(hook)
            output_of(self.model, _rows(self._batches[-1], 1))
        found: dict[str, list[Module]] = {}
        for name in order:
            place = self.family.place(name)
            assert place is not None  # modules lie in layers
            found.setdefault(place[1], []).append(known[name])
        return [Layer(path, inner[0].stack, tuple(inner)) for path, inner in found.items()]

    def _dense_run(self, batch: Batch) -> DenseRun:
        masks = self.family.valid_tokens(self.model, batch)
        if self.include_pads:
            masks = {stack: torch.ones_like(mask) for stack, mask in masks.items()}
        rows = {stack: mask.flatten().nonzero()[:, 0] for stack, mask in masks.items()}
        run = DenseRun(batch, rows, {}, [], torch.empty(0), {})

        def keep(path: str, output: Any) -> None:
            run.leaving[path] = _first(output).clone()

        def keep_rest(module: nn.Module, _: Any, output: Any) -> None:
            run.rests[module] = () if isinstance(output, Tensor) else tuple(output[1:])

        with ExitStack() as hooks:
            for module in self._returning:
                hooks.enter_context(module.register_forward_hook(keep_rest))
            for layer in self.layers:
                hook = self.model.get_submodule(layer.path).register_forward_hook(
                    lambda _, __, output, path=layer.path: keep(path, output)
                )
                hooks.enter_context(hook)
            features = self._watched(hooks, range(len(self.features)), run, 1)
            run.answers = self._answers(batch, rows, 1)[0]
        run.features = [normalized(features[number][0]) for number in range(len(self.features))]
        return run

    def inside(self, run: DenseRun, layer: Layer) -> Inside:
        """Measure what flows through the modules of a layer."""
        found = Inside({}, {})

        def keep(name: str, args: Any, output: Tensor) -> None:
            found.inputs[name] = args[0].reshape(-1, args[0].shape[-1]).clone()
            found.outputs[name] = output.clone()

        with ExitStack() as hooks:
            for module in layer.modules:
                hook = self.model.get_submodule(module.output_path).register_forward_hook(
                    lambda _, args, output, name=module.name: keep(name, args, output)
                )
                hooks.enter_context(hook)
            output_of(self.model, run.batch)
        return found

    def masked(
        self,
        run: DenseRun,
        layer: Layer,
        module: Module,
        inside: Inside,
        columns: Tensor,
        wanted: Sequence[int],
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Run what comes after masked units, each by itself.

        Args:
            run: of the dense model.
            layer: where the units are.
            module: whose units.
            inside: of the layer, on the same batch.
            columns: (copies, k): inputs of the module's output linear that are 0 in each copy of
                the model.
            wanted: numbers of features in the trajectory.

        Returns:
            Number -> features (copies, tokens, width), of length 1; and logits
            (copies, rows, classes).
        """
        copies = len(columns)
        batch = {name: _tiled(tensor, copies) for name, tensor in run.batch.items()}
        samples = len(next(iter(run.batch.values())))
        rests = {one: partial(_rest_of, rest, samples, copies) for one, rest in run.rests.items()}
        output = inside.outputs[module.name]
        weight = self.model.get_submodule(module.output_path).weight
        lost = inside.inputs[module.name][:, columns].transpose(0, 1) @ weight.T[columns]
        changed = (output.reshape(1, -1, output.shape[-1]) - lost).view(-1, *output.shape[1:])
        forwards = self._skipping(run, layer, copies, rests)
        for one in layer.modules[: layer.modules.index(module)]:
            given = _tiled(inside.outputs[one.name], copies)
            forwards |= self._giving(one, given, rests)
        forwards |= self._giving(module, changed, rests)
        with ExitStack() as stack:
            stack.enter_context(replaced(forwards))
            features = self._watched(stack, wanted, run, copies)
            answers = self._answers(batch, run.rows, copies)
        return {number: normalized(one) for number, one in features.items()}, answers

    @cached_property
    def _returning(self) -> list[nn.Module]:
        """Layers, and what stands for an attention, see `_giving`."""
        paths = [layer.path for layer in self.layers]
        paths += [
            ".".join(filter(None, (module.name, self.family.core)))
            for layer in self.layers
            for module in layer.modules
            if module.kind == "attention"
        ]
        return [self.model.get_submodule(path) for path in paths]

    def _skipping(self, run: DenseRun, layer: Layer, copies: int, rests: Any) -> dict[Any, Any]:
        """Let the layers before one return what the dense model has there."""
        before = self.layers[: self.layers.index(layer)]
        last = {one.stack: one.path for one in before}
        states = {stack: _tiled(run.leaving[path], copies) for stack, path in last.items()}
        found = {}
        for one in before:
            module = self.model.get_submodule(one.path)
            found[module] = _constant(states[one.stack], rests[module])
        return found

    def _giving(self, module: Module, output: Tensor, rests: Any) -> dict[Any, Any]:
        """Let a module give an output, and compute nothing before it."""
        holder = self.model.get_submodule(module.holder)
        if module.kind == "ffn":
            nothing = output.new_zeros(0)
            return {
                holder.get_submodule(child): _constant(
                    output if child == module.output else nothing
                )
                for _, child in module.parts
            }
        if not self.family.core:
            return {holder: _constant(output, rests[holder])}
        core = holder.get_submodule(self.family.core)
        return {
            core: _constant(output.new_zeros(0), rests[core]),
            holder.get_submodule(module.output): _constant(output),
        }

    def _watched(
        self, hooks: ExitStack, wanted: Sequence[int], run: DenseRun, copies: int
    ) -> dict[int, Tensor]:
        """Collect ffn outputs as the model runs: (copies, tokens, width)."""
        found: dict[int, Tensor] = {}

        def keep(number: int, rows: Tensor, output: Tensor) -> None:
            found[number] = output.reshape(copies, -1, output.shape[-1])[:, rows]

        for layer in self.layers:
            number, ffn = self.features.get(layer.path), _ffn(layer)
            if number in wanted and ffn is not None:
                rows = run.rows[layer.stack]
                hook = self.model.get_submodule(ffn.output_path).register_forward_hook(
                    lambda _, __, output, n=number, rows=rows: keep(n, rows, output)
                )
                hooks.enter_context(hook)
        return found

    def _answers(self, batch: Batch, rows: Mapping[str, Tensor], copies: int) -> Tensor:
        """Run a batch: logits (copies, rows, classes) of its tokens, samples or spans."""
        head = _vocabulary(self.model)
        if head is None:
            output = output_of(self.model, batch)
            if "start_logits" not in output:
                return output.logits.reshape(copies, -1, output.logits.shape[-1])
            masks = self.family.valid_tokens(self.model, batch)[self.layers[-1].stack]
            sides = torch.stack([output.start_logits, output.end_logits], 1)
            sides = sides.masked_fill(~masks[:, None], NEVER)
            return sides.reshape(copies, -1, sides.shape[-1])
        own = rows[self.layers[-1].stack]
        places = torch.arange(copies, device=own.device)[:, None]

        def only(_: Any, args: Any) -> tuple[Tensor]:
            flat = args[0].flatten(0, 1)
            return (flat[(places * (len(flat) // copies) + own).flatten()],)

        with head.register_forward_pre_hook(only):
            logits = output_of(self.model, batch).logits
        return logits.reshape(copies, len(own), -1)


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute something else for the time being."""
    before: dict[nn.Module, Any] = {it: vars(it).get("forward") for it in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:  # of a library that had wrapped it
                module.forward = own  # type: ignore[method-assign]


def _constant(states: Tensor, rest: Callable[[], tuple[Any, ...]] = tuple) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        more = rest()
        return (states, *more) if more else states

    return forward


def _rest_of(rest: tuple[Any, ...], samples: int, copies: int) -> tuple[Any, ...]:
    """Repeat what belongs to samples: attention weights, or biases of positions with padding."""
    return tuple(
        _tiled(one, copies)
        if isinstance(one, Tensor) and one.dim() and len(one) == samples
        else one
        for one in rest
    )


def _first(output: Any) -> Tensor:
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _ffn(layer: Layer) -> Module | None:
    return next((module for module in layer.modules if module.kind == "ffn"), None)


def _tiled(states: Tensor, copies: int) -> Tensor:
    return states.repeat(copies, *[1] * (states.dim() - 1))


def _rows(batch: Batch, count: int) -> dict[str, Tensor]:
    return {name: tensor[:count] for name, tensor in batch.items()}


def _vocabulary(model: Any) -> Any:
    """Return the projection to the vocabulary; None for other heads."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None
