"""Second moments of inputs, and of inputs with targets; float32 products kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_PER_PRODUCT = 4096  # longer sums are in float64; fewer take longer
COLUMN_BLOCKS = 4  # those left of the diagonal are not computed: 10/16 of the work


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


class Gram:
    """Second moments of the inputs X (tokens, n) of a linear, summed as tokens come.

    Products are summed in float32 over at most `TOKENS_PER_PRODUCT` tokens, those sums in float64.

    Attributes:
        matrix: X^T X of the tokens so far: (n, n) float64, symmetric.
        total: column sums of X: (n,) float64.
        count: tokens, the rows of X.
    """

    def __init__(self, matrix: Tensor, total: Tensor, count: int):
        self._matrix, self.total, self.count = matrix, total, count
        # while tokens come: float32 products not yet in the matrix, whose lower part is then out
        # of date
        self._recent: Tensor | None = None
        self._tokens = 0  # in `_recent`

    @classmethod
    def zeros(cls, width: int, device: torch.device | str = "cpu") -> "Gram":
        """Start with no tokens of `width` inputs."""
        matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(matrix, torch.zeros(width, dtype=torch.float64, device=device), 0)

    @property
    def matrix(self) -> Tensor:
        """X^T X of all tokens: (n, n) float64, symmetric to the last bit."""
        if self._recent is not None:
            self._flush()
            self._recent = None
            _mirror(self._matrix)
        return self._matrix

    def add(self, rows: Tensor) -> None:
        """Add tokens.

        Args:
            rows: (tokens, n), any float dtype; only real tokens, no padding.
        """
        with torch.no_grad(), full_float32(self._matrix.device):
            for part in rows.to(self._matrix.device).split(TOKENS_PER_PRODUCT):
                self._add_product(part.float())
                self.total += part.double().sum(0)  # twice as fast as sum(dtype=float64)
        self.count += len(rows)

    def _add_product(self, rows: Tensor) -> None:
        """Add the upper triangle of rows^T rows, block by block, in float32."""
        if self._recent is None:
            with torch.inference_mode(False):  # tokens may come in and out of that mode
                self._recent = torch.empty_like(self._matrix, dtype=torch.float32)
        if self._tokens + len(rows) > TOKENS_PER_PRODUCT:
            self._flush()
        for start, stop in column_blocks(len(self._matrix)):
            self._recent[start:stop, start:].addmm_(
                rows[:, start:stop].T, rows[:, start:], beta=1 if self._tokens else 0
            )
        self._tokens += len(rows)

    def _flush(self) -> None:
        """Add the float32 products to the matrix."""
        if self._recent is not None and self._tokens:
            for start, stop in column_blocks(len(self._matrix)):
                self._matrix[start:stop, start:] += self._recent[start:stop, start:]
        self._tokens = 0

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


def column_blocks(width: int) -> list[tuple[int, int]]:
    """First and last column, the latter exclusive, of every block of columns."""
    step = max(1, -(-width // COLUMN_BLOCKS))
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def _mirror(matrix: Tensor) -> None:
    """Copy the upper triangle to the lower, in place, without another matrix of that size."""
    for start, stop in column_blocks(len(matrix)):
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
