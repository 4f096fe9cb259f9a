"""What stays of a model by sums of importances: the masks that the program of OPTIN chose."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from composable.formats.scores import Origin, Scores, TextsRead, UnitImportance
from composable.methods.base import keep_best
from composable.models import cost
from composable.ranking.budget import keep_most
from composable.ranking.sizes import Allocator
from tests import tiny
from tests.paths import SHARED

ORACLE = SHARED / "oracles" / "optin" / "oracle.safetensors"
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
pytestmark = pytest.mark.skipif(not ORACLE.exists(), reason="needs ../shared/oracles/optin")
CLEAN = [("clean", size) for size in (0.7, 0.5, 0.4, 0.3)]
REFERENCE = [("reference", size) for size in (0.7, 0.6, 0.5, 0.4, 0.3)]


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(ORACLE)


def importances(stored: dict[str, Any], which: str) -> dict[str, Any]:
    """Kind -> (3, units): the scores that the program searched with, higher is kept."""
    if which == "reference":
        return {kind: -stored[f"reference_{kind}_score"] for kind in ("head", "neuron")}
    scale = 0.1 * float(stored["clean_kl_scale_r"][0])
    found = {}
    for kind in ("head", "neuron"):
        losses = stored[f"components_{kind}_md"].astype(float)
        later = [losses[i, :, min(i + 1, 2) :].sum(1) for i in range(3)]  # the last has its own
        found[kind] = np.stack(later) + scale * stored[f"components_{kind}_kl"]
    return found


@pytest.mark.parametrize(("which", "size"), CLEAN + REFERENCE)
def test_the_search_keeps_what_the_program_keeps(
    which: str, size: float, stored: dict[str, Any]
) -> None:
    """Without a step that always stays, which it does not have; the costs are its formulas."""
    found, tokens, width = importances(stored, which), 14.25, 64
    costs = {"head": 4 * tokens * width * 16 + 2 * tokens**2 * 16, "neuron": 2 * tokens * width}
    rows = [(kind, values) for kind in ("head", "neuron") for values in found[kind]]
    total = sum(len(values) * costs[kind] for kind, values in rows)
    kept = keep_most(
        [costs[kind] for kind, _ in rows], [np.sort(v)[::-1] for _, v in rows], size * total
    )
    masks = [*stored[f"{which}_head_mask_{size}"], *stored[f"{which}_neuron_mask_{size}"]]
    for count, (_, values), mask in zip(kept, rows, masks, strict=True):
        expected = np.zeros(len(values))
        expected[np.argsort(values)[len(values) - count :]] = 1
        np.testing.assert_array_equal(mask, expected)


def scores_of(stored: dict[str, Any], which: str) -> tuple[Any, Scores]:
    """A model of that shape, and the scores as a file holds them."""
    dense, found = tiny.dense("bert", **SHAPE), importances(stored, which)
    kinds = {"attention": "head", "ffn": "neuron"}
    units = {
        one.name: UnitImportance(found[kinds[one.kind]][int(one.name.split(".")[3])])
        for one in dense.family.modules(dense.model)
        if one.kind in kinds
    }
    texts = TextsRead("texts", "ab" * 32, 24, {"encoder": 342})
    return dense, Scores(Origin("another", {}, "", "", [], texts), units)


@pytest.mark.parametrize(("which", "size"), [CLEAN[0], *REFERENCE])
def test_a_configuration_is_that_mask(which: str, size: float, stored: dict[str, Any]) -> None:
    """Through rates, where the masks leave something of every module."""
    dense, scores = scores_of(stored, which)
    made = Allocator(dense, "macs", "global", scores, grid=0)
    configuration = made.configuration(size)
    modules = {one.name: one for one in made.modules}
    for name, entry in configuration.items():
        kind = "head" if modules[name].kind == "attention" else "neuron"
        mask = stored[f"{which}_{kind}_mask_{size}"][int(name.split(".")[3])]
        importance: Any = scores.importance(name)
        kept = keep_best(torch.from_numpy(importance), modules[name], entry.rate).kept_units
        assert kept == np.flatnonzero(mask).tolist()
    assert cost.macs(dense.model, dense.family, 14.25, 0).total == pytest.approx(made._total)


def test_neighbouring_budgets_share_variants_on_a_grid(stored: dict[str, Any]) -> None:
    """Sixteenths of 128 neurons: some module has the same rate, above 0, at both sizes."""
    dense, scores = scores_of(stored, "clean")
    made = Allocator(dense, "macs", "global", scores)
    chosen = [made.configuration(size) for size in (0.7, 0.6, 0.5, 0.4)]
    for one, other in itertools.pairwise(chosen):
        assert {pair for pair in one.items() if pair[1].rate} & set(other.items())
        assert all((entry.rate * 16).is_integer() for entry in one.values())
