"""How far outputs of copies of a model are from its own: angles of tokens, distributions."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from composable.linalg import kernels


def normalized(features: Tensor) -> Tensor:
    """Give every row of (..., tokens, width) the length 1, as float32; rows of zeros stay zero."""
    return F.normalize(features.float(), dim=-1, eps=1e-12)


class ManifoldLoss:
    """Sum over all pairs of tokens of the squared difference of their cosines.

    It is measured of several changed copies of a model at once. With T the model's features, of
    length 1, S those of a copy and D = S - T it is

        |S S^T - T T^T|^2 = 2 sum(A * B) + 2 sum(C * C^T) + 4 sum(C * B) + sum(B * B)

    where A = T^T T, B = D^T D and C = T^T D are (width, width): no matrix of all pairs is made, and
    tokens may come in parts. Every term is of the order of D squared, so that nothing cancels.

    Args:
        teacher: T, part by part, each (tokens, width).

    Source: Hao et al. 2022 (arXiv 2107.01378), as OPTIN takes it (arXiv 2403.17921), but of all
    tokens, where its program draws 768 of them.
    """

    def __init__(self, teacher: list[Tensor]):
        self._teacher = teacher
        tokens, width = sum(map(len, teacher)), teacher[0].shape[1]
        # few tokens have fewer pairs than features have
        self._is_direct = len(teacher) == 1 and tokens < width
        self._sums: list[Tensor] = []
        #: Numbers that are held for one copy.
        self.size = 2 * (tokens if self._is_direct else width) ** 2

    def start(self) -> None:
        """Begin with other copies."""
        self._sums = []

    def add(self, part: int, student: Tensor) -> None:
        """Add S of the tokens of one part, (copies, tokens, width)."""
        teacher = self._teacher[part]
        difference = student - teacher
        if self._is_direct:
            crossed = difference @ teacher.T
            self._sums = [crossed + crossed.mT + difference @ difference.mT]
            return
        new = [difference.mT @ difference, teacher.T @ difference]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new

    def values(self) -> Tensor:
        """Return the loss of every copy, (copies,)."""
        if self._is_direct:
            return self._sums[0].square().sum((1, 2))
        b, c = self._sums
        return (2 * self._second * b + 2 * c * c.mT + 4 * c * b + b * b).sum((1, 2))

    @cached_property
    def _second(self) -> Tensor:
        return torch.stack([part.T @ part for part in self._teacher]).sum(0)


class Divergence:
    """KL(teacher, student), summed over rows, of several changed copies of a model.

    Args:
        teacher: dense logits, (rows, classes); of one logit (a regression) the difference is
            squared instead.
    """

    def __init__(self, teacher: Tensor):
        self._teacher = teacher.float()
        self._shares = self._teacher.softmax(-1)

    def of(self, student: Tensor) -> Tensor:
        """Compare logits (copies, rows, classes): (copies,) float64."""
        if student.shape[-1] == 1:
            return (student.double() - self._teacher.double()).square().sum((1, 2))
        # blocks that stay in a cache
        rows = max(1, kernels.BLOCK[student.device.type] // student.shape[-1])
        found = student.new_zeros(len(student), dtype=torch.float64)
        for first in range(0, len(self._teacher), rows):
            part = slice(first, first + rows)
            shares, teacher = self._shares[part], self._teacher[part]
            for i, one in enumerate(student[:, part]):
                change = one.float() - teacher
                # with their mean taken off, changes of any size keep their digits
                change -= (shares * change).sum(-1, keepdim=True)
                lost = change.expm1_().mul_(shares).sum(-1).log1p()
                found[i] += lost.double().clamp(min=0).sum()
        for i in (~found.isfinite()).nonzero().flatten().tolist():  # too large an exponential
            one, two = (logits.double().log_softmax(-1) for logits in (student[i], self._teacher))
            found[i] = F.kl_div(one, two, reduction="sum", log_target=True)
        return found
