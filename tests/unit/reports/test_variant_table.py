"""variant_table: rows, CSV, text and the heat map."""

import csv
import struct
from pathlib import Path

import pytest

from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.reports import variant_table

A = "encoder.block.0.layer.0.SelfAttention"
WO = "encoder.block.0.layer.1.DenseReluDense.wo"
STATS = {"error_before": 0.5, "error_after": 0.125, "tokens_per_input": 85.25}
VARIANTS = [
    Variant(A, "attention", Entry(0.25, "head_l1", {"o": Entry(0.3, "alps")}), stats=STATS),
    Variant(WO, "linear", Entry(0.5, "l1"), stats={"error_before": 1e-3, "error_after": 0}),
    Variant(WO[:-3], "ffn", Entry(0.5, "neuron_l1"), stats={**STATS, "largest_coefficient": 5.625}),
    Variant(WO[:-3], "ffn", Entry(1.0, "remove"), removed=True),
]


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return variant_table.rows_of(VARIANTS, [1.25, 0.5, 2.5, 0.0], ["ls", "pruned", "ls", None])


def test_csv_is_read_back(rows: list[dict[str, object]], tmp_path: Path) -> None:
    variant_table.write(tmp_path / "t.csv", rows)
    text = (tmp_path / "t.csv").read_text()
    assert text.splitlines()[0] == (
        "module,rate,method,o_rate,o_method,error_before,error_after,seconds,kept,"
        "largest_coefficient,tokens_per_input"
    )
    first, second, ffn, third = csv.DictReader(text.splitlines())
    assert list(first.values()) == [
        A,
        "0.25",
        "head_l1",
        "0.3",
        "alps",
        "0.5",
        "0.125",
        "1.25",
        "ls",
        "",
        "85.25",
    ]
    assert (ffn["largest_coefficient"], ffn["tokens_per_input"]) == ("5.625", "85.25")
    assert (second["o_rate"], second["error_after"]) == ("", "0")
    assert [third[key] for key in ("rate", "error_before", "error_after", "kept")] == [
        "1.0",
        "",
        "",
        "",
    ]


def test_text_has_a_line_for_every_variant(rows: list[dict[str, object]]) -> None:
    head, *lines = variant_table.as_text(rows).splitlines()
    assert head.split() == "module method rate error before after seconds kept |T|".split()
    assert lines[0].split() == [A, *"head_l1+alps 0.25, o 0.3 0.5000 0.1250 1.25 ls".split()]
    assert lines[2].split() == [WO[:-3], *"neuron_l1 0.5 0.5000 0.1250 2.50 ls 5.6".split()]
    assert lines[3].split() == [WO[:-3], "remove", "1", "0.00"]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_picture_grows_with_the_table(rows: list[dict[str, object]], count: int) -> None:
    picture = variant_table.errors_png(rows[:count])
    width, height = struct.unpack(">II", picture[16:24])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(width, height) > 100
    assert picture == variant_table.errors_png(rows[:count])
