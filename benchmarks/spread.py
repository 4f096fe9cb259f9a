"""Medians with their spread, alternating repeats, and where a falling curve meets a level."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: put before a figure that was not measured whole
EXTRAPOLATED = "~"


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `count` values."""

    median: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 3, mark: str = "") -> str:
        """Write it as `median (low to high)`; equal values, as written, have no spread."""
        middle, low, high = (number(x, digits) for x in (self.median, self.low, self.high))
        return mark + (middle if low == high else f"{middle} ({low} to {high})")


def of(values: Sequence[float]) -> Spread:
    """Median and spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def number(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, never as a power of ten."""
    if value == 0 or value != value:
        return "0" if value == 0 else "not a number"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    return f"{float(text):,.0f}" if abs(value) >= 1 else f"{float(text):.10f}".rstrip("0")


def alternate(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Call every side in turn, `repeats` times round, so that all meet the same disturbances.

    Returns:
        The values of each side, in order; the i-th values of two sides belong together.
    """
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            found[name].append(call())
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Spread of the ratios of values that belong together."""
    return of([one / other for one, other in zip(above, below, strict=True)])


@dataclass(frozen=True)
class Crossing:
    """Where a curve reaches a level; `is_between` says that it lies between two measured points."""

    place: float
    is_between: bool


def crossing(points: Sequence[tuple[float, float]], level: float) -> Crossing | None:
    """Find the first place at which a curve is at or below a level.

    Args:
        points: (place, value), places ascending; straight lines between them.
        level: the value to reach.

    Returns:
        None where no point reaches it.
    """
    before: tuple[float, float] | None = None
    for place, value in points:
        if value <= level:
            if before is None or value == level:
                return Crossing(place, False)
            share = (before[1] - level) / (before[1] - value)
            return Crossing(before[0] + share * (place - before[0]), True)
        before = (place, value)
    return None
