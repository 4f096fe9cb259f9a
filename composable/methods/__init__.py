"""What goes in a module at a rate: one file a method, each of one paper, and the table of them."""

from collections.abc import Mapping

from composable.errors import find_named
from composable.methods.alps import ALPS
from composable.methods.base import Evidence, Method, Pruned
from composable.methods.exchange import EXCHANGE
from composable.methods.fluctuation import FLUCTUATION
from composable.methods.head_gram import HEAD_GRAM
from composable.methods.head_l1 import HEAD_L1
from composable.methods.l1 import L1
from composable.methods.linear_map import LINEAR_MAP
from composable.methods.neuron_l1 import NEURON_L1
from composable.methods.obs import OBS
from composable.methods.random import RANDOM
from composable.methods.ranked import RANKED
from composable.methods.sparsegpt import SPARSEGPT
from composable.methods.stat import STAT
from composable.methods.unit_wanda import UNIT_WANDA
from composable.methods.wanda import WANDA, WANDA_MATRIX

METHODS: tuple[Method, ...] = (
    *(L1, WANDA, WANDA_MATRIX, OBS, SPARSEGPT, ALPS),
    *(HEAD_L1, HEAD_GRAM),
    *(NEURON_L1, EXCHANGE),
    *(STAT, UNIT_WANDA, FLUCTUATION, RANKED, RANDOM),
    LINEAR_MAP,
)
#: The method for a plain rate, by kind of module.
DEFAULTS = {"linear": L1, "attention": HEAD_GRAM, "ffn": EXCHANGE}

__all__ = ["DEFAULTS", "METHODS", "RANKED", "Evidence", "Method", "Pruned", "by_name", "for_kind"]


def by_name(name: str) -> Method:
    """Find a method, see `find_named`."""
    return find_named(METHODS, name, "method")


def for_kind(kind: str, chosen: Mapping[str, str] | None = None) -> Method | None:
    """Return the method for plain rates of a kind: the one that was chosen, else the default."""
    name = (chosen or {}).get(kind)
    return by_name(name) if name else DEFAULTS.get(kind)
