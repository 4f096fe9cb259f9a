#!/usr/bin/env python3
"""Lay out what selectors_probe.py measured: tables, verdicts and the picture of docs/results.md.

python benchmarks/selectors_page.py out/bench/runs/selectors_probe-*/rows.json --page out/try.md

Run so, it writes the sections of whatever rows there are, also those of an interrupted run;
`benchmarks/run.py permuted selectors` does it by itself.
"""

import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.page import Section, Table
from benchmarks.selectors_picture import draw
from benchmarks.selectors_probe import CORRECTORS
from benchmarks.spread import number

#: Rows of a table.
ORDER = ("trajectory", "logit_kl", "fisher", "stat", "unit_wanda", "default", "l1", "random")
NAMES = {"none": "pruned", "tuned": "tuned masks", "ls": "refitted"}
#: Of the kept MACs: how much `trajectory` may lose, and by how much it beats l1, at least.
ACCEPTED = {0.7: (1.5, 5.0), 0.5: (4.0, 12.0), 0.4: (6.0, 15.0)}
Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model of the page.

    Attributes:
        what: one line on it and its data.
        family: in the support table.
        task: name.
        kept: what the sizes are shares of.
    """

    what: str
    family: str
    task: str
    kept: str = "MACs"


PERMUTED = {
    "permuted": Model(
        'all-MiniLM-L6-v2 fine-tuned on "are four words of this caption permuted?"',
        "BERT", "text_classification",
    ),
    "permuted_cpu": Model("The same task, another training, on a CPU", "BERT",
                          "text_classification"),
}  # fmt: skip
OTHERS = {
    "sst2": Model("all-MiniLM-L6-v2 on SST-2", "BERT", "text_classification"),
    "t5": Model("the embedded T5 (4.25 M parameters) on Multi30K", "T5", "translation"),
    "smollm2": Model(
        "SmolLM2-135M-Instruct on WikiText-2", "Llama", "language_modeling", "layer-parameters"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """All rows of one model.

    Attributes:
        model: which.
        dense: name, value, signature and loss of the dense model.
        rows: see `selectors_probe.Trial.follow`.
    """

    model: Model
    dense: dict[str, Any]
    rows: list[Row]

    @property
    def sizes(self) -> list[float]:
        """Shares kept, the largest first."""
        return sorted({row["size"] for row in self.rows}, reverse=True)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Selectors with their allocations, see `ORDER`."""
        found = dict.fromkeys((row["selector"], row["allocation"]) for row in self.rows)
        return sorted(found, key=lambda pair: ORDER.index(pair[0]))

    @property
    def sign(self) -> int:
        """1 where a higher score is better, -1 where a lower one is."""
        return -1 if self.dense["name"] == "perplexity" else 1

    def score(self, pair: tuple[str, str], size: float, corrector: str) -> float | None:
        """Mean over the seeds; None where it was not measured."""
        values = [
            row["score"]
            for row in self.rows
            if (row["selector"], row["allocation"]) == pair
            and (row["size"], row["corrector"]) == (size, corrector)
        ]
        return statistics.mean(values) if values else None


def merge(paths: Iterable[Path]) -> tuple[dict[str, Found], list[dict[str, Any]], float]:
    """Read rows; those of one model may be in several files.

    Returns:
        Name of the model -> what was found, facts of all machines, seconds of all runs together.
    """
    from composable import files

    known = PERMUTED | OTHERS
    found: dict[str, Found] = {}
    facts: dict[str, dict[str, Any]] = {}
    seconds = 0.0
    for path in paths:
        read = files.read_json(path)
        if "dense" in read:
            name = read["name"]
            found.setdefault(name, Found(known[name], read["dense"], [])).rows.extend(read["rows"])
            facts[files.canonical_json(read["facts"])] = read["facts"]
            seconds += read.get("seconds", 0.0)
    return found, [facts[key] for key in sorted(facts)], seconds


def table_of(found: Found) -> Table:
    """Lay out one model: selectors and allocations by sizes and correctors."""
    columns = [(size, corrector) for size in found.sizes for corrector in CORRECTORS]
    rows = []
    for pair in found.pairs:
        values = [found.score(pair, *column) for column in columns]
        seconds = [row["rank_seconds"] for row in found.rows if row["selector"] == pair[0]]
        cells = ["" if value is None else f"{value:,.2f}" for value in values]
        rows.append([f"`{pair[0]}`", pair[1], *cells, number(statistics.mean(seconds), 2)])
    dense = found.dense
    header = [f"{size:.0%} {NAMES[corrector]}" for size, corrector in columns]
    return Table(
        ["chosen by", "allocation", *header, "s to rank"], rows,
        title=f"**{found.model.what}.** {dense['name']} by the share of the {found.model.kept} "
        f"that stays; dense {dense['value']:.2f}.",
        note=verdict(found),
    )  # fmt: skip


