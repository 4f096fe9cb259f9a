"""The worked example of docs/adding.md: what it says is run, and passes what all families do."""

import re
from pathlib import Path
from typing import Any

import pytest

from composable import families
from tests import tiny
from tests.oracle import test_families as oracle
from tests.paths import ROOT
from tests.unit.families import test_families as unit

PAGE = ROOT / "docs" / "adding.md"


def block(name: str) -> str:
    """A block of code of the page."""
    pattern = rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->"
    found = re.search(pattern, PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, name
    return found[1]


@pytest.fixture
def phi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The family and the tiny model of the page, registered as the page says."""
    with pytest.raises(families.UserError, match=r"architecture .phi. is not supported"):
        families.by_model_type("phi")
    names: dict[str, Any] = {}
    exec(compile(block("example family"), "family", "exec"), names)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, names["PHI"]))
    layouts = dict(tiny.LAYOUTS)
    exec(compile(block("example layout"), "layout", "exec"), {"LAYOUTS": layouts})
    monkeypatch.setattr(tiny, "LAYOUTS", layouts)
    assert (
        len(block("example family").splitlines()) + len(block("example layout").splitlines()) < 80
    )
    return names["PHI"]


@pytest.mark.parametrize("kind", ["attention", "ffn", "both", "first gone", "all gone"])
def test_removed_units_are_zeroed_columns(phi: Any, kind: str) -> None:
    oracle.test_removed_units_are_zeroed_columns("phi", kind, "sdpa")


@pytest.mark.parametrize("gqa", ["per-group", "whole-groups"])
@pytest.mark.parametrize("rates", [(0.5, 0.25, 0), (1, 0.5, 0), "layer 0"])
def test_cached_decoding_equals_one_pass(phi: Any, rates: Any, gqa: str) -> None:
    oracle.test_cached_decoding_equals_one_pass("phi", rates, gqa)


def test_the_other_checks_of_all_families(phi: Any, tmp_path: Path) -> None:
    oracle.test_removed_layers_equal_the_layers_that_stay("phi")
    oracle.test_a_composed_model_comes_back_from_its_file("phi", tmp_path)
    unit.test_parts_are_known_by_name("phi")
    unit.test_every_weight_of_the_layers_has_one_owner("phi")
    unit.test_nothing_removed_is_the_dense_module("phi", "eager")
    unit.test_recorded_calls_are_those_of_the_dense_model("phi")
    unit.test_moments_are_those_of_real_tokens("phi")
