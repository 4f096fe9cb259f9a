"""Schemes and configurations of the benchmarks: every variant of a kind, uniform or drawn rates."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Configuration = dict[str, Any]


@dataclass(frozen=True)
class Levels:
    """Three rates per kind, mild to strong; `title` says up to which rate."""

    title: str
    attention: tuple[float, ...]
    linear: tuple[float, ...]


#: what composability draws from
MILD = Levels("up to 0.5", (0.1667, 0.3333, 0.5), (0.3, 0.4, 0.5))
STRONG = Levels("up to 0.7", (0.3333, 0.5, 0.6667), (0.5, 0.6, 0.7))
#: the same steps for both kinds, for every module of a model
UNIFORM = Levels("0.3, 0.5, 0.7", (0.3333, 0.5, 0.6667), (0.3, 0.5, 0.7))


def every(names: Sequence[str], rates: Sequence[float]) -> dict[str, list[float]]:
    """Make the scheme in which every module is wanted at every rate."""
    return {name: list(rates) for name in names}


def uniform(rates: Mapping[str, float], modules: Mapping[str, Sequence[str]]) -> Configuration:
    """Give all modules of a kind one rate.

    Args:
        rates: kind -> rate.
        modules: kind -> names.
    """
    return {name: rates[kind] for kind, names in modules.items() for name in names}


def drawn(
    count: int, attentions: Sequence[str], linears: Sequence[str], levels: Levels, seed: int = 0
) -> list[Configuration]:
    """Draw configurations: every module gets one of its kind's levels, each equally likely.

    The first n of a longer list are the list of n.
    """
    generator = random.Random(seed)
    return [
        {name: generator.choice(levels.attention) for name in attentions}
        | {name: generator.choice(levels.linear) for name in linears}
        for _ in range(count)
    ]


def without_outputs(attentions: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Leave out the linears that are parts of an attention."""
    return [name for name in linears if not name.startswith(tuple(f"{a}." for a in attentions))]
