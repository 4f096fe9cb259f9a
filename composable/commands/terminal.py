"""What goes to a terminal: no control characters out of files, no endless words or lines."""

import copy
import json
import logging
import re
from pathlib import Path

LONGEST_WORD, LONGEST_LINE = 240, 1000  # characters


def printable(text: str) -> str:
    """Write every character but line ends that a terminal might obey as JSON does: \\u001b."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Make one line of a message, and cut what a file may have made endless."""
    words = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: _cut(word[0], LONGEST_WORD), text)
    return _cut(printable(" ".join(words.split())), LONGEST_LINE)


def _cut(text: str, length: int) -> str:
    """Leave out the middle of a text that is longer than `length`."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


class Formatter(logging.Formatter):
    """Log messages whose names and values cannot act on a terminal or look like other lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message; only a whole text that is logged as it is keeps its lines."""
        if record.msg != "%s" and isinstance(record.args, tuple):
            record = copy.copy(record)
            record.args = tuple(
                one_line(str(arg)) if isinstance(arg, str | Path) else arg
                for arg in record.args or ()
            )
        return printable(super().format(record))
