"""Second moments of inputs, and of inputs with targets; float32 products kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_PRODUCT = 1024  # longer sums are in float64; 8192 is no faster
BLOCKED_FROM = 256  # narrower Grams are one product, wider ones 4 x 4 blocks


@contextmanager
def full_float32(device: torch.device | str = "cpu") -> Iterator[None]:
    """Compute float32 products on `device` in float32: without TF32, bfloat16 or autocast."""
    before = _precision()
    _set_precision(["ieee", "ieee"] if isinstance(before, list) else "highest")
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        _set_precision(before)


def _precision() -> list[str] | str:
    """Return how float32 is multiplied, on CUDA and on the CPU: as torch 2.9 says it, or before."""
    # from then on the older getter fails once anyone has used the newer setter
    if hasattr(torch.backends, "fp32_precision"):
        cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        return [torch.backends.cuda.matmul.fp32_precision, cpu.fp32_precision]
    return torch.get_float32_matmul_precision()


def _set_precision(precision: list[str] | str) -> None:
    if isinstance(precision, str):
        torch.set_float32_matmul_precision(precision)
        return
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision, cpu.fp32_precision = precision


@dataclass
class Gram:
    """Second moments of the inputs of a linear.

    Attributes:
        matrix: X^T X of the inputs X (tokens, n): (n, n) float64.
        total: column sums of X: (n,) float64.
        count: tokens, the rows of X.
    """

    matrix: Tensor
    total: Tensor
    count: int

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "Gram":
        """Start with no tokens of `width` inputs."""
        matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(matrix, torch.zeros(width, dtype=torch.float64, device=device), 0)

    def add(self, rows: Tensor) -> None:
        """Add tokens: products in float32, summed in float64.

        Args:
            rows: (tokens, n), any float dtype; only real tokens, no padding.
        """
        with torch.no_grad(), full_float32(self.matrix.device):
            for part in rows.to(self.matrix.device).split(TOKENS_PER_PRODUCT):
                _add_square(self.matrix, part.float())
                self.total += part.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def columns(self, index: Tensor) -> "Gram":
        """Return the Gram of the inputs `index` alone, in that order."""
        index = index.to(self.matrix.device)
        return Gram(self.matrix[index][:, index], self.total[index], self.count)

    def augmented(self) -> Tensor:
        """Return the matrix (n + 1, n + 1) with a last input that is always 1, for a bias."""
        last = torch.cat([self.total, self.total.new_tensor([self.count])])
        return torch.cat([torch.cat([self.matrix, self.total[None]]), last[:, None]], dim=1)

    def to(self, device: torch.device | str) -> "Gram":
        """Return the same moments on another device."""
        return Gram(self.matrix.to(device), self.total.to(device), self.count)


@dataclass
class Regression:
    """Moments of inputs and targets of a linear, refitted on inputs other than the dense ones.

    Attributes:
        inputs: of the inputs X (tokens, n).
        cross: Y^T X with the targets Y (tokens, rows): (rows, n) float64.
        target_total: column sums of Y: (rows,) float64.
        target_square: sum of Y^2 over tokens and rows.
    """

    inputs: Gram
    cross: Tensor
    target_total: Tensor
    target_square: float = 0.0

    @classmethod
    def zeros(cls, width: int, rows: int, device: torch.device | str = "cpu") -> "Regression":
        """Start with no tokens of `width` inputs and `rows` targets."""
        return cls.of(Gram.zeros(width, device), rows)

    @classmethod
    def of(cls, inputs: Gram, rows: int) -> "Regression":
        """Start with inputs that several regressions may share, and no targets."""
        cross = inputs.matrix.new_zeros(rows, len(inputs.matrix))
        return cls(inputs, cross, inputs.matrix.new_zeros(rows))

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add tokens: inputs (tokens, n) and their targets (tokens, rows), any float dtype."""
        self.inputs.add(rows)
        self.add_targets(rows, targets)

    def add_targets(self, rows: Tensor, targets: Tensor) -> None:
        """Add the targets of inputs that are added, or will be, by themselves."""
        targets = targets.to(self.cross.device)
        with torch.no_grad(), full_float32(self.cross.device):
            for x, y in zip(
                rows.to(self.cross.device).split(TOKENS_PER_PRODUCT),
                targets.split(TOKENS_PER_PRODUCT),
                strict=True,
            ):
                self.cross += y.float().T @ x.float()
                self.target_total += y.sum(0, dtype=torch.float64)
                norm = torch.linalg.vector_norm(y.float(), dtype=torch.float64)
                self.target_square += float(norm) ** 2

    def augmented_cross(self) -> Tensor:
        """Return Y^T X (rows, n + 1) with a last input that is always 1, for a bias."""
        return torch.cat([self.cross, self.target_total[:, None]], dim=1)


def _add_square(matrix: Tensor, rows: Tensor) -> None:
    """Add rows^T rows, of which only column blocks on and right of the diagonal are computed."""
    width = rows.shape[1]
    step = width if width < BLOCKED_FROM else -(-width // 4)
    for start in range(0, width, step):
        stop = min(start + step, width)
        product = rows[:, start:stop].T @ rows[:, start:]
        diagonal, right = product[:, : stop - start], product[:, stop - start :]
        matrix[start:stop, start:stop] += (diagonal + diagonal.T) / 2  # symmetric to the last bit
        matrix[start:stop, stop:] += right
        matrix[stop:, start:stop] += right.T
