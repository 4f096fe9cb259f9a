"""Second moments of the inputs of linears, summed by hooks while the dense model runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from composable.errors import UserError
from composable.families import Family
from composable.linalg.grams import Gram, full_float32


@dataclass(frozen=True)
class SharedInput:
    """An input tensor of the model, and who reads it.

    Attributes:
        linears: paths, in the order in which they run.
        width: features, n.
        stack: whose tokens it holds, "encoder" or "decoder".
    """

    linears: tuple[str, ...]
    width: int
    stack: str


def stacks_of(model: nn.Module, family: Family, linears: Iterable[str]) -> dict[str, str]:
    """Say whose tokens each linear reads: the encoder's where a cross-attention takes k and v.

    Raises:
        UserError: one is no linear within a layer.
    """
    modules, children = family.modules(model), dict(model.named_modules())
    reads_encoder = {
        f"{module.holder}.{module.part(role)}"
        for module in modules
        if module.is_cross
        for role in ("k", "v")
    }
    stacks = {}
    for linear in linears:
        owners = [module.stack for module in modules if linear.startswith(f"{module.name}.")]
        if not owners or not isinstance(children.get(linear), nn.Linear):
            raise UserError(
                f'"{linear}": the model has no such linear in a layer; config_generator.py writes '
                "the names of its modules."
            )
        stacks[linear] = "encoder" if linear in reads_encoder else owners[0]
    return stacks


def shared_inputs(
    model: nn.Module, family: Family, stacks: Mapping[str, str], batch: Mapping[str, Tensor]
) -> list[SharedInput]:
    """Run one sample and see which linears read the same tensor.

    Args:
        model: in eval mode.
        family: of the model.
        stacks: of the linears, from `stacks_of`.
        batch: on the model's device; its first sample is used.

    Returns:
        The inputs in the order in which they are met.
    """
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that no address is used twice

    def hook(linear: str) -> Callable[..., None]:
        return lambda part, args: seen.append((linear, args[0]))

    one = {name: tensor[:1] for name, tensor in batch.items()}
    _run(model, family, one, {linear: hook(linear) for linear in stacks})
    if sorted(linear for linear, _ in seen) != sorted(stacks):
        raise RuntimeError(f"not every one of {sorted(stacks)} runs once in a pass")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for linear, tensor in seen:
        groups.setdefault((*_identity(tensor), stacks[linear]), []).append(linear)
    return [SharedInput(tuple(group), key[1][-1], key[-1]) for key, group in groups.items()]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Tell tensors apart that live at the same time."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


class InputMoments:
    """Adds up the moments of some inputs while the dense model runs.

    Args:
        model: in eval mode, on the device on which the moments are summed.
        family: of the model.
        inputs: from `shared_inputs`.
    """

    def __init__(self, model: nn.Module, family: Family, inputs: Sequence[SharedInput]):
        self.model, self.family, self.inputs = model, family, inputs
        self.device = next(model.parameters()).device
        self._grams = [Gram.zeros(item.width, self.device) for item in inputs]
        self._valid: dict[str, Tensor] = {}  # masks of the batch, by stack
        self._places: dict[str, Tensor] = {}  # where they are True
        self._held: dict[int, Tensor] = {}  # inputs that some linear has still to read
        self._reads: list[int] = []  # how many linears have still to read each input

    def measure(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model on a batch from a collator."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self._valid = self.family.valid_tokens(self.model, batch)
        self._places = {k: mask.flatten().nonzero()[:, 0] for k, mask in self._valid.items()}
        self._held, self._reads = {}, [len(item.linears) for item in self.inputs]
        # not kept: a cycle of references would hold the moments longer than they are wanted
        hooks = {
            linear: self._hook(index)
            for index, item in enumerate(self.inputs)
            for linear in item.linears
        }
        _run(self.model, self.family, batch, hooks)
        if any(self._reads):
            raise RuntimeError(f"linears of {self.inputs} did not run")

    def results(self) -> list[Gram]:
        """Return the moments of all inputs, on the CPU; this object is spent."""
        return [gram.to("cpu") for gram in self._grams]

    def _hook(self, index: int) -> Callable[..., None]:
        item, gram = self.inputs[index], self._grams[index]

        def read(part: nn.Module, args: tuple[Tensor, ...]) -> None:
            tensor = args[0]
            if index not in self._held:
                # some models flatten their tokens before a linear
                if tensor.shape[:-1].numel() != self._valid[item.stack].numel():
                    raise RuntimeError(f"{item.linears} do not read the {item.stack}'s tokens")
                self._held[index] = tensor
                gram.add(tensor.flatten(0, -2)[self._places[item.stack]])
            self._reads[index] -= 1
            if self._reads[index] < 0 or _identity(tensor) != _identity(self._held[index]):
                raise RuntimeError(f"{item.linears} do not read one tensor")
            if self._reads[index] == 0:
                del self._held[index]

        return read


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _run(
    model: nn.Module,
    family: Family,
    batch: Mapping[str, Tensor],
    hooks: Mapping[str, Callable[..., None]],
) -> None:
    """Run the model up to its last layer, in float32; call a hook before each of some modules."""
    device = next(iter(batch.values())).device
    with ExitStack() as stack, torch.inference_mode(), full_float32(device):
        for path, hook in hooks.items():
            stack.enter_context(model.get_submodule(path).register_forward_pre_hook(hook))
        family.run(model, batch)
