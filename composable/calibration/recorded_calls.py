"""Calls of a dense model's modules, recorded so that variants can train without the model."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from composable.calibration.second_moments import eval_mode
from composable.families import Family, Module
from composable.linalg import kernels
from composable.linalg.grams import Regression
from composable.models.checkpoint import Checkpoint
from composable.progress import Stage

#: Batches of the training texts and of the held-out texts, from a collator.
Batches = tuple[Sequence[Mapping[str, Tensor]], Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Valid:
    """Which tokens of a batch are real.

    Attributes:
        padding: (batch, length, 1), True where a token is padding; None where none is.
        tokens: number of real tokens.
    """

    padding: Tensor | None
    tokens: int

    @classmethod
    def of(cls, mask: Tensor) -> "Valid":
        """Make it of a mask (batch, length), True where a token is real."""
        tokens = int(mask.sum())
        return cls(None if tokens == mask.numel() else ~mask[..., None], tokens)

    def rows(self, states: Tensor) -> Tensor:
        """Take the real tokens of (batch, length, features), flat or not: (tokens, features)."""
        flat = states.flatten(0, -2)
        return flat if self.padding is None else flat[~self.padding.flatten()]


@dataclass(frozen=True)
class Call:
    """One call of a dense module, as its variants can take it.

    What an ffn makes of a token depends on no other, so its calls are real tokens alone, as flat
    (tokens, features).

    Attributes:
        args: positional arguments.
        kwargs: named ones; their tensors may be shared with the calls of other modules.
        target: the dense output, (batch, length, features) or flat.
        valid: its real tokens.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    valid: Valid

    def difference(self, output: Tensor) -> Tensor:
        """Subtract the dense output from a variant's, of the same shape; 0 in padding."""
        difference = output - self.target
        if self.valid.padding is not None:
            # not a product: what a variant makes of padding may be no number
            difference.masked_fill_(self.valid.padding, 0.0)
        return difference

    def sizes(self) -> dict[int, int]:
        """Bytes of every tensor, by its address."""
        found: list[Tensor] = [self.target]
        _each_tensor(found.append, (self.args, self.kwargs))
        return {tensor.data_ptr(): tensor.nbytes for tensor in found}


@dataclass(frozen=True)
class RecordedModule:
    """A dense attention or ffn and what it was called with.

    Attributes:
        module: its description.
        train: its calls on the training texts; a step of a training takes one.
        held_out: its calls on the held-out texts.
        seconds: its part of the time that the recording took.
    """

    module: Module
    train: list[Call]
    held_out: list[Call]
    seconds: float


