"""The rankers trajectory and logit_kl: against plain loops, and the reference program's values."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForSequenceClassification

import composable
from composable import ranking
from composable.calibration.batching import GivenBatches, Texts
from composable.errors import ConfigError, UserError
from composable.formats.scores import Scores
from composable.linalg.manifold import Divergence, ManifoldLoss
from composable.models import in_memory
from composable.models.checkpoint import Checkpoint
from composable.ranking import base, trajectory
from composable.ranking.trajectory import TrajectoryOptions
from composable.tasks.plain_texts import PlainTexts
from tests import tiny, tiny_tasks
from tests.paths import SHARED

ORACLE = SHARED / "oracles/optin"


def scores_of(
    made: Checkpoint, *batches: Any, method: str = "trajectory", **options: Any
) -> Scores:
    ranker = ranking.by_name(method)
    return base.rank(ranker, made, GivenBatches(list(batches)), ranker.options(**options))


def run_without(
    made: Checkpoint, model: Any, batch: Any, name: str = "", columns: Any = ()
) -> tuple[list[Tensor], Tensor]:
    """Run a model whose unit gives 0: outputs of all ffns, and its logits, of real tokens."""
    outputs, hooks = [], []
    modules = {m.name: m for m in made.family.modules(model)}
    for module in modules.values():
        if module.kind == "ffn":
            linear = model.get_submodule(module.output_path)
            hooks.append(linear.register_forward_hook(
                lambda _, __, out, stack=module.stack: outputs.append((stack, out))))  # fmt: skip

    def silence(_: Any, args: Any) -> Any:
        states = args[0].clone()
        states[..., columns] = 0
        return (states,)

    if name:
        linear = model.get_submodule(modules[name].output_path)
        hooks.append(linear.register_forward_pre_hook(silence))
    with torch.no_grad():
        output = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    for hook in hooks:
        hook.remove()
    masks = made.family.valid_tokens(model, batch)
    rows = {stack: mask.flatten() for stack, mask in masks.items()}
    features = [out.flatten(0, -2)[rows[stack]] for stack, out in outputs]
    if "start_logits" in output:
        mask = masks["encoder"]
        sides = torch.stack([output.start_logits, output.end_logits], 1)
        return features, sides.masked_fill(~mask[:, None], -1e30).flatten(0, 1)
    logits = output.logits
    last = rows[made.family.stacks[-1]]
    return features, logits.flatten(0, 1)[last] if logits.dim() == 3 else logits


def pair_loss(dense: Tensor, other: Tensor) -> float:
    """Mean squared difference of the cosines of all pairs of tokens, as it is defined."""
    one, two = (F.normalize(each.double(), dim=1) for each in (dense, other))
    return float((one @ one.T - two @ two.T).square().mean())


def plain_loop(made: Checkpoint, batch: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mask heads, and every seventh neuron, one by one, in whole passes in float64."""
    model = copy.deepcopy(made.model).double()
    features, logits = run_without(made, model, batch)
    ffns = [m.name for m in made.family.modules(model) if m.kind == "ffn"]
    layer_of = [made.family.place(name)[1] for name in ffns]  # type: ignore[index]
    found = {}
    for module in made.family.modules(model):
        if module.kind not in ("attention", "ffn"):
            continue
        step = 1 if module.kind == "attention" else 7
        layer = layer_of.index(made.family.place(module.name)[1])  # type: ignore[index]
        md, kl = np.full((module.units, len(ffns)), np.nan), np.full(module.units, np.nan)
        for unit in range(0, module.units, step):
            size = module.head_size or 1
            columns = list(range(unit * size, (unit + 1) * size))
            others, changed = run_without(made, model, batch, module.name, columns)
            md[unit] = 0
            for z in range(layer + 1, len(ffns)) if layer + 1 < len(ffns) else [layer]:
                md[unit, z] = pair_loss(features[z], others[z])
            if logits.shape[-1] == 1:
                kl[unit] = (logits - changed).square().mean()
            else:
                sides = (each.log_softmax(-1) for each in (changed, logits))
                kl[unit] = F.kl_div(*sides, reduction="batchmean", log_target=True)
        found[module.name] = md, kl
    return found


