"""Finished parts of a least-squares run: what was saved comes back, or nothing does."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from composable import runs
from composable.variants.store import Fit, Store

WANTED = [("one", "pruned"), ("one", "ls")]


def saved(folder: Path) -> tuple[Store, Path]:
    """A store with one part, and its file."""
    store = Store(folder)
    fits = {
        "pruned": Fit({}, 1.5, 1.5, 2.0),
        "ls": Fit({"o.weight": torch.eye(3), "o.bias": torch.ones(3)}, 0.5, 0.6, 2.0, 0.1, 1.2),
    }
    store.save("solved one", {"one": fits})
    (path,) = folder.glob("*.part")
    return store, path


def test_what_was_saved(tmp_path: Path) -> None:
    store, _ = saved(tmp_path)
    found = store.load("solved one", WANTED)
    assert found is not None
    fit = found["one"]["ls"]
    assert (fit.train, fit.held_out, fit.largest_coefficient) == (0.5, 0.6, 1.2)
    assert torch.equal(fit.tensors["o.weight"], torch.eye(3))
    assert store.load("another", WANTED) is None
    assert store.load("solved one", WANTED[:1]) is None


def edited(path: Path, change: Any) -> None:
    """Write a part with other tensors, and its seal made right again."""
    content = runs.read_sealed(path)
    begin = 8 + int.from_bytes(content[:8], "little")
    json.loads(content[8:begin])
    tensors = safetensors.torch.load(content[begin:])
    runs.write_sealed(path, content[:begin] + safetensors.torch.save(change(tensors)))


@pytest.mark.parametrize(
    "change",
    [
        lambda held: {name.replace("weight", "weight "): held[name] for name in held},
        lambda held: {name: held[name] for name in held if "bias" in name},
        lambda held: {**held, "one ls/more": torch.ones(1)},
        lambda held: {**held, "one pruned/o.bias": torch.ones(3)},
        lambda held: {name: torch.ones(4) for name in held},
    ],
)
def test_other_tensors_under_a_right_seal(change: Any, tmp_path: Path) -> None:
    """Without a tensor a variant would silently keep the one it was pruned with."""
    store, path = saved(tmp_path)
    edited(path, change)
    assert store.load("solved one", WANTED) is None
    assert not path.exists()
