"""Parameters, zeros and MACs: by hand, and against torch's own operation counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

from composable import families
from composable.errors import ShapeError
from composable.models import cost

HIDDEN, HEADS, SIZE, FFN, VOCABULARY = 32, 4, 8, 64, 50
INNER = HEADS * SIZE


def tiny(gated: bool = False, device: str = "cpu") -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=SIZE,
        num_heads=HEADS,
        d_ff=FFN,
        num_layers=2,
        feed_forward_proj="gated-gelu" if gated else "relu",
        attn_implementation="eager",
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return T5ForConditionalGeneration(config).eval()


def by_hand(source: int, target: int, ups: int) -> int:
    """Two encoder and two decoder layers, written out with numbers of the configuration."""
    encoder = 4 * HIDDEN * INNER * source + 2 * INNER * source * source
    own = 4 * HIDDEN * INNER * target + 2 * INNER * target * target
    cross = 2 * HIDDEN * INNER * (target + source) + 2 * INNER * target * source
    ffn = (ups + 1) * HIDDEN * FFN
    return 2 * (encoder + ffn * source) + 2 * (own + cross + ffn * target)


@pytest.mark.parametrize(
    ("gated", "source", "target", "expected"),
    [
        # encoder layer: 4096*3 + 64*9 + 4096*3 = 25152; decoder layer: 4096*5 + 64*25 (self)
        # + 2048*(5+3) + 64*15 (cross) + 4096*5 (ffn) = 59904; twice each.
        (False, 3, 5, 2 * (25152 + 59904)),
        # one more matrix of 2048 weights for each token: 2 * 2048 * 8
        (True, 3, 5, 2 * (25152 + 59904) + 2 * 2048 * 8),
        (False, 32, 32, by_hand(32, 32, 1)),
        (True, 7, 1, by_hand(7, 1, 2)),
    ],
)
def test_macs_of_a_tiny_t5_by_hand(gated: bool, source: int, target: int, expected: int) -> None:
    model = tiny(gated)
    found = cost.macs(model, families.of(model), source, target)
    assert found.total == expected == by_hand(source, target, 1 + gated)
    assert found.per_token == expected / (source + target)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("source", "target"), [(32, 32), (9, 4), (1, 6)])
def test_macs_equal_the_operation_counter(gated: bool, source: int, target: int) -> None:
    """FlopCounterMode counts 2 operations for each MAC of every matrix product, exactly."""
    model = tiny(gated)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            input_ids=torch.ones(1, source, dtype=torch.long),
            decoder_input_ids=torch.ones(1, target, dtype=torch.long),
        )
    vocabulary_projection = target * HIDDEN * VOCABULARY
    measured, rest = divmod(counter.get_total_flops(), 2)
    assert rest == 0
    assert (
        cost.macs(model, families.of(model), source, target).total
        == measured - vocabulary_projection
    )


def test_macs_need_no_weights() -> None:
    model = tiny(device="meta")
    assert cost.macs(model, families.of(model), 3, 5).total == by_hand(3, 5, 1)
    assert cost.parameters(model) == cost.parameters(tiny())


def test_default_lengths_are_32_and_32() -> None:
    model = tiny()
    assert cost.macs(model, families.of(model)) == cost.macs(model, families.of(model), 32, 32)


def narrow(attention: torch.nn.Module, heads: int) -> None:
    """Cut an attention to its first heads, by hand and not by the package's surgery."""
    for name in ("q", "k", "v"):
        getattr(attention, name).weight = torch.nn.Parameter(
            getattr(attention, name).weight[: heads * SIZE].detach().clone()
        )
    attention.o.weight = torch.nn.Parameter(attention.o.weight[:, : heads * SIZE].detach().clone())


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [
        ("encoder.block.0.layer.0.SelfAttention", 3, 3),
        ("decoder.block.1.layer.0.SelfAttention", 5, 5),
        ("decoder.block.0.layer.1.EncDecAttention", 5, 3),
    ],
)
def test_macs_of_fewer_heads(name: str, queries: int, keys: int, heads: int) -> None:
    model = tiny()
    before = cost.macs(model, families.of(model), 3, 5).by_module
    narrow(model.get_submodule(name), heads)
    after = cost.macs(model, families.of(model), 3, 5).by_module
    linears = 2 * HIDDEN * heads * SIZE * (queries + keys)
    assert after.pop(name) == linears + 2 * heads * SIZE * queries * keys
    del before[name]
    assert after == before


