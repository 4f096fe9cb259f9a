"""The log, progress bars, and which process of several this is."""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

log = logging.getLogger("composable")
#: Seconds after which a stage that is usually short gets its bar.
MOMENT = 1.0
#: Seconds after which a stage gets its line where there is no terminal, if it takes as many more.
PATIENCE = 5.0


def is_wanted() -> bool:
    """Tell whether this process shows progress: not with --quiet, and of several processes one."""
    shows = os.environ.get("COMPOSABLE_PROGRESS", "1") == "1"
    return shows and os.environ.get("RANK", "0") == "0"


def shows_bars() -> bool:
    """Tell whether there are progress bars: on a terminal alone, a file would fill with them."""
    return is_wanted() and sys.stderr.isatty()


class Stage(tqdm):  # type: ignore[type-arg]
    """Shows how far work is that may take long, and the time left; used as any `tqdm.tqdm`.

    On a terminal it is a bar. Elsewhere it logs one line, with the time left by then, once the work
    has taken `PATIENCE` seconds and will take as many more.

    Args:
        items: to go through; None where `update` is called instead.
        what: a word or two for what is done, such as "prune".
        total: how many there are; by default the length of `items`.
        unit: what is counted, in the plural.
        is_part: of a stage that shows itself; its bar goes at the end, and it has no line.
        more: further arguments of tqdm, such as `delay`.
    """

    def __init__(
        self,
        items: Iterable[Any] | None,
        what: str,
        total: int | None = None,
        *,
        unit: str,
        is_part: bool = False,
        **more: Any,
    ):
        is_bar = shows_bars()
        self._began = time.monotonic() if is_wanted() and not (is_bar or is_part) else None
        self._what, self._unit, self._first = what, unit, more.get("initial", 0)
        done = "{n_fmt}B/{total_fmt}B" if unit == "B" else "{n_fmt}/{total_fmt} {unit}"
        shape = "{l_bar}{bar}| " + done + " [{elapsed}, {remaining} left]"
        super().__init__(
            items, what, total, unit=unit, leave=not is_part, disable=not is_bar,
            bar_format=None if items is total is None else shape,
            **(_size() if is_bar else {}), **more,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more."""
        if not self.disable:
            return super().update(n)
        self.n += n or 0
        if self._began is not None and self.total and self._first < self.n < self.total:
            self._say(time.monotonic() - self._began, float(self.total))
        return None

    def _say(self, seconds: float, total: float) -> None:
        """Log the line, if it is due."""
        left = seconds * (total - self.n) / (self.n - self._first)
        if min(seconds, left) < PATIENCE:
            return
        self._began = None
        size, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
        log.info(
            "%s: %.0f of %.0f %s, about %s left",
            *(self._what, self.n / size, total / size, unit, duration(left)),
        )


def bytes_of(what: str, total: int) -> Stage:
    """Show how many of `total` bytes are done, where that takes longer than a moment."""
    return Stage(None, what, total, unit="B", unit_scale=True, delay=MOMENT)


def _size() -> dict[str, Any]:
    """Follow the size of the terminal; one that has none, as some recorders, gets 80 by 24."""
    is_known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return {"dynamic_ncols": True} if is_known else {"ncols": 80, "nrows": 24}


def duration(seconds: float) -> str:
    """Say a time as a person would; what is left is never known to the second."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _make_room(record: logging.LogRecord) -> bool:
    """Take bars off the terminal before a line is logged; they are drawn again as they go on."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.clear()
    return True


log.addFilter(_make_room)
