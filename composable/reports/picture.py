"""What pictures share: words that are drawn as they are, panels, and the bytes of a PNG."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from composable.errors import as_user_error, shortened

LONGEST_TEXT = 120  # characters
MOST_PIXELS, LONGEST_SIDE = 10**8, 60_000


@dataclass(frozen=True)
class Panel:
    """A part of a picture.

    Attributes:
        width, height: in inches, at least.
        draw: draws it into a subfigure, which is wider where another panel is.
    """

    width: float
    height: float
    draw: Callable[[Any], None]


def words(text: str) -> str:
    """Make a name one that can be drawn: dollars are no formula, control characters not there."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in shortened(text, LONGEST_TEXT))
    return shown.replace("$", r"\$")


def dots_per_inch(width: float, height: float, usual: float) -> float:
    """Return the usual resolution, or a lower one where the picture, in inches, is too large."""
    most = min(LONGEST_SIDE / max(width, height), (MOST_PIXELS / (width * height)) ** 0.5)
    return min(usual, most)


def png_of(figure: Any) -> bytes:
    """Draw a figure; equal figures give equal bytes with the same matplotlib.

    Raises:
        UserError: it cannot be drawn.
    """
    buffer = io.BytesIO()
    with as_user_error("the picture cannot be drawn"):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
