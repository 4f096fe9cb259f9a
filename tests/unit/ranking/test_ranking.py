"""Layers as configurations name them, and what cannot be measured."""

from pathlib import Path
from typing import Any

import click
import pytest
import torch

from composable.calibration import collect
from composable.calibration.batching import GivenBatches
from composable.commands import options
from composable.errors import ConfigError, ShapeError, UserError
from composable.formats import config
from composable.formats.config import Entry
from composable.linalg.state_distances import Distance, Sums, Tokens
from composable.models import surgery
from composable.models.structure import Edit
from composable.ranking import layer_choice
from composable.ranking.layer_distance import (
    LAYER_DISTANCE,
    LayerDistanceOptions,
)
from tests import tiny


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([1], {"e.1": "e.1"}), ([0, 1, 3], {"e.0": "e.1", "e.3": "e.3"}), ([], {})],
)
def test_runs_of_layers_become_blocks(layers: list[int], expected: dict[str, str]) -> None:
    names = [f"e.{i}" for i in range(4)]
    found = layer_choice.layer_entries(names, layers, is_mapped=True)
    assert found == {n: Entry(1.0, "linear_map", through=t) for n, t in expected.items()}
    assert layer_choice.layer_entries(names, layers) == {names[i]: Entry(1.0) for i in layers}
    assert [each for n, e in found.items() for each in config.covered(n, e)] == [
        names[i] for i in layers
    ]


@pytest.mark.parametrize("text", ["1;2", "a", "-1", "1.5", "1 2"])
def test_numbers_of_layers(text: str) -> None:
    assert options.LAYERS.convert(" 3,1,,3 ", None, None) == (1, 3)
    with pytest.raises(click.BadParameter, match="is no list of numbers from 0, such as 3,4,5"):
        options.LAYERS.convert(text, None, None)


def test_a_task_without_lengths(tmp_path: Path) -> None:
    made = tiny.dense("vit")
    with pytest.raises(UserError, match="max_length is 5: not for image_classification; leave it"):
        collect.calibration_set(made, str(tmp_path), 4, max_length=5)


def test_an_order_needs_to_know_its_stack() -> None:
    made = tiny.dense("t5")
    texts = GivenBatches([tiny.inputs(made)])
    with pytest.raises(UserError, match="has encoder and decoder; name one of them as the stack"):
        LAYER_DISTANCE.measure(made, texts, LayerDistanceOptions(iterative=1))
    options = LayerDistanceOptions(iterative=1, stack="decoder", protect=[1])
    (order,) = LAYER_DISTANCE.measure(made, texts, options).orders
    assert (order.modules, order.protected) == (["decoder.block.0"], ["decoder.block.1"])
    for wrong, message in (
        (LayerDistanceOptions(stack="decoder"), "stack and protect say which layers go one by one"),
        (LayerDistanceOptions(iterative=1, stack="decoder", protect=[2]), "protected layer 2: exp"),
    ):
        with pytest.raises(ConfigError, match=message):
            LAYER_DISTANCE.measure(made, texts, wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distances": ("near",)}, 'unknown distance "near"'),
        ({"largest": 2}, "largest is 2, but only linear_fit has it"),
        ({"memory_budget": 9}, "memory_budget is 9, but only linear_fit has it"),
    ],
)
def test_options_without_a_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LayerDistanceOptions(**settings)


def test_a_cut_needs_to_know_its_stack() -> None:
    settings: Any = {
        "policy": "deepest",
        "scores": None,
        "protect": (),
        "linear_map": False,
    }
    made = tiny.dense("t5")
    with pytest.raises(ConfigError, match="has encoder and decoder; name one of them as the stack"):
        layer_choice.configurations(made, [1], stack=None, **settings)
    (found,) = layer_choice.configurations(made, [1], stack="decoder", **settings)
    assert found == {"decoder.block.0": Entry(1.0)}


def test_states_that_are_not_finite() -> None:
    made = tiny.dense("llama")
    with torch.no_grad():
        made.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    texts = GivenBatches([tiny.inputs(made)])
    with pytest.raises(UserError, match="bi_score: distances between decoder states are not fini"):
        LAYER_DISTANCE.measure(made, texts, LayerDistanceOptions(["bi_score"]))


def test_states_of_another_stack() -> None:
    distances = [Distance.parse("bi_score")]
    tokens = Tokens.of(torch.ones(1, 2).bool(), distances)
    with pytest.raises(ShapeError, match="2 states, 4 were expected"):
        Sums(distances, 3).add([torch.ones(2, 5)] * 2, tokens)


def test_unknown_layers_leave_the_model_as_it_is() -> None:
    made = tiny.dense("llama")
    edits = Edit("model.layers.0", "remove"), Edit("model.layers.7", "remove")
    with pytest.raises(ShapeError, match=r'no module "model\.layers\.7" in this model'):
        surgery.apply_structure(made.model, made.family, edits)
    assert len(made.model.model.layers) == made.model.config.num_hidden_layers == 3
