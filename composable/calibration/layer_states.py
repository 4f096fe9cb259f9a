"""What flows between the layers of a stack: states taken by hooks, and what is measured of them."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from composable.calibration.second_moments import eval_mode
from composable.families import Family
from composable.linalg.grams import Gram, Regression, full_float32
from composable.models.surgery import layer_lists
from composable.progress import shows_progress

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
    family: Family
    stacks: Mapping[str, nn.ModuleList]

    @classmethod
    def of(cls, model: Any, family: Family) -> "Reader":
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


def _bar(batches: Sequence[Batch], what: str) -> Any:
    return tqdm(batches, what, unit="batch", disable=not shows_progress())
