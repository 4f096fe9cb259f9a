"""GPT-2's linears as torch has them: q, k and v beside each other, weights (outputs, inputs)."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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
            parent, _, child = name.rpartition(".")
            width = 3 if child == "c_attn" else 1
            columns = zip(module.weight.chunk(width, 1), module.bias.chunk(width), strict=True)
            linears = [_linear(weight, bias) for weight, bias in columns]
            setattr(
                model.get_submodule(parent),
                child,
                SideBySide(*linears) if width == 3 else linears[0],
            )


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Make a linear of a transposed weight (inputs, outputs)."""
    linear = nn.Linear(1, 1, device="meta")
    linear.in_features, linear.out_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().T.contiguous())
    linear.bias = nn.Parameter(bias.detach().clone())
    return linear
