"""Layer distance: how little a block of layers changes what passes through it.

Sources: Gromov et al. 2024, arXiv 2403.17887 (blocks by angle); Men et al. 2024 (ShortGPT), arXiv
2403.03853 (single layers by cosine); github.com/melisa-writer/short-transformers (the others).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from composable.errors import ShapeError, UserError

#: Tokens whose states are compared at a time.
CHUNK = 256
EPSILON = 1e-6
LAST = -1
#: Measured by a fit in `ranking.layer_distance`, not from inner products.
LINEAR_FIT = "linear_fit"
_ALL = {
    "angular_all": "angular",
    "bi_score": "bi_score",
    "relative_magnitude": "relative_magnitude",
    "relative_residual": "relative_residual",
    LINEAR_FIT: LINEAR_FIT,
}


_TOKEN = re.compile(r"(angular|euclidean|linear_approximation)_(?:last|token:(\d+))")
KNOWN = (
    *_ALL,
    *(f"{name}_{which}" for name in ("angular", "euclidean", "linear_approximation")
      for which in ("last", "token:I")),
)  # fmt: skip


@dataclass(frozen=True)
class Distance:
    """A distance between the states a before and b after a block of layers.

    Attributes:
        name: as the user writes it, "angular_token:0".
        formula: key of `FORMULAS`, or `LINEAR_FIT`.
        token: None: the mean over all real tokens; `LAST`; i: the i-th real token of a sample.
    """

    name: str
    formula: str
    token: int | None

    @classmethod
    def parse(cls, name: str) -> "Distance":
        """Read the name of a distance.

        Raises:
            UserError: unknown; the message lists the known ones.
        """
        if name in _ALL:
            return cls(name, _ALL[name], None)
        match = _TOKEN.fullmatch(name)
        if match is None:
            raise UserError(f'unknown distance "{name}"; known are {", ".join(KNOWN)}.')
        return cls(name, match[1], LAST if match[2] is None else int(match[2]))


def _cosine(gram: Tensor) -> Tensor:
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    return gram / (norms[:, :, None] * norms[:, None, :]).clamp_min(EPSILON)


def _bi_score(gram: Tensor) -> Tensor:
    """1 - cos(a, b)."""
    return 1 - _cosine(gram)


def _angular(gram: Tensor) -> Tensor:
    """acos(cos(a, b)) / pi."""
    return _cosine(gram).clamp(-1, 1).acos() / torch.pi


def _relative_magnitude(gram: Tensor) -> Tensor:
    """|b| / (|a + b| + eps)."""
    squares = gram.diagonal(dim1=1, dim2=2)
    total = squares[:, :, None] + squares[:, None, :] + 2 * gram
    return squares.sqrt()[:, None, :] / (total.clamp_min(0).sqrt() + EPSILON)


def _relative_residual(gram: Tensor) -> Tensor:
    """|b - a| / (|b| + eps)."""
    squares = gram.diagonal(dim1=1, dim2=2)
    return _euclidean(gram) / (squares.sqrt()[:, None, :] + EPSILON)


def _euclidean(gram: Tensor) -> Tensor:
    """|a - b|."""
    squares = gram.diagonal(dim1=1, dim2=2)
    return (squares[:, :, None] + squares[:, None, :] - 2 * gram).clamp_min(0).sqrt()


def _linear_approximation(gram: Tensor) -> Tensor:
    """The ln of |c a - b|^2 with the one number c that fits best, c = ab / aa."""
    squares = gram.diagonal(dim1=1, dim2=2)
    rest = squares[:, None, :] - gram.square() / squares[:, :, None]
    return rest.clamp_min(torch.finfo(gram.dtype).tiny).log()


#: (tokens, states, states) of inner products -> distance from each state (dim 1) to each (dim 2).
FORMULAS = {
    "angular": _angular,
    "bi_score": _bi_score,
    "euclidean": _euclidean,
    "linear_approximation": _linear_approximation,
    "relative_magnitude": _relative_magnitude,
    "relative_residual": _relative_residual,
}


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a batch the distances look at.

    Attributes:
        index: (tokens,) positions in the flattened batch.
        weight: (tokens,) float64, one over the real tokens of the token's sample.
        places: token of a distance -> which of `index` are that token of some sample.
        samples: in the batch.
        is_all: whether all real tokens are among them, not those of `places` alone.
    """

    index: Tensor
    weight: Tensor
    places: Mapping[int, Tensor]
    samples: int
    is_all: bool

    @classmethod
    def of(cls, mask: Tensor, distances: Sequence[Distance]) -> "Tokens":
        """Find the tokens that `distances` need.

        Args:
            mask: (batch, length), True where a token is real; padding on either side.
            distances: what will be measured.

        Raises:
            UserError: a sample has no real token.
        """
        lengths = mask.sum(1)
        if not bool((lengths > 0).all()):
            raise UserError("a sample of the calibration set has no token; leave empty ones out.")
        rows, columns = mask.nonzero(as_tuple=True)
        number = (mask.long().cumsum(1) - 1)[rows, columns]  # of a real token within its sample
        wanted = {distance.token for distance in distances if distance.token is not None}
        is_place = {
            token: number == (lengths[rows] - 1 if token == LAST else token) for token in wanted
        }
        is_all = any(distance.token is None for distance in distances)
        kept = torch.ones_like(rows, dtype=torch.bool)
        if not is_all:
            kept = torch.stack(list(is_place.values())).any(0)
        places = {token: found[kept].nonzero()[:, 0] for token, found in is_place.items()}
        index = (rows * mask.shape[1] + columns)[kept]
        return cls(index, 1 / lengths.double()[rows[kept]], places, len(mask), is_all)


