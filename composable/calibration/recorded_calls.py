"""Calls of a dense model's attentions, recorded so that variants can train without the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from composable.families import Family, Module
from composable.linalg.grams import Regression


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
        """Take the real tokens of (batch, length, features): (tokens, features)."""
        return states.flatten(0, 1) if self.padding is None else states[~self.padding[..., 0]]


@dataclass(frozen=True)
class Call:
    """One call of a dense attention, as its variants can take it.

    Attributes:
        args: positional arguments.
        kwargs: named ones; their tensors may be shared with the calls of other attentions.
        target: the dense output, (batch, length, features).
        valid: its real tokens.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    valid: Valid

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments in float32, to be used for all variants of the attention."""
        return _each_tensor(_widen, self.args), _each_tensor(_widen, self.kwargs)

    def difference(self, output: Tensor) -> Tensor:
        """Subtract the dense output from a variant's (batch, length, features); 0 in padding."""
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


class Recorder:
    """Runs the dense model and records the calls of some attentions.

    What several attentions are given, such as masks, the position bias and the other stack's
    states, is stored once. All is copied, for a model may go on working on its tensors in place.

    Args:
        model: the dense model, in eval mode.
        family: of the model.
        modules: the attentions; each runs once in a pass.
        dtype: of stored hidden states and outputs; masks and biases stay as they are, since
            what stands for minus infinity in a mask becomes infinite in bfloat16.
    """

    def __init__(
        self, model: nn.Module, family: Family, modules: Sequence[Module], dtype: torch.dtype
    ):
        self.model, self.family, self.modules, self.dtype = model, family, modules, dtype
        self._calls: dict[str, Call] = {}
        self._outputs: dict[str, Tensor] = {}
        self._valid: dict[str, Valid] = {}
        self._stored: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def record(self, batch: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> dict[str, Call]:
        """Run one batch.

        Args:
            batch: from a collator, on the model's device.
            valid: stack -> real tokens (batch, length), bool.

        Returns:
            Name of the attention -> its call.
        """
        self._calls, self._outputs, self._stored = {}, {}, {}
        self._valid = {stack: Valid.of(mask) for stack, mask in valid.items()}
        parts = {module.name: self.model.get_submodule(module.name) for module in self.modules}
        # an attention's own output may have its input added
        handles = [
            parts[module.name].get_submodule(module.output).register_forward_hook(self._see(module))
            for module in self.modules
        ] + [
            parts[module.name].register_forward_hook(self._hook(module), with_kwargs=True)
            for module in self.modules
        ]
        try:
            with torch.no_grad():
                self.family.run(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        self._outputs, self._stored = {}, {}
        return self._calls

    def _see(self, module: Module) -> Callable[..., None]:
        def see(part: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[module.name] = self._store(output)

        return see

    def _hook(self, module: Module) -> Callable[..., None]:
        def keep(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            args, kwargs = self.family.replayed(args, kwargs, output)
            self._calls[module.name] = Call(
                _each_tensor(self._store, tuple(args)),
                _each_tensor(self._store, dict(kwargs)),
                self._outputs[module.name],
                self._valid[module.stack],
            )

        return keep

    def _store(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, or find the copy that another attention's call has."""
        # the version counts changes in place; the source is held, so that no address comes twice
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in self._stored:
            width: int = self.model.config.hidden_size  # type: ignore[assignment,union-attr]
            # rotary angles have three dimensions, too
            is_states = tensor.is_floating_point() and tensor.ndim == 3 and tensor.shape[2] == width
            copy = tensor.detach().to(self.dtype if is_states else tensor.dtype, copy=True)
            self._stored[key] = tensor, copy
        return self._stored[key][1]


def groups(
    first: Mapping[str, Call], names: Iterable[str], repeats: float, budget: int
) -> list[list[str]]:
    """Split attentions, in their order, into groups whose calls fit into a number of bytes.

    Args:
        first: calls of all of them on the batch of the longest samples.
        names: of the attentions.
        repeats: how many such batches all the texts are worth.
        budget: bytes; an attention that needs more is a group by itself.
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


def output_values(calls: Sequence[Call]) -> int:
    """Count the output values of real tokens."""
    return sum(call.valid.tokens * call.target.shape[-1] for call in calls)


@torch.no_grad()
def mean_error(run: Callable[..., Tensor] | None, calls: Sequence[Call]) -> float:
    """Mean squared error of a variant's outputs per token and feature; None stands for zeros."""
    total = torch.zeros((), dtype=torch.float64, device=calls[0].target.device)
    for call in calls:
        args, kwargs = call.inputs()
        output = torch.zeros_like(call.target) if run is None else run(*args, **kwargs)
        total += call.difference(output).square().sum()
    return float(total) / output_values(calls)


@torch.no_grad()
def output_moments(part: nn.Module, module: Module, calls: Sequence[Call]) -> Regression:
    """Sum up the inputs of a variant's `o`, with the dense outputs as targets; on the CPU."""
    o = part.get_submodule(module.output)
    inputs: list[Tensor] = []
    handle = o.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    rows, width = o.get_parameter("weight").shape
    moments = Regression.zeros(width, rows, calls[0].target.device)
    for call in calls:
        args, kwargs = call.inputs()
        part(*args, **kwargs)
        moments.add(call.valid.rows(inputs.pop()), call.valid.rows(call.target))
    handle.remove()
    return replace(
        moments,
        inputs=moments.inputs.to("cpu"),
        cross=moments.cross.cpu(),
        target_total=moments.target_total.cpu(),
    )


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _each_tensor(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _each_tensor(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each_tensor(function, item) for item in value)
    return value
