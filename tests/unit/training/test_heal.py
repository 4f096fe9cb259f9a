"""What learns in a model-level fine-tuning: all weights, the layers beside a cut, or adapters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from composable.errors import MismatchError
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.training import finetune
from composable.training.heal import Heal, neighbours, prepare
from composable.training.options import Options
from composable.variants import compose
from composable.variants.pruning import make_variants
from tests import tiny, tiny_tasks
from tests.oracle.test_linear_maps import layer_names, made_of, variant_of

#: Two stacks, one of encoders, one of decoders (whose linears were split), one that reads images.
LAYOUTS = ("t5_gated", "bert", "gpt2", "vit")


def cut(made: Checkpoint, *numbers: int) -> Checkpoint:
    names = layer_names(made)
    variants = make_variants(made, {names[i]: [Entry(1.0)] for i in numbers}, tiny.BY_WEIGHTS)
    return compose.compose(made, variants)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [([1], [0, 1]), ([0], [0]), ([3], [2]), ([1, 2], [0, 1]), ([0, 2], [0, 1]), ([0, 1, 2], [0])],
)
@pytest.mark.parametrize("layout", ["opt", "t5"])
def test_neighbours_of_a_cut(layout: str, gone: list[int], expected: list[int]) -> None:
    made = made_of(layout)
    path = layer_names(made)[0].removesuffix("0")
    assert neighbours(cut(made, *gone)) == [f"{path}{number}" for number in expected]


def test_a_map_learns_with_its_neighbours() -> None:
    made = made_of("llama")
    composed = compose.compose(made, [variant_of(made, 1, 2)])
    assert sorted(neighbours(composed)) == [f"model.layers.{i}" for i in range(3)]


def test_without_a_cut_there_are_no_neighbours() -> None:
    with pytest.raises(MismatchError, match=r"^heal neighbours: no layer of this model is gone"):
        prepare(tiny.dense("opt"), Heal("neighbours"))


def healed(
    layout: str, heal: Heal, folder: Path, **changes: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Weights before, the model after, the report."""
    made = cut(made_of(layout), 1)
    made.tokenizer = made.tokenizer and tiny_tasks.tokenizer(
        made.info["task"] != "language_modeling"
    )
    data = folder / "data"
    if layout.startswith("t5"):
        made.tokenizer = tiny.tokenizer()
        tiny.corpus(data)
    else:
        tiny_tasks.data(made.info["task"], data)
    before = {name: t.clone() for name, t in made.model.state_dict().items()}
    settings: Any = {"epochs": 2, "batch_size": 8, "early_stop": 0, "lr": None, "device": "cpu"}
    options = Options(**settings | changes, checkpoint_dir=folder / "checkpoints")
    report = finetune.tune_model(
        made, folder / "out.pth", folder / "stats.csv", options, "model", str(data), heal=heal
    )
    return before, checkpoint.load(folder / "out.pth"), report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_neighbours_learn(layout: str, tmp_path: Path) -> None:
    before, after, report = healed(layout, Heal("neighbours"), tmp_path, lr=0.02)
    beside = tuple(f"{name}." for name in neighbours(after))
    changed = {
        name for name, tensor in after.model.state_dict().items() if not tensor.equal(before[name])
    }
    assert report["validation_loss"] < report["validation_loss_start"]
    assert changed
    assert all(name.startswith(beside) for name in changed)
    count = sum(p.numel() for name, p in after.model.named_parameters() if name.startswith(beside))
    assert report["learning_parameters"] == count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_linears_of_ffns_learn_by_adapters(layout: str, tmp_path: Path) -> None:
    heal = Heal("lora", rank=2, dropout=0.0)
    before, after, report = healed(layout, heal, tmp_path, lr=0.05)
    assert list(after.model.state_dict()) == list(before)
    linears = {
        f"{module.holder}.{child}.weight"
        for module in after.family.modules(after.model)
        if module.kind == "ffn"
        for _, child in module.parts
    }
    changed = {
        name for name, tensor in after.model.state_dict().items() if not tensor.equal(before[name])
    }
    assert report["validation_loss"] < report["validation_loss_start"]
    assert changed == linears
    for name in linears:
        difference = (after.model.get_parameter(name) - before[name]).double()
        values = torch.linalg.svdvals(difference)
        assert values[0] > 1e-4
        assert values[2] < 1e-5 * values[0] + 1e-6
    sizes = [sum(before[name].shape) * 2 for name in linears]
    assert report["learning_parameters"] == sum(sizes)


def test_adapters_compute_what_they_become(tmp_path: Path) -> None:
    made = cut(made_of("llama_gqa"), 2)
    batch = tiny.inputs(made)
    finish = prepare(made, Heal("lora", rank=3))
    made.model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        start = made.model(**batch).logits
        for name, parameter in made.model.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        learnt = made.model(**batch).logits
        finish()
        merged = made.model(**batch).logits
    torch.testing.assert_close(merged, learnt, rtol=0, atol=1e-4)
    assert (merged - start).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert not any("lora" in name for name, _ in made.model.named_modules())


def test_adapters_do_not_fill_masked_weights() -> None:
    made = made_of("llama")
    name = "model.layers.0.mlp.up_proj"
    composed = compose.compose(
        copy.deepcopy(made), make_variants(made, {name: [Entry(0.5)]}, tiny.BY_WEIGHTS)
    )
    with pytest.raises(MismatchError, match=f'lora: weights of "{name}" are masked'):
        prepare(composed, Heal("lora"))
    # a masked projection of an attention is none of them
    name = "model.layers.0.self_attn.o_proj"
    composed = compose.compose(
        copy.deepcopy(made), make_variants(made, {name: [Entry(0.5)]}, tiny.BY_WEIGHTS)
    )
    prepare(composed, Heal("lora"))()


def test_nothing_for_adapters() -> None:
    made = made_of("llama")
    ffns = [m.name for m in made.family.modules(made.model) if m.kind == "ffn"]
    gone = [Variant(name, "ffn", Entry(1.0, "remove"), removed=True) for name in ffns]
    with pytest.raises(MismatchError, match="no ffn that adapters could go to"):
        prepare(compose.compose(made, gone), Heal("lora"))


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(Exception, match=r"pip install -r requirements-lora\.txt"):
        prepare(tiny.dense("llama"), Heal("lora"))


def test_the_way_of_healing_is_part_of_a_run(tmp_path: Path) -> None:
    """A checkpoint of one is not taken for another."""
    folders = set()
    for heal in (Heal("full"), Heal("neighbours"), Heal("lora", 2), Heal("lora", 3)):
        made = cut(made_of("opt"), 1)
        made.tokenizer = tiny_tasks.tokenizer(False)
        data = tiny_tasks.data("language_modeling", tmp_path / "data")
        options: Any = Options(
            epochs=1, batch_size=8, lr=0.01, early_stop=0, device="cpu",
            checkpoint_dir=tmp_path / "checkpoints",
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "composable.training.train.Outcome.clean_up",
                lambda outcome: folders.add(outcome.folder.path),
            )
            finetune.tune_model(made, tmp_path / "o.pth", tmp_path / "s.csv", options, "model",
                            str(data), heal=heal)  # fmt: skip
    assert len(folders) == 4