@dataclass
class Sums:
    """Distances of all blocks of a stack, added up over samples, each of weight 1.

    Attributes:
        distances: what is measured; not `LINEAR_FIT`.
        layers: of the stack.
        totals: (distances, layers + 1, layers + 1), float64, from a state to a state.
        counts: samples that each distance could be taken of; shorter ones have no i-th token.
    """

    distances: Sequence[Distance]
    layers: int
    totals: Tensor = field(init=False)
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        size = self.layers + 1
        self.totals = torch.zeros(len(self.distances), size, size, dtype=torch.float64)
        self.counts = [0] * len(self.distances)

    def add(self, states: Sequence[Tensor], tokens: Tokens) -> None:
        """Add a batch.

        Args:
            states: what enters layer 0 and what leaves each layer: (tokens, features) each.
            tokens: which ones they are.

        Raises:
            ShapeError: another number of states than the stack has.
        """
        if len(states) != self.layers + 1:
            raise ShapeError(f"{len(states)} states, {self.layers + 1} were expected.")
        for place, index in tokens.places.items():
            chosen = [i for i, distance in enumerate(self.distances) if distance.token == place]
            for part in index.split(CHUNK):
                gram = _gram(states, part)
                for i in chosen:
                    self.totals[i] += FORMULAS[self.distances[i].formula](gram).sum(0).cpu()
            for i in chosen:
                self.counts[i] += len(index)
        chosen = [i for i, distance in enumerate(self.distances) if distance.token is None]
        for part in torch.arange(len(tokens.index) if chosen else 0).split(CHUNK):
            gram = _gram(states, part)
            weight = tokens.weight[part.to(tokens.weight.device)].to(gram.device)
            for i in chosen:
                values = FORMULAS[self.distances[i].formula](gram)
                self.totals[i] += torch.einsum("n,nab->ab", weight, values).cpu()
        for i in chosen:
            self.counts[i] += tokens.samples

    def results(self) -> list[Tensor]:
        """Return the mean distance of every block by each distance, see `by_block`."""
        return [
            by_block(total / count if count else torch.full_like(total, torch.nan))
            for total, count in zip(self.totals, self.counts, strict=True)
        ]


def by_block(distances: Tensor) -> Tensor:
    """Arrange distances between states by the block of layers between them.

    Args:
        distances: (layers + 1, layers + 1), from state to state.

    Returns:
        (layers, layers) float64 by block size - 1 and first layer; unused cells are NaN.
    """
    layers = len(distances) - 1
    result = torch.full((layers, layers), torch.nan, dtype=torch.float64)
    for size in range(1, layers + 1):
        result[size - 1, : layers - size + 1] = distances.diagonal(size)
    return result


def _gram(states: Sequence[Tensor], index: Tensor) -> Tensor:
    """Inner products of all states of each of some tokens: (tokens, states, states), float64."""
    # float32 would lose the angle between states that hardly differ; layers may be on many devices
    device = states[0].device
    stacked = torch.stack([s[index.to(s.device)].to(device).double() for s in states], 1)
    return stacked @ stacked.transpose(1, 2)