def verdict(found: Found) -> str:
    """Say how often tuned masks are better than both the refit and no correction."""
    gains = []
    for pair, size in itertools.product(found.pairs, found.sizes):
        scores = {name: found.score(pair, size, name) for name in CORRECTORS}
        if None not in scores.values():
            best = max(found.sign * scores[name] for name in ("none", "ls"))
            gains.append(found.sign * scores["tuned"] - best)
    ahead = [gain for gain in gains if gain > 0]
    most = f", by {max(ahead):,.2f} at most" if ahead else ""
    return f"Tuned masks are the best of the three in {len(ahead)} of {len(gains)} cases{most}."


def acceptance(found: Found) -> Table:
    """Compare `trajectory` with the dense model and with l1, all as pruned."""
    rows = []
    for size, (most, least) in ACCEPTED.items():
        ours = found.score(("trajectory", "global"), size, "none")
        rivals = [found.score(("l1", how), size, "none") for how in ("global", "uniform")]
        known = [value for value in rivals if value is not None]
        if ours is None or not known:
            continue
        lost, ahead = found.dense["value"] - ours, ours - max(known)
        rows.append([f"{size:.0%}", f"{ours:.2f}", f"{lost:.2f}", f"{most}",
                     f"{max(known):.2f}", f"{ahead:.2f}", f"{least:g}"])  # fmt: skip
    return Table(
        ["MACs", "`trajectory`, `global`", "lost", "at most", "`l1`, the better", "ahead",
         "at least"], rows,
        title="**What was to be reached**, as pruned: no refit, no tuned masks, no training, "
        "`--grid 16`.",
    )  # fmt: skip


def section_of(title: str, found: dict[str, Found], notes: Sequence[str]) -> Section:
    """Make a section of some models.

    Args:
        title: heading.
        found: the models.
        notes: how it was measured.
    """
    tables = []
    for name, each in found.items():
        tables += [table_of(each), *([acceptance(each)] if name in PERMUTED else [])]
    signatures = "; ".join(f"`{each.dense['signature']}`" for each in found.values())
    ran = [
        {"family": each.model.family, "task": each.model.task, "kind": kind, "method": "ranked"}
        for each in found.values()
        for kind in ("attention", "ffn")
    ]
    raw = {name: {"dense": each.dense, "rows": each.rows} for name, each in found.items()}
    return Section(
        title, tables, [*notes, f"Scored in float32. {signatures}."], {"ran": ran, "found": raw},
        picture=draw(found), picture_text="Scores by selector and allocation, for every corrector",
    )  # fmt: skip


NOTES = [
    "`tuned masks`: one least-squares scale for every unit that stays, folded into what reads it "
    "(Kwon et al. 2022), from the dense model's second moments; `refitted`: `--solver ls`. Nothing "
    "is trained. Both look at 65,536 tokens of the training split.",
    "`global` compares all heads and neurons of the model, with widths on a grid of sixteenths, "
    "`stat` divides by the errors of STAT, `uniform` gives all modules the same share. `default`: "
    "what prune.py chooses by itself (`head_gram`, `exchange`); `random`: the mean of three draws. "
    "MACs are those of samples of the mean length.",
]
SMALL = "`trajectory` and `logit_kl` looked at {few}, `fisher` at 512 samples with their labels."


def permuted_section(found: dict[str, Found]) -> Section:
    """Make the section of the task of permuted captions."""
    few = SMALL.format(few="10 training captions of 14 tokens")
    notes = [
        "1,000 examples of test_2016_flickr, so that 0.8 points at 93 % and 1.6 at 60 % are one "
        "standard error; the same examples in every row. `benchmarks/train_permuted.py` makes the "
        "task.", few, *NOTES,
    ]  # fmt: skip
    return section_of("Selectors without training: permuted captions", found, notes)


def selectors_section(found: dict[str, Found]) -> Section:
    """Make the section of the other models."""
    few = SMALL.format(
        few="256 tokens of the training split (of SmolLM2 at a window of 512, by `--group 16`)"
    )
    return section_of("Selectors and correctors", found, [few, *NOTES])


@click.command()
@click.argument("rows", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("out/bench"), help="For the JSON."
)
@click.option("--page", type=click.Path(path_type=Path), required=True, help="Page to write into.")
def main(rows: tuple[Path, ...], out: Path, page: Path) -> None:
    """Write the sections of all models that ROWS are of."""
    from benchmarks import run
    from composable import files

    names = {path: files.read_json(path)["name"] for path in rows}
    for key, known, make in (
        ("permuted", PERMUTED, permuted_section), ("selectors", OTHERS, selectors_section),
    ):  # fmt: skip
        found, facts, seconds = merge(path for path in rows if names[path] in known)
        if found:
            section = make({name: found[name] for name in known if name in found})
            section.facts, section.seconds = facts, seconds
            run.keep(out, key, section, page)


if __name__ == "__main__":
    main()