def test_removed_ffn_costs_nothing() -> None:
    model = tiny()
    name = "encoder.block.1.layer.1.DenseReluDense"
    before = cost.macs(model, families.of(model), 3, 5)
    ffn = model.get_submodule(name)
    del ffn.wi, ffn.wo
    after = cost.macs(model, families.of(model), 3, 5)
    assert after.by_module[name] == 0
    assert before.total - after.total == 2 * HIDDEN * FFN * 3


def test_nonzero_counts_weights_and_keeps_scores() -> None:
    model = tiny()
    family = families.of(model)
    dense = cost.macs(model, family, 3, 5, nonzero=True)
    assert dense.total == by_hand(3, 5, 1)
    attention = model.get_submodule("decoder.block.0.layer.1.EncDecAttention")
    with torch.no_grad():
        attention.k.weight.view(-1)[:100] = 0  # seen by 3 source tokens
        attention.q.weight.view(-1)[:10] = 0  # seen by 5 target tokens
    assert cost.macs(model, family, 3, 5, nonzero=True).total == dense.total - 300 - 50
    assert cost.macs(model, family, 3, 5).total == dense.total
    with torch.no_grad():
        for part in (attention.q, attention.k, attention.v, attention.o):
            part.weight.zero_()
    only_scores = cost.macs(model, family, 3, 5, nonzero=True).by_module
    assert only_scores["decoder.block.0.layer.1.EncDecAttention"] == 2 * INNER * 5 * 3


def expected_parameters(embeddings: int) -> int:
    layers = 2 * (4 + 8) * HIDDEN * INNER + 4 * 2 * HIDDEN * FFN
    norms = (2 * 2 + 2 * 3 + 2) * HIDDEN
    position_bias = 2 * 32 * HEADS
    return embeddings * VOCABULARY * HIDDEN + layers + norms + position_bias


@pytest.mark.parametrize(("tied", "embeddings"), [(True, 1), (False, 2)])
def test_tied_weights_count_once(tied: bool, embeddings: int) -> None:
    model = tiny()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert cost.parameters(model) == expected_parameters(embeddings)


def test_weights_that_only_share_memory_count_once() -> None:
    """After load_state_dict(assign=True) tied weights are several parameters on one memory."""
    first = torch.nn.Parameter(torch.ones(4, 3))
    model = torch.nn.ParameterList([first, torch.nn.Parameter(first.detach())])
    model.append(torch.nn.Parameter(torch.ones(4, 3)))
    assert cost.parameters(model) == 24
    assert cost.nonzero_parameters(model) == 24


def test_sparsity_is_what_is_gone_or_zero_of_the_dense_model() -> None:
    model = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)[0, :2] = 0
    assert cost.nonzero_parameters(model) == 6
    assert cost.sparsity(model, 8) == 0.25
    assert cost.sparsity(model, 12) == 0.5  # 4 gone and 2 zeros of 12


@pytest.mark.parametrize("count", [0, -1, 7])
def test_sparsity_refuses_a_smaller_dense_model(count: int) -> None:
    with pytest.raises(ShapeError, match=rf"dense_parameters is {count}, .* stores 8"):
        cost.sparsity(torch.nn.Linear(4, 2, bias=False), count)


@pytest.mark.parametrize(("source", "target"), [(-1, 5), (5, -1), (0, 0)])
def test_macs_refuse_lengths_without_tokens(source: int, target: int) -> None:
    model = tiny(device="meta")
    with pytest.raises(ShapeError, match=f"source length {source} and target length {target}"):
        cost.macs(model, families.of(model), source, target)


def test_report_holds_all_numbers() -> None:
    model = tiny()
    narrow(model.get_submodule("encoder.block.0.layer.0.SelfAttention"), 2)
    dense = cost.parameters(tiny())
    found = cost.report(model, families.of(model), dense, 3, 5)
    gone = 4 * HIDDEN * 2 * SIZE
    assert found["parameters"] == dense - gone
    assert found["sparsity"] == pytest.approx(gone / dense, abs=1e-6)
    less = gone * 3 + 2 * 2 * SIZE * 9
    assert found["macs_per_token"] == round((by_hand(3, 5, 1) - less) / 8, 2)
    assert found["macs_per_token_nonzero"] == found["macs_per_token"]
    assert (found["source_length"], found["target_length"]) == (3, 5)
    assert cost.report(model, families.of(model))["sparsity"] is None
