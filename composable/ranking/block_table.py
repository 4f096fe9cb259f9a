"""Tables of the blocks of layers that change their input least."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from composable.formats.scores import BlockDistances, Scores
from composable.ranking.layer_choice import best_block

log = logging.getLogger("composable")
#: Tables of more blocks go to the report alone.
SHOWN = 16


def block_table(
    distances: BlockDistances, threshold: float | None = None, offset: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the best block of every size, where its distance is at most `threshold`."""
    for size in range(1, distances.layers):
        if np.isnan(distances.values[size - 1 + offset]).all():
            continue
        first, score = best_block(distances, size, offset=offset)
        if threshold is None or score <= threshold:
            yield {"block_size": size, "first": first, "last": first + size - 1, "score": score}


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a block table as Markdown."""
    lines = ["| Block size | Removed layers | Score (avg dist) |", "|---|---|---|"]
    lines += [f"| {r['block_size']} | {r['first']}-{r['last']} | {r['score']:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def tables(scores: Scores) -> dict[str, Any]:
    """Return the best blocks by stack and distance, and log them as tables."""
    found: dict[str, Any] = {}
    for one in scores.distances:
        rows = list(block_table(one))
        found.setdefault(one.stack, {})[one.distance] = rows
        more = f"... {len(rows) - SHOWN} more in the report\n" if len(rows) > SHOWN else ""
        log.info(
            "%s, %s, %d samples:\n%s%s",
            *(one.stack, one.distance, one.samples),
            *(as_markdown(rows[:SHOWN]), more),
        )
    return found
