"""The embedded model is what its card and record say."""

import json
from typing import Any

import pytest
from safetensors import safe_open

from composable import files
from composable.models import pretrained
from composable.tasks import metrics, translation, translation_decode
from tests.paths import ROOT, SHARED

FOLDER = ROOT / "assets" / "embedded"


@pytest.fixture(scope="module")
def record() -> Any:
    return json.loads((FOLDER / "training_record.json").read_text())


def test_it_is_small_and_of_the_shape_it_should_have(record: Any) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16e6
    with safe_open(FOLDER / "model.safetensors", framework="pt") as stored:
        assert {str(stored.get_tensor(name).dtype) for name in stored.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    dense = pretrained.import_model(FOLDER, "embedded")
    attentions = [m for m in dense.family.modules(dense.model) if m.kind == "attention"]
    assert {(module.units, module.head_size) for module in attentions} == {(6, 32)}
    assert dense.info["prefix"] == ""
    assert 4e6 < dense.info["dense_parameters"] == record["parameters"] < 7e6


def test_the_card_names_the_figures_of_the_record(record: Any) -> None:
    card = (FOLDER / "README.md").read_text()
    for value in (record["bleu"]["multi30k_test_2016_flickr"], record["bleu"]["captions_test"]):
        assert f"{value:.2f}" in card
    assert record["command"] in card
    assert record["stats"][-1]["epoch"] == record["epochs"] == 15


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["captions_test", "multi30k_test_2016_flickr"])
def test_it_translates_as_well_as_recorded(record: Any, name: str) -> None:
    folder = files.assets("captions") if name == "captions_test" else SHARED / "data" / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here (COMPOSABLE_SHARED names the shared data)")
    corpus = translation.read_corpus(folder, "test")
    dense = pretrained.import_model(FOLDER, "embedded")
    lines = translation_decode.translate(dense.model, dense.tokenizer, corpus.source)
    score = metrics.sacrebleu_score(lines, corpus.target)
    # other CPUs and versions may break ties of two words differently in single sentences
    assert score.value == pytest.approx(record["bleu"][name], abs=0.3)
