"""GPT-2's linears as torch has them: q, k and v beside each other, weights (outputs, inputs)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

#: Names of the Conv1D in a GPT-2.
NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


class SideBySide(nn.Module):
    """Three linears that read one input; their outputs follow each other, as one would give them.

    Attributes:
        q, k, v: (heads * head size, hidden) linears.
    """

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear):
        super().__init__()
        self.q, self.k, self.v = q, k, v

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., widths of q, k and v together)."""
        return torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], dim=-1)


def split(model: nn.Module) -> None:
    """Replace every Conv1D of a model by linears, the one named c_attn by three.

    The model computes what it did, and every linear of it can be pruned by rows and columns like
    those of other families. Its state dict has other names and shapes than the library's.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            width = 3 if name.endswith(".c_attn") else 1
            linears = map(_linear, module.weight.chunk(width, 1), module.bias.chunk(width))
            model.set_submodule(name, SideBySide(*linears) if width == 3 else next(linears))


def join(model: nn.Module) -> None:
    """Undo `split`, and let every attention compute what the library's does at its number."""
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in NAMES and not isinstance(module, Conv1D):
            parts = module.children() if isinstance(module, SideBySide) else [module]
            model.set_submodule(name, _conv(list(parts)))
    for module in model.modules():
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            _rescale(module)


def _rescale(attention: Any) -> None:
    """Let an attention divide its scores as its present number says.

    It divides by a number that it got when it was made; where layers before it have left, its
    queries make up for the difference.
    """
    base = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    wanted = base / (attention.layer_idx + 1)
    linear = attention.c_attn
    width = linear.nf // 3
    for queries in (linear.weight.data[:, :width], linear.bias.data[:width]):
        queries *= attention.scaling / wanted
    attention.scaling = wanted


def _conv(linears: Any) -> Conv1D:
    """Make one transposed linear of linears that read one input."""
    weight = torch.cat([linear.weight.detach() for linear in linears]).T.contiguous()
    made = Conv1D(1, 1)
    made.nf, made.nx = weight.shape[1], weight.shape[0]
    made.weight = nn.Parameter(weight)
    made.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]))
    return made


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Make a linear of a transposed weight (inputs, outputs)."""
    linear = nn.Linear(1, 1, device="meta")
    linear.in_features, linear.out_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().T.contiguous())
    linear.bias = nn.Parameter(bias.detach().clone())
    return linear
