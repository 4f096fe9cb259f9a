"""The table of what is supported, made of the registries; each cell says how far it was tried."""

import json
from pathlib import Path
from typing import Any

from composable import families, methods, tasks
from composable.families import Family
from composable.families.base import KINDS

#: Marks, each including those before it.
TINY, WEIGHTS, TASK = "○", "◐", "●"
#: What the real runs of docs/results.md did: [{family, task, kind, method}, ...].
RESULTS = Path(__file__).with_name("results.json")
#: What docs/benchmarks.md shows of the embedded T5 on Multi30K.
BENCHMARKS = (
    ("attention", "head_l1"),
    ("attention", "head_gram"),
    ("linear", "l1"),
    ("linear", "alps"),
)
REMOVAL = "rate 1"


def heads_of(task: Any) -> dict[str, Any]:
    """Model type -> class of transformers with the head of a task."""
    import transformers

    auto: Any = getattr(transformers, task.auto_class)
    found: dict[str, Any] = auto._model_mapping._model_mapping
    return found


def is_supported(family: Family, task: Any, model_type: str | None = None) -> bool:
    """Tell whether models of a family, or of one of its types, can do a task."""
    types = family.model_types if model_type is None else (model_type,)
    return family.stacks in task.stacks and any(kind in heads_of(task) for kind in types)


def columns() -> list[tuple[str, str]]:
    """Pairs (kind, method), with the removal of whole modules as a method."""
    found = []
    for kind in KINDS:
        able = [method.name for method in methods.METHODS if kind in method.kinds]
        found += [(kind, name) for name in (*able, *([REMOVAL] if kind != "linear" else []))]
    return found


def rows() -> list[tuple[Family, Any]]:
    """Families and their tasks."""
    known = [tasks.by_name(name) for name in tasks.names()]
    return [(f, task) for f in families.FAMILIES for task in known if is_supported(f, task)]


def real_runs() -> set[tuple[str, str, str, str]]:
    """Family, task, kind and method of what ran with real weights on a real task."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    found = {(run["family"], run["task"], run["kind"], run["method"]) for run in runs}
    return found | {("T5", "translation", *pair) for pair in BENCHMARKS}


def table() -> str:
    """Return the table as Markdown."""
    real = real_runs()
    with_weights = {(family, kind, method) for family, _, kind, method in real}
    head = [
        f"{kind}: `{name}`" if name != REMOVAL else f"{kind}: {name}" for kind, name in columns()
    ]
    lines = [["family", "task", *head], ["---"] * (2 + len(head))]
    for family, task in rows():
        cells = []
        for kind, name in columns():
            is_real = (family.name, task.name, kind, name) in real
            has_weights = (family.name, kind, name) in with_weights
            cells.append(TASK if is_real else WEIGHTS if has_weights else TINY)
        lines.append([family.name, task.name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
