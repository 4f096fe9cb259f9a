"""docs/benchmarks.md: sections, tables and pictures; one section is replaced at a time."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import machine

RESULTS = """# Results on real models and data

Written by `python benchmarks/run.py NAMES --data FOLDER` (with `sst2`, `stsb`, `wikitext-2`, `ptb`
and `multi30k` in it), all but the first section; do not edit. More on English to German:
[benchmarks.md](benchmarks.md).
"""
INTRO = """# Benchmarks

Written by `make bench` and `make bench-gpu` (`python benchmarks/run.py`); do not edit. A section
has the machine, versions and day of its own runs.

- A ratio is the median over pairs of runs made in turns, or over configurations or variants; in
  brackets the smallest and the largest.
- CPU seconds are of the whole process with one thread, imports included, unless something else is
  said; seconds on a GPU are wall seconds. `~`: extrapolated.
- Losses are cross-entropies in nats per target token on the validation split.
"""


#: Packages whose versions a page names; the JSON of a section has them all.
SHOWN = ("torch", "transformers")


@dataclass
class Table:
    """Rows of ready texts.

    Attributes:
        header: names of the columns.
        rows: as many texts in each.
        title: a sentence above it.
        note: a sentence below it.
    """

    header: list[str]
    rows: list[list[str]]
    title: str = ""
    note: str = ""

    def markdown(self) -> str:
        """Write it as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        if len({len(line) for line in lines}) != 1:
            raise ValueError(f"table {self.title!r}: rows of unequal length")
        table = "\n".join(f"|{'|'.join(line)}|" for line in lines)
        return "\n\n".join(part for part in (self.title, table, self.note) if part)


@dataclass
class Section:
    """What one benchmark found.

    Attributes:
        title: heading.
        tables: in order.
        notes: how it was measured, and what does not hold.
        figures: the raw numbers, for programs.
        picture: a PNG, written beside the page.
        picture_text: what it shows.
        facts: `machine.describe` of its runs (several where they were made at several commits).
        seconds: of all its runs together.
    """

    title: str
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    picture: bytes | None = None
    picture_text: str = ""
    facts: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self, picture_name: str | None) -> dict[str, Any]:
        """Return what is kept; the picture lies beside the page."""
        return {**asdict(self), "picture": picture_name}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "tuple[Section, str | None]":
        """Return a section without its picture, and the picture's name."""
        stored = dict(value)
        name = stored.pop("picture")
        stored["tables"] = [Table(**table) for table in stored["tables"]]
        return cls(**stored), name


def markdown(key: str, section: Section, picture: str | None) -> str:
    """Write a section, between the marks by which it is found again.

    Args:
        key: name of the benchmark, with `_cuda` where a GPU did it.
        section: its content.
        picture: file name of its picture.
    """
    parts = [
        f"## {section.title}",
        f"`python benchmarks/run.py {command(key)}` took {section.seconds / 60:.1f} minutes.",
        *(f"*{line}*" for line in origin(section)),
        *(table.markdown() for table in section.tables),
    ]
    if picture:
        parts.append(f"![{section.picture_text}]({picture})")
    if section.notes:
        parts.append("\n".join(f"- {note}" for note in section.notes))
    return _marked(key, "\n\n".join(parts))


def command(key: str) -> str:
    """Turn a section's key into the words that make it."""
    name, gpu, _ = key.partition("_cuda")
    return f"{name} --device cuda" if gpu else name


def origin(section: Section) -> list[str]:
    """Say what a section comes from: each machine, with the states of the code."""
    lines: dict[str, tuple[set[str], set[str]]] = {}
    for facts in section.facts:
        found = {name: facts["versions"][name] for name in SHOWN if name in facts["versions"]}
        versions = ", ".join(f"{name} {value}" for name, value in found.items())
        states, dates = lines.setdefault(f"{machine.name(facts)}; {versions}", (set(), set()))
        states.update(_state(facts))
        dates.add(facts["date"])
    return [
        line + (f"; code at {', '.join(sorted(_named(states)))}" if states else "")
        + f"; {' and '.join(sorted(dates))}."
        for line, (states, dates) in lines.items()
    ]  # fmt: skip


def _named(states: set[str]) -> list[str]:
    """Each commit once: where some runs were made with changes, the changed one."""
    return [state for state in states if f"{state} with changes" not in states]


def _state(facts: dict[str, Any]) -> list[str]:
    if facts["commit"] is None:
        return []
    return [f"{facts['commit']}{' with changes' if facts['is_changed'] else ''}"]


def _marked(key: str, text: str) -> str:
    return f"<!-- benchmark {key} -->\n{text}\n<!-- /benchmark {key} -->\n"


def split(page: str) -> dict[str, str]:
    """Find the sections of a page by their keys, marks included."""
    found = re.finditer(r"<!-- benchmark (\w+) -->\n.*?<!-- /benchmark \1 -->\n", page, re.S)
    return {match[1]: match[0] for match in found}


def replace(page: str, new: dict[str, str], order: list[str], intro: str = INTRO) -> str:
    """Put new sections into a page; the others stay as they are.

    Args:
        page: the present text, empty where there is none.
        new: key -> section, as `markdown` writes it.
        order: all keys, in the order of the page; a section of another key is dropped.
        intro: what stands before the sections.
    """
    sections = {**split(page), **new}
    return "\n".join([intro, *(sections[key] for key in order if key in sections)])
