"""kernels: the lean cross-entropy, dropout, float32 products, and what is put back afterwards."""

import pytest
import torch
from torch import nn

from composable.linalg import kernels
from tests import tiny


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_cross_entropy_is_that_of_torch(
    rows: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 and in several blocks; every row has a gradient of its own."""
    monkeypatch.setattr(kernels, "BLOCK", {"cpu": 7 * 11})
    torch.manual_seed(rows)
    scores = torch.randn(rows, 11, dtype=torch.float64) * 20
    labels, weight = torch.randint(11, (rows,)), torch.rand(rows, dtype=torch.float64)
    mine, other = (scores.clone().requires_grad_() for _ in range(2))
    found = kernels.cross_entropy(mine * 1, labels, smoothing)
    expected = nn.functional.cross_entropy(
        other, labels, label_smoothing=smoothing, reduction="none"
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_cross_entropy_of_bfloat16_sums_in_float32() -> None:
    torch.manual_seed(0)
    scores = (torch.randn(33, 3000) * 5).bfloat16()
    labels = torch.randint(3000, (33,))
    mine, other = scores.clone().requires_grad_(), scores.float().requires_grad_()
    found = kernels.cross_entropy(mine * 1, labels)
    expected = nn.functional.cross_entropy(other, labels, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(mine.grad.float(), other.grad, rtol=2**-7, atol=1e-6)


def test_logits_are_kept_where_no_gradient_is_wanted() -> None:
    scores = torch.randn(3, 5)
    before = scores.clone()
    kernels.cross_entropy(scores, torch.tensor([0, 1, 2]))
    assert torch.equal(scores, before)


def test_a_second_backward_is_refused() -> None:
    """The gradient lies in the place of the logits and is scaled once."""
    loss = kernels.cross_entropy(torch.randn(3, 5, requires_grad=True) * 1, torch.tensor([0, 1, 2]))
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 77), (3,), (0, 4)])
def test_dropout_keeps_the_mean(rate: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = kernels.QuickDropout(rate)
    ones = torch.ones(shape, requires_grad=True)
    dropped = layer(ones)
    assert dropped.shape == shape
    values = dropped[dropped != 0]
    assert torch.allclose(values, torch.full_like(values, 1 / (1 - rate)), rtol=1e-3)
    if len(ones) == 1000:
        assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=6e-3)
        for lane in range(4):  # four elements are of one random number
            zeros = dropped.flatten()[lane::4] == 0
            assert float(zeros.float().mean()) == pytest.approx(rate, abs=1.2e-2)
        both = (dropped.flatten()[0:-4:4] == 0) & (dropped.flatten()[1:-4:4] == 0)
        assert float(both.float().mean()) == pytest.approx(rate**2, abs=1e-2)
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped)


def test_dropout_is_off_where_torchs_is() -> None:
    ones = torch.ones(100)
    assert torch.equal(kernels.QuickDropout(0.5).eval()(ones), ones)
    assert torch.equal(kernels.QuickDropout(0.0)(ones), ones)
    assert not kernels.QuickDropout(1.0)(ones).any()


def test_dropout_follows_the_seed() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = kernels.QuickDropout(0.3)(torch.ones(50))
        return found

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("trains", [True, False])
def test_everything_is_put_back(trains: bool) -> None:
    model = tiny.t5()
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    kinds = [type(module) for module in model.modules()]
    inside: list[type] = []

    def fail() -> None:
        with kernels.for_cpu(model, "cpu", longest=7, trains=trains):
            inside.extend(type(module) for module in model.modules())
            assert model.config._attn_implementation == "eager"
            assert model.encoder.config._attn_implementation == "eager"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    slow, quick = (nn.Dropout, kernels.QuickDropout) if trains else (nn.Linear, kernels.QuickLinear)
    assert inside.count(quick) == kinds.count(slow) > 0
    assert [type(module) for module in model.modules()] == kinds
    assert model.config._attn_implementation == model.decoder.config._attn_implementation == "sdpa"
    assert products.fp32_precision == before


def test_long_texts_and_gpus_keep_their_attention() -> None:
    model = tiny.t5()
    with kernels.for_cpu(model, "cpu", longest=500):
        assert model.config._attn_implementation == "sdpa"
    with kernels.for_cpu(model, "cuda", longest=5):
        assert model.config._attn_implementation == "sdpa"
        assert not any(isinstance(module, kernels.QuickLinear) for module in model.modules())


@pytest.mark.parametrize("shape", [(1, 50), (64, 50), (4, 16, 50), (0, 50)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_torchs(shape: tuple[int, ...], has_bias: bool) -> None:
    """Errors are those of float32; neither gradients nor autocast are lost."""
    torch.manual_seed(0)
    linear = nn.Linear(50, 70, bias=has_bias)
    inputs, exact = torch.randn(shape), linear.double()
    expected = exact(inputs.double())
    linear.float()
    linear.__class__ = kernels.QuickLinear
    with torch.inference_mode():
        torch.testing.assert_close(linear(inputs).double(), expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(inputs).dtype == torch.bfloat16
    with torch.no_grad():
        assert linear.double()(inputs.double()).dtype == torch.float64
    assert linear.float()(inputs).requires_grad


def test_linear_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_onednn_linear", lambda: None)
    with torch.inference_mode():
        assert kernels.QuickLinear(5, 6)(torch.randn(100, 5)).shape == (100, 6)


def test_products_stay_float32() -> None:
    """Whatever the switch is called: errors are those of float32, not of bfloat16 (4e-1)."""
    torch.manual_seed(0)
    a, b = torch.randn(300, 500), torch.randn(500, 400)
    exact = a.double() @ b.double()
    with kernels.float32_products():
        assert float((a @ b - exact).abs().max()) < 1e-3


def test_products_are_left_alone_where_they_would_be_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "keeps_float32", lambda: False)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with kernels.float32_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not kernels.keeps_float32.__wrapped__()
