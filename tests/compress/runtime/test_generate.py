"""Picking tokens against the obvious definition, and where a text ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ConfigError
from compress.runtime.generate import Sampling, generate, pick
from compress.runtime.resident import TorchDecoder


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20),
    top_k=st.integers(0, 6),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
    seed=st.integers(0, 1000),
)
def test_what_is_drawn_is_among_the_likeliest(
    logits: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    """Kept: the top_k likeliest, and of those as many as are needed until their share reaches top_p."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    token = pick(torch.tensor(logits), sampling, torch.Generator().manual_seed(seed))
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = [torch.tensor(logits[i] / temperature, dtype=torch.float64).exp() for i in order]
    total, reached, allowed = sum(weights), 0.0, []
    for i, w in zip(order, weights, strict=True):
        allowed.append(i)
        reached += float(w / total)
        if reached >= top_p + 1e-9:
            break
    assert token in allowed
    assert pick(torch.tensor(logits), Sampling(), torch.Generator()) == order[0]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[pick(logits, Sampling(temperature=1.0), generator)] += 1
    assert float((counts / 4000 - logits.softmax(0)).abs().max()) < 0.03  # four standard errors


def test_where_a_text_ends(reference_model: Path) -> None:
    decoder = TorchDecoder.open(reference_model, capacity=12)
    prompt = [5, 80, 300, 12]
    made = list(generate(decoder, prompt, limit=100, sampling=Sampling()))
    assert len(made) == 8, "the cache holds 12 tokens, the prompt has 4"
    assert list(generate(decoder, prompt, limit=3, sampling=Sampling())) == made[:3]
    ends = list(generate(decoder, prompt, limit=100, eos=frozenset([made[2]]), sampling=Sampling()))
    assert ends == made[: made.index(made[2])]
    drawn = [list(generate(decoder, prompt, limit=8, sampling=Sampling(temperature=1.5, seed=s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_refusals(reference_model: Path) -> None:
    decoder = TorchDecoder.open(reference_model, capacity=4)
    with pytest.raises(ConfigError, match="the prompt has 4 tokens and the cache holds 4"):
        next(generate(decoder, [1, 2, 3, 4], limit=1, sampling=Sampling()))
    with pytest.raises(ConfigError, match="no tokens"):
        next(generate(decoder, [], limit=1, sampling=Sampling()))
    with pytest.raises(ConfigError, match="top_p=0"):
        Sampling(top_p=0)
