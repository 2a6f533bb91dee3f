"""The teacher's cache: unbiased, as large as it says, byte for byte what was written, refused when it is another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.distill import cache
from compress.distill.cache import Settings, Sparse
from compress.errors import ConfigError
from compress.losses.heads import Head


def case(vocabulary: int, positions: int, spread: float, seed: int = 0) -> tuple[Tensor, Head]:
    g = torch.Generator().manual_seed(seed)
    head = Head(weight_VH=torch.randn(vocabulary, 6, generator=g) * spread)
    return torch.randn(positions, 6, generator=g), head


def estimate(sparse: Sparse, vocabulary: int) -> Tensor:
    """The cached distribution, dense: float64 `[P, V]`."""
    teacher = sparse.teacher(vocabulary)
    dense = torch.zeros(len(teacher.ids_PK), vocabulary, dtype=torch.float64)
    return dense.scatter_add_(1, teacher.ids_PK, teacher.mass_PK.double())


@settings(max_examples=25, deadline=None)
@given(
    vocabulary=st.integers(9, 60),
    top_k=st.integers(1, 8),
    tail=st.integers(1, 12),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
)
def test_right_on_average(vocabulary: int, top_k: int, tail: int, spread: float, temperature: float) -> None:
    """Each token's mean over many draws is its probability, within the error of that mean; sums are 1; top is exact."""
    hidden, head = case(vocabulary, 3, spread)
    options = Settings(top_k=top_k, tail=tail, temperature=temperature, vocabulary=vocabulary)
    p = (hidden @ head.weight_VH.t() / temperature).double().softmax(-1)
    draws = 400
    uniform = torch.from_numpy(np.random.default_rng(1).random((draws, 3)))
    many = torch.stack([estimate(cache.cut_down(hidden, head, uniform[i], options), vocabulary) for i in range(draws)])
    torch.testing.assert_close(many.sum(-1), torch.ones(draws, 3, dtype=torch.float64), rtol=0, atol=1e-6)
    error = (many.mean(0) - p).abs()
    kept = p.topk(top_k).indices
    rest = p.scatter(1, kept, 0.0)
    step = (
        rest.sum(-1, keepdim=True) / tail
    )  # what one draw weighs; a token is drawn floor or ceil of rest / step times
    part = (rest / step) % 1
    noise = step * (part * (1 - part) / draws).sqrt()
    assert bool((error <= 5.5 * noise + 4 * step / draws + 1e-6).all())
    torch.testing.assert_close(many.gather(2, kept.expand(draws, -1, -1))[7], p.gather(1, kept), rtol=0, atol=1e-6)


def test_top_tokens_alone_are_biased() -> None:
    """What the sampled tail is for: the test above fails without it."""
    hidden, head = case(40, 3, 0.5)
    p = (hidden @ head.weight_VH.t()).double().softmax(-1)
    top = p.topk(4)
    alone = torch.zeros_like(p).scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    assert float((alone - p).abs().max()) > 0.01


def test_systematic_draws_vary_less_than_independent_ones() -> None:
    hidden, head = case(50, 2, 1.0)
    options = Settings(top_k=2, tail=8, vocabulary=50)
    uniform = torch.from_numpy(np.random.default_rng(0).random((500, 2)))
    ours = torch.stack([estimate(cache.cut_down(hidden, head, u, options), 50) for u in uniform]).var(0).sum()
    p = (hidden @ head.weight_VH.t()).double().softmax(-1)
    tail = p.scatter(1, p.topk(2).indices, 0.0)
    left = tail.sum(-1, keepdim=True)
    independent = (left / 8 * tail - tail.square() / 8).sum()
    assert ours < 0.8 * independent


def test_entropy_and_draws_of_a_row_are_its_own() -> None:
    hidden, head = case(30, 4, 1.0)
    found = cache.cut_down(hidden, head, torch.rand(4, dtype=torch.float64), Settings(vocabulary=30))
    p = (hidden @ head.weight_VH.t()).double().softmax(-1)
    torch.testing.assert_close(found.entropy_P.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    one = cache.uniforms([5, 9], 6, seed=3)
    assert torch.equal(one[6:], cache.uniforms([9], 6, seed=3))
    assert not torch.equal(one[6:], cache.uniforms([9], 6, seed=4))


@pytest.mark.parametrize(("vocabulary", "id_bytes"), [(4096, 2), (65_536, 2), (65_537, 3), (262_144, 3), (1 << 25, 4)])
def test_bytes_there_and_back(tmp_path: Path, vocabulary: int, id_bytes: int) -> None:
    """All ids survive, the largest too; about 50 bytes a token at the default sizes."""
    options = Settings(vocabulary=vocabulary)
    assert options.id_bytes == id_bytes
    assert options.token_bytes == {2: 44, 3: 56, 4: 68}[id_bytes]
    g = torch.Generator().manual_seed(0)
    written = Sparse(
        top_PK=torch.randint(0, vocabulary, (15, 4), generator=g),
        mass_PK=torch.rand(15, 4, generator=g),
        tail_PN=torch.randint(0, vocabulary, (15, 8), generator=g),
        entropy_P=torch.rand(15, generator=g),
    )
    written.top_PK[0, 0] = written.tail_PN[-1, -1] = vocabulary - 1
    path = cache.part_path(tmp_path, 0)
    path.write_bytes(cache.to_bytes(written, options))
    assert path.stat().st_size == 15 * options.token_bytes
    part = cache._Part(path, 3, 5, options)
    read = part.rows([2, 0])
    for name in ("top_PK", "mass_PK", "tail_PN", "entropy_P"):
        value = getattr(written, name)
        assert torch.equal(getattr(read, name), torch.cat([value[10:], value[:5]])), name


def test_sizes_outside_the_format_are_refused() -> None:
    with pytest.raises(ConfigError, match="--top-k 9 --tail 8: a cache keeps 1 to 8 tokens exactly"):
        Settings(top_k=9)
