"""The tables of what is supported, made of the registries, and how far each cell was tried."""

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


def families_table() -> str:
    """Return the families with their model types and tasks, as Markdown."""
    lines = [["family", "`config.model_type`", "tasks"], ["---"] * 3]
    for family in families.FAMILIES:
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        lines.append([family.name, types, ", ".join(_tasks_of(family))])
    return _markdown(lines)


def marks() -> dict[tuple[str, str], str]:
    """Return the marks of every family and task, by their names: one for each of `columns()`."""
    real = real_runs()
    with_weights = {(family, kind, method) for family, _, kind, method in real}

    def mark(family: str, task: str, kind: str, method: str) -> str:
        if (family, task, kind, method) in real:
            return TASK
        return WEIGHTS if (family, kind, method) in with_weights else TINY

    return {
        (family.name, task.name): "".join(mark(family.name, task.name, *one) for one in columns())
        for family, task in rows()
    }


def table() -> str:
    """Return how far everything was tried, as Markdown: methods by families and tasks.

    Methods of a kind share a row, and pairs of family and task a column, where all their marks are
    equal.
    """
    of_pair = marks()
    heads = _grouped(of_pair)
    lines = [["what is pruned", *map(_head, heads)], ["---"] * (1 + len(heads))]
    of_column = {
        column: (column[0], *(of_pair[pairs[0]][i] for pairs in heads))
        for i, column in enumerate(columns())
    }
    for group in _grouped(of_column):
        kind, *cells = of_column[group[0]]
        names = ", ".join(name if name == REMOVAL else f"`{name}`" for _, name in group)
        lines.append([f"{kind}: {names}", *cells])
    return _markdown(lines)


def _grouped(values: dict[tuple[str, str], Any]) -> list[list[tuple[str, str]]]:
    """Keys with equal values, together where the first of them stands."""
    groups: dict[Any, list[tuple[str, str]]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return list(groups.values())


def _head(group: list[tuple[str, str]]) -> str:
    """Name families, with their tasks where these are not all in the group."""
    tasks_of: dict[str, list[str]] = {}
    for family, task in group:
        tasks_of.setdefault(family, []).append(task)
    whole = {family.name: _tasks_of(family) for family in families.FAMILIES}
    return "; ".join(
        name if found == whole[name] else f"{name}: {', '.join(found)}"
        for name, found in tasks_of.items()
    )


def _tasks_of(family: Family) -> list[str]:
    return [task.name for one, task in rows() if one is family]


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
