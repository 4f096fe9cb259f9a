"""What matters in a whole model, measured once; scores and a wanted size to a configuration."""

from composable.errors import UserError
from composable.ranking.base import Ranker
from composable.ranking.layer_distance import LAYER_DISTANCE
from composable.ranking.unit_weights import L1, RANDOM

RANKERS: tuple[Ranker, ...] = (LAYER_DISTANCE, L1, RANDOM)

__all__ = ["RANKERS", "Ranker", "by_name"]


def by_name(name: str) -> Ranker:
    """Find a ranker.

    Raises:
        UserError: unknown; the message lists the known ones.
    """
    for ranker in RANKERS:
        if ranker.name == name:
            return ranker
    known = ", ".join(ranker.name for ranker in RANKERS)
    raise UserError(f'unknown method "{name}" of measuring importance; known are {known}.')
