"""Attention of one query over a whole cache, beside torch's over keys and values copied for every head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import calibration_data
from compress import sampling
from compress.one_query import attend, one_query

MODULE = torch.nn.Identity()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3), key_heads=st.integers(1, 3), shared=st.integers(1, 4), places=st.integers(1, 9),
    kind=st.sampled_from(["none", "bool", "added"]), scaling=st.sampled_from([None, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_as_torch_attends(
    rows: int, key_heads: int, shared: int, places: int, kind: str, scaling: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(rows, key_heads * shared, 1, 8, dtype=torch.float64)
    key, value = torch.randn(2, rows, key_heads, places, 8, dtype=torch.float64)
    mask = None if kind == "none" else torch.rand(rows, 1, 1, places) > 0.4
    if mask is not None:
        mask[..., 0] = True
    if kind == "added":
        assert mask is not None
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    copied = [t.repeat_interleave(shared, 1) for t in (key, value)]
    want = F.scaled_dot_product_attention(query, *copied, attn_mask=mask, scale=scaling)
    found, _ = attend(MODULE, query, key, value, mask, scaling)
    assert torch.allclose(found, want.transpose(1, 2), atol=1e-6)  # scores are float32


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"position_bias": torch.zeros(1)}])
def test_what_it_does_not_know_is_refused(asked: dict[str, object]) -> None:
    q, kv = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match=next(iter(asked))):
        attend(MODULE, q, kv, kv, None, **asked)
    with pytest.raises(NotImplementedError, match="2 queries"):
        attend(MODULE, q.expand(1, 2, 2, 8), kv, kv, None)


def test_a_model_attends_so_inside_the_context_alone() -> None:
    model = sampling.load_model_float32(calibration_data.reference_model())
    with one_query(model):
        assert model.config._attn_implementation == "one_query"
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with one_query(model):
        assert model.config._attn_implementation == "eager"
