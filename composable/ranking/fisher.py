"""Fisher: heads and neurons by the squared gradient of the loss by a mask on each, by sample."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from composable import tasks
from composable.calibration.batching import Texts
from composable.calibration.second_moments import eval_mode
from composable.errors import UserError
from composable.families import Module
from composable.formats.scores import Scores, UnitImportance
from composable.linalg.grams import full_float32
from composable.models.checkpoint import Checkpoint
from composable.progress import Stage
from composable.ranking.base import NoOptions, Ranker, unit_modules
from composable.tasks.plain_texts import PlainTexts

#: (model, batch) -> the loss of every sample (batch,), and more.
Losses = Callable[[Any, Any], tuple[Tensor, ...]]


def mask_gradients(
    model: nn.Module,
    modules: Sequence[Module],
    batch: Mapping[str, Tensor],
    losses_of: Losses,
) -> list[Tensor]:
    """Differentiate the loss of each sample by masks on the units of some modules, at 1.

    A mask multiplies what enters the linear that all units flow into: a head's slice of the output
    projection's input, a neuron's column of the down projection's. Every sample has masks of its
    own. Samples do not touch each other, so that one pass back from the sum of their losses is
    enough. What is in padding has no gradient: no loss depends on it.

    Args:
        model: in eval mode; its weights need no gradients.
        modules: attentions and ffns that have units.
        batch: on the model's device.
        losses_of: see `Losses`.

    Returns:
        For every module (batch, units), float32: summed over the sample's tokens, and over the
        columns of a head, input times gradient of the loss by the input.
    """
    first = next(iter(batch.values()))
    masks = [
        torch.ones(len(first), m.units, device=first.device, requires_grad=True) for m in modules
    ]

    def multiply(mask: Tensor, part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # some models flatten their tokens before a linear
        inputs, (samples, units) = args[0], mask.shape
        size = inputs.shape[-1] // units
        masked = inputs.reshape(samples, -1, units, size) * mask[:, None, :, None]
        return (masked.view(inputs.shape), *args[1:])

    with ExitStack() as stack, torch.enable_grad(), full_float32(masks[0].device):
        for module, mask in zip(modules, masks, strict=True):
            linear = model.get_submodule(module.output_path)
            stack.enter_context(linear.register_forward_pre_hook(partial(multiply, mask)))
        return list(torch.autograd.grad(losses_of(model, batch)[0].sum(), masks))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of weights, nor store what they would take."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in found:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in found:
            parameter.requires_grad_(True)


def _measure(dense: Checkpoint, texts: Texts | None, options: NoOptions) -> Scores:
    """Average over samples; the loss of one is the task's own, of text the sum over its tokens."""
    assert texts is not None  # it reads them
    model, device = dense.model, next(dense.model.parameters()).device
    modules = unit_modules(dense)
    task, is_plain = tasks.by_name(dense.info["task"]), isinstance(texts.corpus, PlainTexts)
    _, losses_of = task.functions()
    sums = [torch.zeros(m.units, dtype=torch.float64, device=device) for m in modules]
    with eval_mode(model), _frozen(model):
        for batch in Stage(texts.batches(device), "rank", unit="batches"):
            labelled = task.label_texts(batch) if is_plain else batch
            if labelled is None:
                raise UserError(
                    f"{texts.name}: plain texts have no labels, which the loss of {task.name} is "
                    "measured by; give data of the model's task."
                )
            moved = {name: tensor.to(device) for name, tensor in labelled.items()}
            found = mask_gradients(model, modules, moved, losses_of)
            for total, gradients in zip(sums, found, strict=True):
                total += gradients.double().square().sum(0)
    return Scores(units=dict(map(_importance, modules, sums, [len(texts)] * len(sums))))


def _importance(module: Module, total: Tensor, samples: int) -> tuple[str, UnitImportance]:
    if not bool(total.isfinite().all()):
        raise UserError(
            f'"{module.name}": the squared gradients of its units are not finite; check that the '
            "dense model's loss on these samples is a finite number."
        )
    return module.name, UnitImportance((total / samples).cpu().numpy())


FISHER = Ranker(
    name="fisher",
    # the paper squares the gradient of every sample, as is done here, its program of mini-batches
    reference="Kwon et al. 2022 (arXiv 2204.09656)",
    measure=_measure,
    reads_texts=True,
)
