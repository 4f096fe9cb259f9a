"""What matters in a whole model, measured once; scores and a wanted size to a configuration."""

from composable.errors import find_named
from composable.ranking.base import Ranker
from composable.ranking.fisher import FISHER
from composable.ranking.layer_distance import LAYER_DISTANCE
from composable.ranking.stat import STAT
from composable.ranking.trajectory import LOGIT_KL, TRAJECTORY
from composable.ranking.unit_weights import L1, RANDOM

RANKERS: tuple[Ranker, ...] = (
    LAYER_DISTANCE, TRAJECTORY, LOGIT_KL, FISHER, STAT, L1, RANDOM,
)  # fmt: skip

__all__ = ["RANKERS", "Ranker", "by_name"]


def by_name(name: str) -> Ranker:
    """Find a ranker, see `find_named`."""
    return find_named(RANKERS, name, "way of measuring importance")
