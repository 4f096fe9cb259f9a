"""Pruning methods against torch's own and against plain loops: exact equality."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from composable import families, methods
from composable.errors import ShapeError, UserError
from composable.families import Module
from composable.methods import Evidence
from composable.methods.base import kept_heads, kept_units
from composable.methods.head_l1 import head_importance
from composable.methods.l1 import keep_mask
from composable.methods.neuron_l1 import neuron_importance
from composable.models.surgery import kept_groups, units_to_remove
from tests import tiny

RATES = [0.0, 0.001, 0.05, 0.25, 0.29, 0.3, 1 / 3, 0.5, 0.75, 0.9, 0.999]
ATTENTION = "decoder.block.1.layer.1.EncDecAttention"


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", [(7, 5), (32, 48), (1, 10), (3, 1)])
def test_l1_equals_torch_with_the_integer_amount(shape: tuple[int, int], rate: float) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    linear = nn.Linear(shape[1], shape[0])
    weight = torch.randn(shape, generator=generator)
    assert weight.abs().unique().numel() == weight.numel()  # no ties
    linear.weight = nn.Parameter(weight)
    count = math.floor(weight.numel() * rate + 0.5)
    mask = keep_mask(linear.weight, rate)
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == count
    prune.l1_unstructured(linear, "weight", amount=count)
    expected = linear.weight_mask if count else torch.ones(shape)
    assert mask.tolist() == expected.bool().tolist()


@pytest.mark.parametrize("rate", RATES)
def test_counts_are_exact(rate: float) -> None:
    for n in range(1, 300):
        expected = math.floor(n * rate + 0.5)
        assert int((~keep_mask(torch.arange(n), rate)).sum()) == expected
        assert units_to_remove(n, rate) == min(expected, n - 1)


@pytest.mark.parametrize(
    ("weight", "rate", "removed"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], 0.5, [0, 1]),
        ([[2.0, -1.0], [1.0, 2.0]], 0.25, [1]),
        ([[-1.0, 2.0], [1.0, -2.0]], 0.75, [0, 1, 2]),
        ([[3.0, 0.0, -0.0, 0.0]], 0.5, [1, 2]),
        ([[3.0, 2.0, 1.0, 2.0]], 0.5, [1, 2]),
        ([[5.0]], 0.5, [0]),
        ([[5.0]], 0.49, []),
    ],
)
def test_of_equal_weights_the_lower_index_goes(
    weight: list[list[float]], rate: float, removed: list[int]
) -> None:
    mask = keep_mask(torch.tensor(weight), rate)
    assert (~mask.flatten()).nonzero().flatten().tolist() == removed


def test_many_ties_go_in_order() -> None:
    """A few thousand equal weights: an unstable sort would shuffle them."""
    assert (~keep_mask(torch.full((60, 50), -0.5), 0.3).flatten()).nonzero().flatten().tolist() == (
        list(range(900))
    )


def heads_by_loop(weights: list[torch.Tensor], heads: int, rate: float) -> list[int]:
    """The heads that stay, with lists and floats alone."""
    size = len(weights[0]) // heads
    sums = [
        sum(abs(x) for w in weights for row in w[h * size : (h + 1) * size].tolist() for x in row)
        for h in range(heads)
    ]
    count = heads if rate == 1 else min(math.floor(heads * rate + 0.5), heads - 1)
    gone = sorted(range(heads), key=lambda head: (sums[head], head))[:count]
    return [head for head in range(heads) if head not in gone]


@pytest.mark.parametrize("rate", [*RATES, 1.0])
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8])
def test_head_l1_equals_a_plain_loop(heads: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(heads * 4, 10, generator=generator) for _ in range(3))
    found = kept_units(head_importance(q, k, v, heads), rate)
    assert found == heads_by_loop([q, k, v], heads, rate)
    assert (len(found) == 0) == (rate == 1)


@pytest.mark.parametrize("part", range(3))
def test_each_of_q_k_v_counts(part: int) -> None:
    weights = [torch.ones(6, 4) for _ in range(3)]
    weights[part][2:4] = 0.5
    assert kept_units(head_importance(*weights, 3), 1 / 3) == [0, 2]
    weights[part][2:4] = -2.0
    assert kept_units(head_importance(*weights, 3), 2 / 3) == [1]


def test_of_equal_heads_the_lower_index_goes() -> None:
    weight = torch.ones(12, 5)
    assert kept_units(head_importance(weight, weight, weight, 6), 0.5) == [3, 4, 5]


def test_kept_units_nest_as_the_rate_falls() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(24, 6, generator=generator) for _ in range(3))
    rates = sorted({*RATES, *(i / 40 for i in range(41))})
    heads = [set(kept_units(head_importance(q, k, v, 8), rate)) for rate in rates]
    masks = [keep_mask(q, rate) for rate in rates]
    assert all(higher <= lower for lower, higher in itertools.pairwise(heads))
    assert all(bool((lower | ~higher).all()) for lower, higher in itertools.pairwise(masks))
    assert heads[0] == set(range(8))
    assert heads[-1] == set()
    assert {len(kept) for kept in heads} == set(range(9))


@pytest.mark.parametrize(
    ("whole_groups", "rate", "kept"),
    [
        (True, 0.5, [3, 4, 5, 6, 7, 8]),  # sums 9, 12, 10, 7
        (True, 0.75, [3, 4, 5]),
        (False, 1 / 3, [0, 2, 4, 5, 7, 8, 10, 11]),  # of equal heads the lower index goes
        (False, 2 / 3, [0, 5, 7, 11]),
    ],
)
def test_heads_of_grouped_queries(whole_groups: bool, rate: float, kept: list[int]) -> None:
    """By hand: no single head of a group, nor the highest or lowest, ranks groups as sums do."""
    module = Module("m", "attention", "decoder", units=12, groups=4, whole_groups=whole_groups)
    importance = torch.tensor([9.0, 0, 0, 4, 4, 4, 1, 8, 1, 0, 0, 7])
    assert kept_heads(importance, module, rate) == kept


def test_a_method_reads_its_module_and_leaves_it_alone() -> None:
    model = tiny.t5()
    part = model.get_submodule(ATTENTION)
    before = {name: weight.clone() for name, weight in part.named_parameters()}
    modules = {module.name: module for module in families.of(model).modules(model)}
    heads = methods.by_name("head_l1").prune(part, modules[ATTENTION], 0.5, Evidence())
    assert heads.mask is None
    assert heads.kept_units == heads_by_loop([part.q.weight, part.k.weight, part.v.weight], 4, 0.5)
    masked = methods.by_name("l1").prune(part.o, modules[f"{ATTENTION}.o"], 0.5, Evidence())
    assert masked.kept_units is None
    assert masked.mask is not None
    assert torch.equal(masked.mask, keep_mask(part.o.weight, 0.5))
    assert all(torch.equal(weight, before[name]) for name, weight in part.named_parameters())


def test_methods_have_names_and_kinds_a_default() -> None:
    names = [method.name for method in methods.METHODS]
    assert len(set(names)) == len(names)
    assert all(methods.by_name(name).name == name for name in names)
    with pytest.raises(UserError, match=r'unknown method "l2"; known are l1, .*neuron_l1'):
        methods.by_name("l2")
    for kind, method in methods.DEFAULTS.items():
        assert kind in method.kinds
        assert set(method.needs) <= {"inputs"}  # what a command can measure without being asked
    assert methods.for_kind("layer", {"linear": "l1"}) is None
    assert methods.for_kind("linear", {"linear": "alps"}) is methods.by_name("alps")
    assert methods.for_kind("attention", {"linear": "alps"}) is methods.by_name("head_gram")


def test_neurons_by_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    gate, up = (torch.randn(7, 4, generator=generator) for _ in range(2))
    down = torch.randn(4, 7, generator=generator)
    found = neuron_importance([gate, up], down)
    for neuron in range(7):
        total = sum(abs(float(x)) for w in (gate, up) for x in w[neuron])
        total += sum(abs(float(x)) for x in down[:, neuron])
        assert float(found[neuron]) == pytest.approx(total, rel=1e-6)


def test_shared_keys_and_values_count_in_parts() -> None:
    """The heads of a group together have q of their own, and k and v once."""
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(6 * 2, 5, generator=generator)
    k, v = (torch.randn(3 * 2, 5, generator=generator) for _ in range(2))
    found = head_importance(q, k, v, 6, 3)
    for group in range(3):
        own = float(q[group * 4 : group * 4 + 4].abs().sum())
        shared = float((k.abs() + v.abs())[group * 2 : group * 2 + 2].sum())
        assert float(found[group * 2 : group * 2 + 2].sum()) == pytest.approx(
            own + shared, rel=1e-6
        )


@pytest.mark.parametrize(
    ("heads", "groups", "message"),
    [
        (5, 5, "12 rows do not divide into 5 heads"),
        (0, 0, "12 rows do not divide into 0 heads"),
        (4, 6, "4 heads do not divide into 6 groups"),
    ],
)
def test_heads_that_do_not_divide(heads: int, groups: int, message: str) -> None:
    weight = torch.ones(12, 3)
    with pytest.raises(ShapeError, match=message):
        head_importance(weight, weight, weight, heads, groups)


def test_groups_keep_equally_many_heads() -> None:
    module = Module("some", "attention", "decoder", units=4, head_size=2, groups=2)
    assert kept_groups(module, [0, 2]) == [0, 1]
    assert kept_groups(module, [2, 3]) == [1]
    with pytest.raises(ShapeError, match=r'"some": heads \[0, 2, 3\] leave its 2 .* with \[1, 2\]'):
        kept_groups(module, [0, 2, 3])
