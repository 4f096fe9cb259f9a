"""The cache of an attention, which transformers 5.24 gave another name."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from composable.families import base, t5
from composable.models.surgery import NoAttention


@pytest.mark.parametrize("name", base.CACHE)
def test_a_removed_attention_counts_its_tokens(name: str) -> None:
    cache = DynamicCache()
    NoAttention(0)(torch.ones(2, 3, 4), attention_mask=None, **{name: cache})
    assert cache.get_seq_length() == 3


class Dense(torch.nn.Module):
    """What a T5 attention shows of itself."""

    layer_idx = 0

    def compute_bias(self, queries: int, keys: int, _: Any, past: int) -> torch.Tensor:
        """Return where the queries begin, for 4 heads."""
        return torch.full((1, 4, queries, keys), float(past))

    def forward(self, states: Any, mask: Any, others: Any, bias: Any, **kwargs: Any) -> Any:
        """Return what came."""
        return states, bias, kwargs


class Pruned(t5.PrunedAttention, Dense):  # type: ignore[misc]
    """The same without some heads."""

    def __init__(self, heads: list[int]) -> None:
        super().__init__()
        self.kept_heads = torch.tensor(heads, dtype=torch.long)


@pytest.mark.parametrize("name", base.CACHE)
def test_an_attention_of_t5_without_some_heads_hands_on_its_cache(name: str) -> None:
    cache: Any = DynamicCache()
    cache.update(torch.ones(2, 1, 5, 1), torch.ones(2, 1, 5, 1), 0)
    _, bias, kwargs = Pruned([1, 3])(torch.ones(2, 1, 4), **{name: cache})
    assert kwargs == {name: cache}
    assert (bias.shape, bias.unique().tolist()) == ((1, 4, 1, 6), [5.0])


@pytest.mark.parametrize("name", base.CACHE)
def test_an_attention_of_t5_without_heads_writes_its_cache(name: str) -> None:
    cache = DynamicCache()
    Pruned([])(torch.ones(2, 3, 4), **{name: cache})
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", base.CACHE)
def test_variants_run_without_the_cache_of_the_recorded_call(name: str) -> None:
    assert base.without_cache({name: DynamicCache(), "mask": 1}) == {name: None, "mask": 1}
    assert base.without_cache({"mask": 1}) == {"mask": 1}


@pytest.mark.parametrize("name", base.CACHE)
def test_the_name_is_the_one_that_a_model_takes(name: str) -> None:
    made: dict[str, Any] = {}
    exec(f"def forward(self, {name}=None): pass", made)
    assert base.cache_name(type("Model", (), {"forward": made["forward"]})()) == name
