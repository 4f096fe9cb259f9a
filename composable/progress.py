"""The log, progress bars, and which process of several this is."""

import logging
import os

log = logging.getLogger("composable")


def shows_progress() -> bool:
    """Tell whether progress bars are wanted (stderr; off with --quiet)."""
    return os.environ.get("COMPOSABLE_PROGRESS", "1") == "1"
