"""Names of configurations: rates by kind, read from names of modules alone."""

import pytest

from composable.formats.config import Entry, uniform_configurations
from composable.reports import rates
from tests import tiny

ATTENTION, FFN = "encoder.block.{}.layer.0.SelfAttention", "encoder.block.{}.layer.1.DenseReluDense"
HEADS = [ATTENTION.format(i) for i in range(2)]
NEURONS = [FFN.format(i) for i in range(2)]
LINEARS = [f"{HEADS[0]}.o", f"{NEURONS[0]}.wi", f"{NEURONS[1]}.wo"]


def configuration(values: dict[str, float]) -> dict[str, Entry]:
    return {name: Entry(rate) for name, rate in values.items()}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict.fromkeys(HEADS, 0.25) | dict.fromkeys(LINEARS, 0.3), "heads 25 %, weights 30 %"),
        (dict.fromkeys(HEADS, 1 / 3), "heads 33.3 %"),
        (dict.fromkeys(HEADS, 0.125) | dict.fromkeys(LINEARS, 0.0), "heads 12.5 %"),
        # of a wanted size: neurons differ by one
        (dict(zip(NEURONS, (0.3997, 0.401), strict=True)), "neurons 40 %"),
        (dict(zip(HEADS, (0.17, 0.67), strict=True)), "heads 17 to 67 %"),
        (dict(zip(HEADS, (0.0, 1.0), strict=True)), "heads 0 to 100 %"),
        # linears of an ffn that loses neurons are left as they are: no rate of theirs
        (
            dict.fromkeys(NEURONS, 0.5) | {LINEARS[0]: 0.3} | dict.fromkeys(LINEARS[1:], 0.0),
            "neurons 50 %, weights 30 % of one linear",
        ),
        ({HEADS[0]: 0.5}, "heads 50 % of one attention"),
        ({"encoder.block.0": 1.0, HEADS[0]: 0.0, HEADS[1]: 0.0}, "1 layer removed"),
        (
            {"encoder.block.0": 1.0, "decoder.block.1": 1.0, HEADS[0]: 0.0, HEADS[1]: 0.5},
            "heads 50 % of one attention, 2 layers removed",
        ),
        (dict.fromkeys(HEADS + LINEARS, 0.0), "nothing removed"),
        ({}, "nothing removed"),
    ],
)
def test_a_name_says_every_kind_that_loses_something(
    values: dict[str, float], expected: str
) -> None:
    assert rates.names([configuration(values)]) == [f"0: {expected}"]


def test_a_block_of_layers_counts_them_all() -> None:
    block = {"model.layers.3": Entry(1.0, through="model.layers.6")}
    assert rates.names([block]) == ["0: 4 layers removed"]


def test_what_only_another_configuration_lists_is_untouched() -> None:
    both = configuration(dict.fromkeys(HEADS, 0.5))
    assert rates.names([both, configuration({HEADS[1]: 0.5})]) == [
        "0: heads 50 %",
        "1: heads 0 to 50 %",
    ]


@pytest.mark.parametrize("layout", tiny.ALL)
def test_every_family_has_the_names_of_its_rates(layout: str) -> None:
    """What config_generator.py writes for its rates, of every kind at once."""
    made = tiny.dense(layout)
    modules = made.family.modules(made.model)
    wanted = {"attention": [0.25, 0.5], "linear": [0.3, 0.4], "ffn": [0.0, 0.6]}
    found = uniform_configurations(modules, wanted)
    assert rates.names(found) == [
        "0: heads 25 %, weights 30 %",
        "1: heads 50 %, neurons 60 %, weights 40 %",
    ]
