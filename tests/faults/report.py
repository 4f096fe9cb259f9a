"""The page docs/reliability.md, written from the trials of a whole run."""

import os
import platform
from collections import Counter
from pathlib import Path

import torch
import transformers

import composable
from tests.faults.runner import OUTCOMES, Trial
from tests.paths import ROOT

PAGE = ROOT / "docs" / "reliability.md"
#: Fault -> its heading, what one row is, what was done.
FAULTS = {
    "random damage": (
        "Random damage",
        "In each trial one file is damaged once: one bit is flipped, bytes are cut off, appended, "
        "zeroed, replaced, exchanged, written twice or left out.",
    ),
    "crafted content": (
        "Crafted contents",
        "In each trial one place of a file is edited: a number, a type, a name, a shape, a size, a "
        "key more, less or twice, NaN, deep nests, control characters. Checksums and seals are "
        "made right again, so that only the content can be refused.",
    ),
    "kept cases": (
        "Cases that failed once",
        "Found by earlier runs or written by hand; they lie in `tests/faults/found`.",
    ),
    "killed": (
        "Killed, interrupted, out of disk",
        "Each command is killed before every change that it makes to a file, and at 20 random "
        "times; it is sent SIGTERM and SIGHUP; the disk is full from every change on. Then the "
        "same command runs again. *Survived* says that its files then have the bytes of an "
        "undisturbed run, and that nothing is left lying about.",
    ),
    "put together wrongly": (
        "What does not belong together, and what attacks",
        "Files of another model or other texts; pickles that would run code; archives and links "
        "that lead elsewhere or unpack to gigabytes; an output that is an input; pipes; two equal "
        "runs at once; models that are overwritten in place while they are read. *Survived* says "
        "that nothing was run, written or lost that should not be, and that the result is that "
        "of an undisturbed run.",
    ),
}  # fmt: skip
#: What was measured before these faults were mended: rows of this page -> words.
BEFORE = {
    ("random damage", "checkpoint of a training"): "of 220: 26 other results, 100 tracebacks",
    ("random damage", "parts of least squares"): "of 293 (with hybrid): 152 accepted",
    ("random damage", "parts of hybrid"): "see above",
    ("crafted content", "scores.npz of layers"): "of 289: 54 tracebacks",
    ("crafted content", "scores.npz of units"): "see above",
    ("crafted content", "bundle modules.npy"): "of 36 in block-level fine-tuning: 24 tracebacks",
    ("crafted content", ".gguf"): "of 160: 8 tracebacks",
    ("put together wrongly", "overwritten while read: prune.py"): "of 10: 9 other results",
    ("put together wrongly", "overwritten while read: compose_model.py"): "of 10: 7 other results",
}


def missing(trials: list[Trial]) -> list[str]:
    """What a whole run has, and these trials have not."""
    from tests.faults.checkpoints import CHECKPOINTS
    from tests.faults.kills import COMMANDS
    from tests.faults.kinds import KINDS

    counts = Counter((trial.fault, trial.kind) for trial in trials)
    names = [*KINDS, *CHECKPOINTS]
    wanted = {(fault, name): 250 for fault in list(FAULTS)[:2] for name in names}
    wanted |= {("killed", name): 20 for name in COMMANDS}
    return [f"{name}: {fault}" for (fault, name), n in wanted.items() if counts[fault, name] < n]


def write(trials: list[Trial], page: Path = PAGE) -> bool:
    """Write the page, but not from a part of a run; tell whether it was."""
    if missing(trials):
        return False
    page.write_text(text(trials), encoding="utf-8")
    return True


def text(trials: list[Trial]) -> str:
    """The page."""
    total = Counter(trial.outcome for trial in trials)
    lines = [
        "# What happens when files are damaged and runs are disturbed",
        "",
        "Written by `make faults`, which damages every file that the program reads, kills every "
        "command, and tries what does not belong together. Tiny models, a CPU.",
        "",
        f"{len(trials):,} trials: " + ", ".join(f"{total[o]:,} {WORDS[o]}" for o in OUTCOMES) + ".",
        "",
        *(f"- *{word.capitalize()}*: {MEANING[word]}" for word in MEANING),
        "",
    ]
    for fault, (heading, about) in FAULTS.items():
        lines += [f"## {heading}", "", about, "", *_table(trials, fault), ""]
    return "\n".join([*lines, "## Settings", "", *_settings(), ""])


WORDS = {
    "refused": "refused cleanly",
    "survived": "survived",
    "another file": "read as another file",
    "another result": "accepted with another result",
    "traceback": "tracebacks",
    "hang": "hangs",
}
MEANING = {
    "refused cleanly": "one line that says what is wrong, exit code 1 or 2.",
    "survived": "the result of the sound file.",
    "read as another file": "a file without a checksum (text, another program's), or an edit "
    "that gives another sound content: no program could tell.",
    "accepted with another result": "silently wrong; must be 0.",
    "tracebacks": "also crashes, and messages that are not one clean line; must be 0.",
    "hangs": "also more than 1 GB of memory; must be 0.",
}


def _table(trials: list[Trial], fault: str) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for trial in trials:
        if trial.fault == fault:
            counts.setdefault(trial.kind, Counter())[trial.outcome] += 1
    head = ["what", "trials", *(WORDS[each] for each in OUTCOMES), "before"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * 7 + "|---|"]
    for kind, found in counts.items():
        cells = [kind, found.total(), *(found[each] for each in OUTCOMES)]
        lines.append("| " + " | ".join(map(str, [*cells, BEFORE.get((fault, kind), "")])) + " |")
    return lines


def _settings() -> list[str]:
    return [
        "Seeds are the CRC-32 of a row's name, plus the number of the trial. "
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"composable {composable.__version__}.",
    ]
