"""How models compute: autocast, what torch does slowly on a CPU, a lean cross-entropy."""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

#: Elements of a block of logits in `cross_entropy`: 1 MiB of float32 stays in a core's cache; a GPU
#: wants few blocks.
BLOCK = {"cpu": 2**18, "cuda": 2**26}
#: Tokens up to which attention is faster on a CPU as plain matrix products.
SHORT = 128
#: Rows below which MKL is faster than oneDNN.
FEW = 32


def autocast(device: str | torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Run matrix products in `dtype`, with the weights as they are; float32 changes nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


@contextlib.contextmanager
def for_cpu(
    model: nn.Module, device: str | torch.device, longest: int, trains: bool = False
) -> Iterator[None]:
    """Compute as suits a CPU, where `device` is one: results differ by rounding and noise alone.

    Args:
        model: what is trained or run.
        device: where.
        longest: tokens of the longest text.
        trains: whether there are gradients.
    """
    with contextlib.ExitStack() as stack:
        if torch.device(device).type == "cpu":
            if trains:
                stack.enter_context(float32_products())
                stack.enter_context(_as(model, nn.Dropout, QuickDropout))
            else:
                stack.enter_context(_as(model, nn.Linear, QuickLinear))
            if longest <= SHORT:
                stack.enter_context(plain_attention(model))
        yield


@contextlib.contextmanager
def _as(model: nn.Module, slow: type[nn.Module], quick: type[nn.Module]) -> Iterator[None]:
    """Turn the modules of one class into another for the time being."""
    found = [module for module in model.modules() if type(module) is slow]
    for module in found:
        module.__class__ = quick
    try:
        yield
    finally:
        for module in found:
            module.__class__ = slow


class QuickLinear(nn.Linear):
    """A linear that oneDNN computes where no gradient is wanted, still in float32.

    torch gives float32 products to MKL, which keeps to AVX2 on processors that are not Intel's:
    half the speed (100 against 230 GFLOP/s on one core of an AMD EPYC). Few rows are left to MKL.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., inputs) by the weights."""
        product = _onednn_linear()
        if (
            product is None
            or input.numel() < FEW * input.shape[-1]
            or not input.dtype == self.weight.dtype == torch.float32
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        output: Tensor = product(input, self.weight, self.bias, "none", [], "")
        return output


@functools.cache
def _onednn_linear() -> Any:
    """Return the operator that torch's compiler uses for linears on a CPU; None: not built in."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Let oneDNN compute all float32 products, gradients too, see `QuickLinear`.

    The switch is named "bf16" and allows oneDNN to round; it is used only where a trial shows that
    it does not.
    """
    with _allow_bfloat16() if keeps_float32() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _allow_bfloat16() -> Iterator[None]:
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


@functools.cache
def keeps_float32() -> bool:
    """Try whether products stay float32; AMX, which rounds large ones only, is left alone."""
    has_switch = hasattr(torch.backends.mkldnn, "matmul")  # torch 2.9 and later
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    if not has_switch or has_amx or not torch.backends.mkldnn.is_available():
        return False
    with _allow_bfloat16():
        return all(_is_exact(*shape) for shape in ((256, 256, 256), (2048, 192, 64), (17, 768, 3)))


def _is_exact(rows: int, inner: int, columns: int) -> bool:
    """Multiply numbers of float32 that bfloat16 has not; their sums are exact, too."""
    factor = torch.full((rows, inner), 1 + 2**-12)
    products = factor @ torch.ones(inner, columns), factor.T @ torch.ones(rows, columns)
    return all(
        bool((product == count * (1 + 2**-12)).all())
        for product, count in zip(products, (inner, rows), strict=True)
    )


class QuickDropout(nn.Dropout):
    """Dropout that draws 16 random bits for an element where torch draws 64.

    The rate is rounded to a multiple of 2^-16 and the scale is that of the rounded rate.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input` in training mode."""
        dropped = round(self.p * 2**16)
        if not self.training or not 0 < dropped < 2**16:
            return super().forward(input)
        count = input.numel()
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=input.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[:count].view(input.shape)
        kept = (bits >= dropped - 2**15).to(input.dtype)
        return input * kept.mul_(2**16 / (2**16 - dropped))


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Let a model of transformers compute attention as plain products for the time being."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _CrossEntropy(torch.autograd.Function):
    """Computes losses and, in the place of the logits, their gradient; block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(labels), dtype=wide, device=logits.device)
        rows = max(1, BLOCK[logits.device.type] // logits.shape[1])
        for start in range(0, len(labels), rows):
            block, wanted = logits[start : start + rows], labels[start : start + rows, None]
            odds = block.to(wide, copy=True)
            odds -= odds.amax(1, keepdim=True)
            target = (1 - smoothing) * odds.gather(1, wanted)[:, 0]
            if smoothing:
                target += smoothing * odds.mean(1)
            total = odds.exp_().sum(1)
            losses[start : start + rows] = total.log() - target
            if ctx.needs_input_grad[0]:
                odds /= total[:, None]
                odds -= smoothing / logits.shape[1]
                odds.scatter_add_(1, wanted, odds.new_full(wanted.shape, smoothing - 1))
                block.copy_(odds)
        ctx.save_for_backward(logits)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0][:, None]), None, None


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every row, without a float32 copy of the logits.

    Args:
        logits: (rows, vocabulary); overwritten by their gradient where one is wanted.
        labels: (rows,), each in the vocabulary.
        smoothing: weight of the uniform distribution in the target.

    Returns:
        (rows,), float32 (float64 for logits of float64).
    """
    losses: Tensor = _CrossEntropy.apply(logits, labels, smoothing)  # type: ignore[no-untyped-call]
    return losses