def assert_equal(found: Scores, expected: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    assert found.units.keys() == expected.keys()
    for name, (md, kl) in expected.items():
        for key, values in (("md", md), ("kl", kl)):
            seen = ~np.isnan(values)
            ours, values = found.units[name].components[key][seen], values[seen]
            np.testing.assert_allclose(ours, values, 2e-3, 1e-6 * values.max(), err_msg=name)


@pytest.mark.parametrize("layout", tiny.ALL)
def test_units_change_what_a_plain_loop_finds(layout: str) -> None:
    made = tiny.dense(layout)
    batch = tiny.inputs(made)
    assert_equal(scores_of(made, batch), plain_loop(made, batch))


@pytest.mark.parametrize("task", ["text_similarity", "question_answering", "image_classification"])
def test_other_heads_too(task: str) -> None:
    made = tiny_tasks.checkpoint(task)
    batch = tiny.inputs(made)
    assert_equal(scores_of(made, batch), plain_loop(made, batch))


def values_of(found: Scores) -> dict[str, np.ndarray]:
    return {name: one.importance for name, one in found.units.items()}


def assert_close(found: Scores, expected: Scores, rtol: float = 1e-3) -> None:
    for name, values in values_of(expected).items():
        ours = values_of(found)[name]
        np.testing.assert_allclose(ours, values, rtol, 1e-5 * values.max(), err_msg=name)


@pytest.mark.parametrize("layout", ["bert", "llama_gqa", "t5"])
def test_neither_padding_nor_order_nor_batches_matter(layout: str) -> None:
    made = tiny.dense(layout)
    batch = tiny.inputs(made)
    expected = scores_of(made, batch)
    padded = {k: F.pad(v, (0, 3)) for k, v in batch.items()}
    if "decoder_input_ids" in batch:
        # what is appended to the target is no padding for the model, but another sample's may be
        padded["decoder_input_ids"] = batch["decoder_input_ids"]
    assert_close(scores_of(made, padded), expected)
    assert_close(scores_of(made, {k: v.flip(0) for k, v in batch.items()}), expected)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    assert_close(scores_of(made, *parts), expected)
    assert np.abs(
        values_of(scores_of(made, padded, include_pads=True))[next(iter(expected.units))]
        - values_of(expected)[next(iter(expected.units))]
    ).max() > 0  # fmt: skip


def test_how_many_run_side_by_side_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.dense("t5_gated")
    batch = tiny.inputs(made)
    expected = scores_of(made, batch)
    monkeypatch.setattr(trajectory, "ROWS", {"cpu": 1})
    assert_close(scores_of(made, batch), expected)


def test_biases_of_samples_are_repeated_with_them() -> None:
    made = tiny.dense("t5")
    batch = tiny.inputs(made)
    expected = scores_of(made, batch)

    def by_sample(_: Any, __: Any, output: Any) -> Any:
        """Return the bias of positions as older versions of transformers do."""
        states, bias, *rest = output
        return states, bias.expand(len(states), -1, -1, -1).clone(), *rest

    for block in made.model.encoder.block:
        block.register_forward_hook(by_sample)
    assert_close(scores_of(made, batch), expected)


def test_logit_kl_is_the_component_of_trajectory() -> None:
    made = tiny.dense("opt")
    batch = tiny.inputs(made)
    both, alone = scores_of(made, batch), scores_of(made, batch, method="logit_kl")
    for name, one in alone.units.items():
        assert sorted(one.components) == ["kl"]
        np.testing.assert_array_equal(one.importance, one.components["kl"])
        np.testing.assert_allclose(one.importance, both.units[name].components["kl"], rtol=1e-4)
    assert not alone.constants


def test_the_weight_of_logits_means_nothing_to_logit_kl() -> None:
    made = tiny.dense("opt")
    with pytest.raises(UserError, match="kl_weight: logit_kl has no such option"):
        composable.rank(made, "logit_kl", data=["a man"], kl_weight=0.5)


def test_one_token_has_no_pairs() -> None:
    made = tiny.dense("opt")
    batch = {name: tensor[:, :1] for name, tensor in tiny.inputs(made, samples=1).items()}
    with pytest.raises(UserError, match="one token has no pairs"):
        scores_of(made, batch)
    assert values_of(scores_of(made, batch, method="logit_kl"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "group 0: expected 1 neuron or more"),
        ({"gqa": "some"}, "gqa some: expected per-group or whole-groups"),
        ({"kl_weight": -0.5}, "kl_weight -0.5: expected a number of 0 or more"),
        ({"kl_weight": float("nan")}, "kl_weight nan: expected a number of 0 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrajectoryOptions(**options)


@pytest.mark.parametrize("method", ["trajectory", "logit_kl"])
def test_a_decoder_needs_targets(method: str) -> None:
    made = tiny.checkpoint()
    texts = Texts(made, PlainTexts.of(["the man runs"], "some.txt"))
    with pytest.raises(UserError, match=r"some\.txt: plain texts have no targets"):
        base.rank(ranking.by_name(method), made, texts, TrajectoryOptions())


def test_weights_without_a_number() -> None:
    made = tiny.dense("opt")
    made.model.get_parameter("model.decoder.layers.2.fc2.weight").data.fill_(torch.inf)
    with pytest.raises(UserError, match=r'"model.decoder.layers.\d.*": what its units change'):
        scores_of(made, tiny.inputs(made))


def test_importance_is_made_of_its_components() -> None:
    made = tiny.dense("bert")
    found = scores_of(made, tiny.inputs(made), kl_weight=0.3)
    heads = [one for name, one in found.units.items() if "attention" in name]
    md, kl = (np.concatenate([one.components[key].reshape(4, -1).sum(1) for one in heads])
              for key in ("md", "kl"))  # fmt: skip
    scale = md.mean() / kl.mean()
    assert found.constants["kl_scale"] == pytest.approx(scale)
    for one in found.units.values():
        expected = one.components["md"].sum(1) + 0.3 * scale * one.components["kl"]
        np.testing.assert_allclose(one.importance, expected)


def test_whole_groups_of_heads_are_measured_together() -> None:
    made = tiny.dense("llama_gqa")
    batch = tiny.inputs(made)
    found = scores_of(made, batch, gqa="whole-groups")
    model = copy.deepcopy(made.model).double()
    features, _ = run_without(made, model, batch)
    name = "model.layers.1.self_attn"
    for group in range(2):
        others, _ = run_without(made, model, batch, name, list(range(group * 32, group * 32 + 32)))
        md = found.units[name].components["md"][4 * group : 4 * group + 4, 2]
        assert np.ptp(md) == 0
        assert md.sum() == pytest.approx(pair_loss(features[2], others[2]), rel=1e-3)


def test_groups_of_neurons_are_measured_together() -> None:
    made = tiny.dense("llama")
    batch = tiny.inputs(made)
    found = scores_of(made, batch, group=20)  # of 48: 20, 20 and 8
    model = copy.deepcopy(made.model).double()
    features, _ = run_without(made, model, batch)
    name, inputs = "model.layers.1.mlp", []
    linear = model.get_submodule(f"{name}.down_proj")
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    run_without(made, model, batch)
    hook.remove()
    rows = batch["attention_mask"].bool()
    sizes = inputs[0].detach()[rows].square().sum(0) * linear.weight.detach().square().sum(0)
    order = sizes.argsort(descending=True)
    md = torch.from_numpy(found.units[name].components["md"][:, 2])
    for group in order.split(20):
        others, _ = run_without(made, model, batch, name, group)
        assert float(md[group].sum()) == pytest.approx(pair_loss(features[2], others[2]), rel=1e-3)
        torch.testing.assert_close(md[group] / md[group].sum(), sizes[group] / sizes[group].sum(),
                                   rtol=1e-4, atol=1e-8)  # fmt: skip


def features_of(tokens: int, width: int, change: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, width, generator=generator)
    return dense, dense + change * torch.randn(2, tokens, width, generator=generator)


@pytest.mark.parametrize("change", [1.0, 1e-4])
@pytest.mark.parametrize(("tokens", "width"), [(40, 12), (12, 40)])
def test_manifold_loss_is_that_of_all_pairs(tokens: int, width: int, change: float) -> None:
    dense, others = features_of(tokens, width, change)
    one, two = (F.normalize(each.double(), dim=-1) for each in (dense, others))
    expected = (two @ two.mT - one @ one.T).square().sum((1, 2))
    for parts in ([tokens], [5, tokens - 5]):
        loss = ManifoldLoss(list(one.split(parts)))
        for part, student in enumerate(two.split(parts, 1)):
            loss.add(part, student)
        torch.testing.assert_close(loss.values(), expected, rtol=1e-9, atol=0)
        loss.start()
        for part, student in enumerate(one.expand_as(two).split(parts, 1)):
            loss.add(part, student)
        assert not loss.values().any()


def test_divergences_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    for size in (3.0, 1e-3, 1e3):
        change = size * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
        dense, others = logits.float(), (logits + change).float()
        one, two = dense.double().log_softmax(-1), others.double().log_softmax(-1)
        expected = (one.exp() * (one - two)).sum((1, 2))
        torch.testing.assert_close(Divergence(dense).of(others), expected, rtol=1e-4, atol=0)


@pytest.fixture
def reference() -> tuple[Checkpoint, dict[str, Tensor]]:
    if not ORACLE.exists():
        pytest.skip(f"{ORACLE}: the values of the reference program are not there")
    model = BertForSequenceClassification.from_pretrained(ORACLE).eval()
    return in_memory.describe(model), load_file(ORACLE / "oracle.safetensors")


def batch_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in ("input_ids", "attention_mask")}


def compared(md: np.ndarray) -> np.ndarray:
    """Set to 0 what the ranker does not look at, of (layers, units, layers)."""
    layers = np.arange(len(md))
    seen = (layers > layers[:, None]) | ((layers == 2) & (layers[:, None] == 2))
    return np.where(seen[:, None], md, 0.0)  # type: ignore[no-any-return]


def test_components_of_the_reference(reference: tuple[Checkpoint, dict[str, Tensor]]) -> None:
    made, values = reference
    found = scores_of(made, batch_of(values), include_pads=True)
    # the reference's divergences are off by rounding: of neurons often by more than they are
    for kind, end, rtol, noise in (("head", "attention", 1e-5, 0), ("neuron", "ffn", 1e-3, 1e-6)):
        ours = [one.components for name, one in found.units.items() if name.endswith(end)]
        md = np.stack([one["md"] for one in ours]) * 480**2
        kl = np.stack([one["kl"] for one in ours]) * 24
        expected = compared(values[f"components_{kind}_md"].numpy())
        np.testing.assert_allclose(md, expected, rtol)
        np.testing.assert_allclose(kl, values[f"components_{kind}_kl"], rtol=1e-3, atol=noise)


def test_divergences_of_the_reference_model(
    reference: tuple[Checkpoint, dict[str, Tensor]],
) -> None:
    made, values = reference
    batch = batch_of(values)
    found = scores_of(made, batch, include_pads=True)
    for name, (_, kl) in plain_loop(made, batch).items():
        seen = ~np.isnan(kl)
        ours = found.units[name].components["kl"][seen]
        np.testing.assert_allclose(ours, kl[seen], rtol=0.03)
        assert np.median(np.abs(ours / kl[seen] - 1)) < 1e-3


def test_scale_of_the_clean_formula(
    reference: tuple[Checkpoint, dict[str, Tensor]],
) -> None:
    made, values = reference
    found = scores_of(made, batch_of(values), include_pads=True)
    # theirs are sums: over pairs of tokens, and over samples
    scale = found.constants["kl_scale"] * 480**2 / 24
    assert scale == pytest.approx(float(values["clean_kl_scale_r"]), rel=1e-4)


def compat(md: np.ndarray, kl: np.ndarray, envelope: float, decay: float) -> np.ndarray:
    """Score (layers, units) as the released program does (its lambda 10), defects and all.

    Units count more the lower their index, and the logits' term is brought near a tenth of the
    features' by powers of ten that depend on the units visited before.
    """
    layers, units = kl.shape
    factors = np.geomspace(envelope, 1, units)
    found, scales = np.zeros((layers, units)), []
    for i in range(layers):
        for j in range(units):
            features, logits = md[i, j].sum(), 16 * kl[i, j]
            if features > logits > 0:
                scales.append(10 ** np.trunc(np.log10(features / logits) - 1))
                scale = scales[-1]
            else:
                scale = np.mean(scales) if scales else 1.0
            last = 0.5 if i == layers - 1 else 1.0
            found[i, j] = (features + scale * logits) * factors[j] * decay * last
    return -found


def test_scores_of_the_released_program(reference: tuple[Checkpoint, dict[str, Tensor]]) -> None:
    made, values = reference
    batch = batch_of(values)
    found = scores_of(made, batch, include_pads=True)
    ours = [one.components for name, one in found.units.items() if name.endswith("ffn")]
    md, kl = (np.stack([one[key] for one in ours]) for key in ("md", "kl"))
    neurons = compat(md * 480**2, kl * 24, 100, 1)
    expected = values["reference_neuron_score"].numpy()
    ranks = (np.argsort(np.argsort(each.ravel())) for each in (neurons, expected))
    assert np.corrcoef(*ranks)[0, 1] > 0.9999
    assert np.median(np.abs(neurons / expected - 1)) < 3e-3  # its divergences are rounded
    # its heads: of all layers before, the last one stays off
    dense = whole_features(made, batch, [])
    md, kl = np.zeros((3, 4, 3)), np.zeros((3, 4))
    for i in range(3):
        for j in range(4):
            off = [(before, 3) for before in range(i)] + [(i, j)]
            features, logits = whole_features(made, batch, off)
            for z in range(min(i + 1, 2), 3):
                loss = ManifoldLoss([dense[0][z]])
                loss.add(0, features[z][None])
                md[i, j, z] = loss.values()
            kl[i, j] = Divergence(dense[1]).of(logits[None])
    np.testing.assert_allclose(compat(md, kl, 10, 0.5), values["reference_head_score"], 1e-4)


def whole_features(
    made: Checkpoint, batch: Any, off: list[tuple[int, int]]
) -> tuple[list[Tensor], Tensor]:
    """Run with some heads off, (layer, head): features of length 1 of all tokens, and logits."""
    model: Any = copy.deepcopy(made.model)
    for layer, head in off:
        columns = slice(16 * head, 16 * head + 16)
        model.bert.encoder.layer[layer].attention.output.dense.weight.data[:, columns] = 0
    found: list[Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.output.dense.register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        logits = model(**batch).logits
    return [F.normalize(one.flatten(0, 1), dim=-1) for one in found], logits