def watch(
    model: nn.Module,
    family: Family,
    module: Module,
    see: Callable[[tuple[Any, ...], dict[str, Any], Tensor], None],
    store: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[RemovableHandle]:
    """Let a function see what enters a module and what comes out, whenever a model has run it.

    Args:
        model: the model.
        family: of the model.
        module: one of its modules.
        see: gets positional and named arguments, as a variant takes them, and the output of the
            module's last linear: what follows may be the layer's.
        store: applied to each of these tensors at once, before the model goes on.

    Returns:
        What removes the hooks.
    """
    holder = last = model.get_submodule(module.holder)
    call: dict[str, Any] = {}
    hooks = []
    if module.parts:
        last = holder.get_submodule(module.output)
        hooks.append(last.register_forward_hook(lambda _, __, out: call.update(output=store(out))))
    if module.kind == "ffn":  # its linears may lie among others: from the first to the last
        first = holder.get_submodule(module.part("up"))
        hooks.append(
            first.register_forward_pre_hook(
                lambda _, *inputs: call.update(inputs=_each_tensor(store, inputs)), with_kwargs=True
            )
        )

    def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.kind == "attention":
            args, kwargs = _each_tensor(store, family.replayed(args, kwargs, output))
        elif module.kind == "ffn":
            args, kwargs = call["inputs"]
        see(tuple(args), kwargs, call["output"] if module.parts else output)

    ends = last if module.kind == "ffn" else holder
    return [*hooks, ends.register_forward_hook(end, with_kwargs=True)]


class _AllSeen(Exception):
    """Ends a pass of which no more is wanted."""


def record_calls(
    model: nn.Module,
    family: Family,
    modules: Sequence[Module],
    batch: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
) -> dict[str, Call]:
    """Run the dense model on one batch, up to the last of some modules, and record their calls.

    What several modules are given, such as masks, the position bias and the other stack's
    states, is stored once. All is copied, for a model may go on working on its tensors in place.

    Args:
        model: the dense model, in eval mode.
        family: of the model.
        modules: attentions and ffns; each runs once in a pass.
        batch: from a collator, on the model's device.
        valid: stack -> real tokens (batch, length), bool.

    Returns:
        Name of the module -> its call.
    """
    calls: dict[str, Call] = {}
    stored: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    real = {stack: Valid.of(mask) for stack, mask in valid.items()}

    def store(tensor: Tensor) -> Tensor:
        """Copy a tensor, or find the copy that another module's call has."""
        # the version counts changes in place; the source is held, so that no address comes twice
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in stored:
            stored[key] = tensor, tensor.detach().clone()
        return stored[key][1]

    def see(module: Module, args: Any, kwargs: Any, output: Tensor) -> None:
        valid = real[module.stack]
        if module.kind == "ffn":
            args, kwargs, output = _each_tensor(valid.rows, (args, kwargs, output))
            valid = Valid(None, valid.tokens)
        calls[module.name] = Call(args, kwargs, output, valid)
        if len(calls) == len(modules):
            raise _AllSeen

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            for hook in watch(model, family, module, partial(see, module), store):
                hooks.callback(hook.remove)
        with suppress(_AllSeen):
            family.run(model, batch)
    return calls


def groups(
    first: Mapping[str, Call], names: Iterable[str], repeats: float, budget: int
) -> list[list[str]]:
    """Split modules, in their order, into groups whose calls fit into a number of bytes.

    Args:
        first: calls of all of them on the batch of the longest samples.
        names: of the modules.
        repeats: how many such batches all the texts are worth.
        budget: bytes; a module that needs more is a group by itself.
    """
    found: list[list[str]] = []
    held: dict[int, int] = {}
    for name in names:
        held |= first[name].sizes()
        if not found or sum(held.values()) * repeats > budget:
            held = first[name].sizes()
            found.append([])
        found[-1].append(name)
    return found


@contextmanager
def recorded_modules(
    dense: Checkpoint, modules: Sequence[Module], batches: Batches, device: str, budget: int
) -> Iterator[Iterator[RecordedModule]]:
    """Run the dense model and record the calls of modules, one after the other.

    Within this context the model is on the device, without dropout, and computes as suits the
    device; copies of its parts do so too.

    Args:
        dense: the dense model; left as it is.
        modules: attentions and ffns.
        batches: to run. An ffn gets as many calls for training as there are batches of the
            training texts, each of equally many tokens, mixed over all texts.
        device: where the model runs and the calls lie.
        budget: bytes that calls may take; modules that do not fit wait for another pass.

    Yields:
        An iterator over the modules. The calls of each are freed when the next one is asked for.
    """
    model: Any = dense.model
    before = next(model.parameters()).device
    firsts = [dense.family.valid_tokens(model, part[0]) for part in batches]
    longest = max(mask.shape[1] for masks in firsts for mask in masks.values())
    try:
        model.to(device)
        with eval_mode(model), kernels.for_cpu(model, device, longest, trains=True):
            yield _recorded(dense, modules, batches, device, budget)
    finally:
        model.to(before)


def _recorded(
    dense: Checkpoint, modules: Sequence[Module], batches: Batches, device: str, budget: int
) -> Iterator[RecordedModule]:
    by_name = {module.name: module for module in modules}

    def calls_of(names: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Call]:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        valid = dense.family.valid_tokens(dense.model, moved)
        some = [by_name[name] for name in names]
        return record_calls(dense.model, dense.family, some, moved, valid)

    longest = batches[0][0]
    repeats = sum(_tokens(batch) for part in batches for batch in part) / _tokens(longest)
    for names in groups(calls_of(list(by_name), longest), by_name, repeats, budget):
        started = time.perf_counter()
        calls: dict[str, tuple[list[Call], list[Call]]] = {name: ([], []) for name in names}
        both = [(split, batch) for split, part in enumerate(batches) for batch in part]
        for split, batch in Stage(both, "record", unit="batches", is_part=True):
            for name, call in calls_of(names, batch).items():
                calls[name][split].append(call)
        seconds = (time.perf_counter() - started) / len(names)
        for name, (train, held_out) in calls.items():
            if by_name[name].kind == "ffn":
                size = -(-sum(call.valid.tokens for call in train) // len(train))
                for some in (train, held_out):
                    _mix(some, size)
            yield RecordedModule(by_name[name], train, held_out, seconds)
            train.clear()
            held_out.clear()


def _mix(calls: list[Call], size: int) -> None:
    """Replace the calls of an ffn by calls of `size` tokens each, mixed over all texts."""
    inputs, targets = (
        torch.cat(rows)
        for rows in zip(*((call.args[0], call.target) for call in calls), strict=True)
    )
    calls.clear()
    generator = torch.Generator().manual_seed(0)  # the batches are the same for any seed
    for chosen in torch.randperm(len(inputs), generator=generator).split(size):
        chosen = chosen.to(inputs.device)
        calls.append(Call((inputs[chosen],), {}, targets[chosen], Valid(None, len(chosen))))


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch with its padding."""
    return sum(tensor.numel() for tensor in batch.values())


def output_values(calls: Sequence[Call]) -> int:
    """Count the output values of real tokens."""
    return sum(call.valid.tokens * call.target.shape[-1] for call in calls)


@torch.no_grad()
def mean_error(run: Callable[..., Tensor] | None, calls: Sequence[Call]) -> float:
    """Mean squared error of a variant's outputs per token and feature; None stands for zeros."""
    total = torch.zeros((), dtype=torch.float64, device=calls[0].target.device)
    for call in calls:
        output = torch.zeros_like(call.target) if run is None else run(*call.args, **call.kwargs)
        total += call.difference(output).square().sum()
    return float(total) / output_values(calls)


@torch.no_grad()
def output_moments(part: nn.Module, module: Module, calls: Sequence[Call]) -> Regression:
    """Sum up the inputs of a variant's `o`, with the dense outputs as targets; on the CPU."""
    o = part.get_submodule(module.output)
    inputs: list[Tensor] = []
    rows, width = o.get_parameter("weight").shape
    moments = Regression.zeros(width, rows, calls[0].target.device)
    with o.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        for call in calls:
            part(*call.args, **call.kwargs)
            moments.add(call.valid.rows(inputs.pop()), call.valid.rows(call.target))
    return replace(
        moments,
        inputs=moments.inputs.to("cpu"),
        cross=moments.cross.cpu(),
        target_total=moments.target_total.cpu(),
    )


def _each_tensor(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _each_tensor(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each_tensor(function, item) for item in value)
    return value
