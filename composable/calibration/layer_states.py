"""What flows between the layers of a stack: states taken by hooks, and what is measured of them."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from composable.calibration.second_moments import eval_mode
from composable.families import Family
from composable.linalg.grams import Gram, Regression, full_float32
from composable.models.surgery import layer_paths
from composable.progress import Stage

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
    """

    model: Any
    family: Family

    @cached_property
    def stacks(self) -> dict[str, Any]:
        """The layers of every stack."""
        paths = layer_paths(self.model, self.family)
        return {stack: self.model.get_submodule(path) for stack, path in paths.items()}

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

        def keep(name: str, states: Tensor) -> None:
            found[name].append(states.flatten(0, 1)[index[name].to(states.device)])

        def before(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
            keep(name, _entering(args, kwargs))

        def after(name: str, layer: nn.Module, args: Any, output: Any) -> None:
            keep(name, output if isinstance(output, Tensor) else output[0])

        with ExitStack() as hooks:
            for name in index:
                first = self.stacks[name][0]
                hook = first.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                hooks.enter_context(hook)
                for layer in self.stacks[name]:
                    hooks.enter_context(layer.register_forward_hook(partial(after, name)))
            moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with torch.inference_mode(), full_float32(self.device), eval_mode(self.model):
                self.family.run(self.model, moved)
        return found

    def without(self, stack: str, layers: Collection[int]) -> AbstractContextManager[ExitStack]:
        """Let some layers of a stack pass on their input, as if they were gone."""
        hooks = ExitStack()
        for layer in layers:
            # before those of `read`, which see what this one returns
            hook = self.stacks[stack][layer].register_forward_hook(_bypass, with_kwargs=True)
            hooks.enter_context(hook)
        return hooks


def _entering(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _bypass(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    states = _entering(args, kwargs)
    return states if isinstance(output, Tensor) else (states, *output[1:])


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
    for batch in Stage(batches, "moments", unit="batches"):
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
