"""Crafted contents: one edit in what a file says, drawn by hypothesis, then sealed again."""

import json
import math
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

#: Stands for what JSON of an edit cannot say; `spelled` puts it in.
MARKS: dict[str, Any] = {
    "@nan": math.nan,
    "@inf": math.inf,
    "@long": "x" * 100_000,
    "@deep": "@deep",
}
#: Values that are wrong in most places, or on the edge of what is right.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e-9, 1e308, -1e308, 2**31, 2**53, 2**63,
    2**64 + 1, 10**30, "@nan", "@inf", "@long", "@deep", "", " ", "0", "4", "0.5", "auto", "NaN",
    "None", "null", "\x1b[31mred\x07\r", "\u202e\u0000", "é", "../../x", "/etc/passwd", "a\nb",
    "encoder.block.99999999999", [], {}, [[]], [0], [None], {"a": 1}, [1, 2], {"rate": 0.5},
)  # fmt: skip
DOS = ("set", "set", "set", "set", "near", "delete", "add", "rename", "twice", "reverse", "wrap")
_text = st.text(st.characters(codec="utf-8"), max_size=8)
_plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text
_drawn = st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3)
)
EDIT = st.fixed_dictionaries(
    {
        "at": st.integers(0, 10**9),
        "do": st.sampled_from(DOS),
        "with": st.sampled_from(VALUES) | st.sampled_from(VALUES) | _drawn,
    }
)
Edit = dict[str, Any]
Path = tuple[Any, ...]


def edits(count: int, number: int) -> list[Edit]:
    """Draw so many different edits; the same for the same number."""
    found: dict[str, Edit] = {}

    @settings(
        max_examples=2 * count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @seed(number)
    @given(EDIT)
    def collect(edit: Edit) -> None:
        found.setdefault(json.dumps(edit), edit)

    collect()
    return list(found.values())[:count]


def places(tree: Any, path: Path = ()) -> list[Path]:
    """Paths of everything in a tree of dicts, lists, arrays and values, the root left out."""
    found = [path] if path else []
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if is_list(tree) else ()
    for key in keys:
        found += places(tree[key], (*path, key))
    return found


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def apply(tree: Any, edit: Edit) -> tuple[Any, Path, bool]:
    """Make one edit.

    Returns:
        The tree; where it was edited; whether it may still be a sound file: a value of the
        same type, a key or an item less, another order.
    """
    if "path" in edit:
        path: Path = tuple(edit["path"])
    else:
        found = places(tree)
        # half of the edits at the top three levels, which are few among thousands of numbers
        chosen = [path for path in found if len(path) <= 3] if edit["at"] % 2 else found
        path = chosen[edit["at"] // 2 % len(chosen)]
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    old = parent.get(key) if isinstance(parent, dict) else parent[key]
    value = edit.get("with")
    value = MARKS.get(value, value) if isinstance(value, str) else value
    do = edit["do"]
    if is_array(old) and do != "delete":
        parent[key], sound = _edit_array(old, edit.get("at", 0) // 2)
        return tree, path, sound
    if do == "delete":
        del parent[key]
    elif do == "add" and isinstance(parent, dict):
        parent["unknown" if edit.get("at", 0) % 3 else "\x1b[31m"] = value
        return tree, path, False
    elif do == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
    elif do == "twice":
        if isinstance(parent, dict):
            parent[f"@twice {key}"] = value
            return tree, path, False
        parent.insert(key, old)
    elif do == "reverse" and is_list(parent):
        parent.reverse()
    elif do == "wrap":
        parent[key] = [old]
        return tree, path, False
    elif do == "near" and type(old) in (int, float):
        parent[key] = old + (1, -1, 0.5, old)[edit.get("at", 0) % 4]
    else:
        parent[key] = value
        return tree, path, same_type(old, value)
    return tree, path, True


def same_type(old: Any, new: Any) -> bool:
    """Whether a value may stand where another one was, as far as its type says."""
    if type(new) is float and not math.isfinite(new):
        return False
    kinds = [float if type(value) in (int, float) else type(value) for value in (old, new)]
    return old is None or kinds[0] is kinds[1]


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)


def _edit_array(value: Any, number: int) -> tuple[Any, bool]:
    """Change numbers, type or shape of an array."""
    made = value.clone() if isinstance(value, torch.Tensor) else value.copy()
    flat = made.reshape(-1)
    how = number % 8
    if how in (0, 1, 2) and len(flat):
        is_whole = not (
            made.is_floating_point() if hasattr(made, "clone") else made.dtype.kind == "f"
        )
        flat[number % len(flat)] = 1 if is_whole else (math.nan, math.inf, 3e38)[how]
        return made, is_whole or how == 2
    if how == 3:
        return flat, made.ndim == 1
    if how == 4:
        return made[:0] if made.ndim else flat, False
    if how == 5:
        return (made.double() if hasattr(made, "double") else made.astype("i4")), False
    if how == 6:
        return made.T if made.ndim == 2 else made[None], made.ndim == 2
    return made[:-1] if made.ndim else flat, False


def to_json(tree: Any, **options: Any) -> str:
    """Write a tree as JSON, with what no writer writes: NaN, deep nests, keys that come twice."""
    text = json.dumps(tree, **{"ensure_ascii": False, **options})
    depth = 100_000
    return text.replace('"@deep"', "[" * depth + "]" * depth).replace('"@twice ', '"')
