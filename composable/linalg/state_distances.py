"""Layer distance: how little a block of layers changes what passes through it.

Sources: Gromov et al. 2024, arXiv 2403.17887 (blocks by angle); Men et al. 2024 (ShortGPT), arXiv
2403.03853 (single layers by cosine); github.com/melisa-writer/short-transformers (the others).
"""

import re
from collections.abc import Callable, Mapping, Sequence
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
_OF_ALL_TOKENS = ("angular_all", "bi_score", "relative_magnitude", "relative_residual", LINEAR_FIT)
_OF_ONE_TOKEN = ("angular", "euclidean", "linear_approximation")
KNOWN = (*_OF_ALL_TOKENS, *(f"{n}_{at}" for n in _OF_ONE_TOKEN for at in ("last", "token:I")))


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
        if name in _OF_ALL_TOKENS:
            return cls(name, name.removesuffix("_all"), None)
        match = re.fullmatch(rf"({'|'.join(_OF_ONE_TOKEN)})_(?:last|token:(\d+))", name)
        if match is None:
            raise UserError(f'unknown distance "{name}"; known are {", ".join(KNOWN)}.')
        return cls(name, match[1], LAST if match[2] is None else int(match[2]))


def _cosine(aa: Tensor, bb: Tensor, ab: Tensor) -> Tensor:
    return ab / (aa.sqrt() * bb.sqrt()).clamp_min(EPSILON)


def _euclidean(aa: Tensor, bb: Tensor, ab: Tensor) -> Tensor:
    return (aa + bb - 2 * ab).clamp_min(0).sqrt()


#: Inner products of a and a, b and b, a and b -> the distance of the states a and b, elementwise.
FORMULAS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    # acos(cos(a, b)) / pi
    "angular": lambda aa, bb, ab: _cosine(aa, bb, ab).clamp(-1, 1).acos() / torch.pi,
    # 1 - cos(a, b)
    "bi_score": lambda aa, bb, ab: 1 - _cosine(aa, bb, ab),
    # |a - b|
    "euclidean": _euclidean,
    # ln of |c a - b|^2 with the one number c that fits best, c = ab / aa
    "linear_approximation": lambda aa, bb, ab: (
        (bb - ab.square() / aa).clamp_min(torch.finfo(ab.dtype).tiny).log()
    ),
    # |b| / (|a + b| + eps)
    "relative_magnitude": lambda aa, bb, ab: (
        bb.sqrt() / ((aa + bb + 2 * ab).clamp_min(0).sqrt() + EPSILON)
    ),
    # |b - a| / (|b| + eps)
    "relative_residual": lambda aa, bb, ab: _euclidean(aa, bb, ab) / (bb.sqrt() + EPSILON),
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
                products = _inner_products(states, part)
                for i in chosen:
                    self.totals[i] += FORMULAS[self.distances[i].formula](*products).sum(0).cpu()
            for i in chosen:
                self.counts[i] += len(index)
        chosen = [i for i, distance in enumerate(self.distances) if distance.token is None]
        for part in torch.arange(len(tokens.index) if chosen else 0).split(CHUNK):
            products = _inner_products(states, part)
            weight = tokens.weight[part.to(tokens.weight.device)].to(states[0].device)
            for i in chosen:
                values = FORMULAS[self.distances[i].formula](*products)
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


def _inner_products(states: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply all states a with all states b of each of some tokens.

    Returns:
        aa, bb and ab, which broadcast to (tokens, states, states), float64, by token, a and b.
    """
    # float32 would lose the angle between states that hardly differ; layers may be on many devices
    device = states[0].device
    stacked = torch.stack([s[index.to(s.device)].to(device).double() for s in states], 1)
    products = stacked @ stacked.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    return squares[:, :, None], squares[:, None, :], products
