"""Error feedback against slow, obvious computations and against what it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import numerics
from compress.errors import ArtifactError
from compress.quantize import awq
from compress.quantize.feedback import (
    fit_range,
    group_order,
    inverse_factor,
    invert_upper_,
    prepare,
    round_with_feedback,
)
from compress.scheme import Scheme
from compress.statistics import kept_share

G16 = Scheme(group_size=16)


def problem(num_rows: int = 24, size: int = 64, tokens: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of strongly correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x = torch.randn(tokens, size, generator=generator) @ mixing
    x[:, ::13] *= 5
    return torch.randn(num_rows, size, generator=generator) * 0.1, x.t() @ x / tokens


def slow_feedback(w_OI: Tensor, hessian_II: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and weights the long way, in float64: after each column, the best answer of all later columns is found by
    solving for it, `delta_rest = -H_rest,rest^-1 H_rest,j delta_j`; no factor, no blocks."""
    size = scheme.group_size
    damped = hessian_II.double().clone()
    damped.diagonal().add_(0.01 * float(hessian_II.diagonal().mean()))
    left, codes = w_OI.double().clone(), torch.zeros(w_OI.shape, dtype=torch.int64)
    order = group_order(hessian_II, size)
    columns = [g * size + j for g in order for j in range(size)]
    for turn, group in enumerate(order):
        there = slice(group * size, (group + 1) * size)
        scale, zero, _ = fit_range(left[:, there].float(), hessian_II.diagonal()[there], scheme)
        for j in range(size):
            column = group * size + j
            rest = columns[turn * size + j + 1 :]
            q = ((left[:, column] / scale).round() + zero).clamp(0, scheme.max_code)
            delta = (q - zero) * scale - left[:, column]
            codes[:, column] = q.long()
            if rest:
                answer = torch.linalg.solve(damped[rest][:, rest], damped[rest, column])
                # The columns rounded so far are settled, so only the error just made is answered.
                left[:, rest] -= delta[:, None] * answer
            left[:, column] += delta
    return codes, left


def test_equals_solving_for_the_best_answer_column_by_column() -> None:
    w_OI, gram_II = problem()
    found = round_with_feedback(w_OI, prepare(gram_II, G16), G16)
    codes, value = slow_feedback(w_OI, gram_II, G16)
    # In float32 a weight next to the middle of two codes may fall the other way, and the rest of its row with it.
    same = (found.codes_OI.long() == codes).all(dim=1)
    assert float(same.float().mean()) > 0.9
    torch.testing.assert_close(found.dequantize(G16)[same].double(), value[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_loses_less_than_rounding_to_nearest(symmetric: bool) -> None:
    """Correlated inputs are what error feedback lives on; the ranges alone gain less."""
    scheme = Scheme(group_size=16, symmetric=symmetric)
    w_OI, gram_II = problem(num_rows=64)
    nearest = awq.output_error(numerics.round_to_nearest(w_OI, scheme) - w_OI, gram_II)
    groups = zip(w_OI.split(16, dim=1), gram_II.diagonal().split(16), strict=True)
    ranged = torch.cat([numerics.fake_quantize(w, *fit_range(w, h, scheme)[:2], scheme) for w, h in groups], dim=1)
    found = round_with_feedback(w_OI, prepare(gram_II, scheme), scheme)
    error = awq.output_error(found.dequantize(scheme) - w_OI, gram_II)
    assert error < 0.7 * awq.output_error(ranged - w_OI, gram_II) < 0.7 * nearest
    assert bool((found.zero_point_OG == 8).all()) == symmetric


def test_independent_inputs_leave_nothing_to_feed_back() -> None:
    """With a diagonal Gram matrix each code is that of plain rounding in the range found."""
    w_OI, _ = problem()
    found = round_with_feedback(w_OI, prepare(torch.diag(torch.rand(64) + 0.5), G16), G16)
    plain = numerics.quantize(numerics.to_groups(w_OI, G16), found.scale_OG, found.zero_point_OG, G16)
    assert torch.equal(found.codes_OI, plain.reshape(w_OI.shape).to(torch.uint8))
    torch.testing.assert_close(found.wanted_OI, w_OI)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 40), tokens=st.integers(1, 60), seed=st.integers(0, 999))
def test_factor_inverts_the_damped_matrix(size: int, tokens: int, seed: int) -> None:
    """Also with fewer tokens than channels, where the Gram matrix alone has no inverse."""
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = x.t() @ x / tokens
    upper = inverse_factor(gram.float(), 0.01).double()
    assert torch.equal(upper, upper.triu())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(size)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(size, dtype=torch.float64), rtol=0, atol=2e-3)


def test_factor_of_a_matrix_that_is_not_definite_and_of_nan() -> None:
    ones = torch.ones(8, 8)
    ones[0, 1] = ones[1, 0] = 1.5  # an indefinite "Gram matrix", as rounding can make one
    assert bool(torch.isfinite(inverse_factor(ones)).all())
    assert bool(torch.isfinite(inverse_factor(torch.zeros(8, 8))).all())
    with pytest.raises(ArtifactError, match="not finite"):
        inverse_factor(torch.full((8, 8), torch.nan))


def test_scaled_inputs_need_no_new_factor() -> None:
    """`prepare(G).scaled(s)` feeds back as `prepare(D^-1 G D^-1)` does, up to where the damping is added."""
    w_OI, gram_II = problem()
    s_I = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    inputs = prepare(gram_II, G16)
    scaled = inputs.scaled(s_I)
    hessian = gram_II.double().clone()
    hessian.diagonal().add_(0.01 * float(gram_II.diagonal().mean()))
    wanted = torch.linalg.inv(hessian / (s_I[:, None] * s_I))[inputs.columns_I][:, inputs.columns_I]
    upper = scaled.rows(0, 64).double()
    torch.testing.assert_close(upper.t() @ upper, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.rows(16, 32), scaled.rows(0, 64)[16:32, 16:])
    torch.testing.assert_close(scaled.times_inverse(w_OI).double(), w_OI.double() @ wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.importance_I, gram_II.diagonal() / s_I.square())


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_triangular_matrix_is_inverted_in_place(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    upper = torch.randn(size, size, generator=generator, dtype=torch.float64).triu() / size**0.5
    upper.diagonal().abs_().add_(1)
    inverse = upper.clone()
    invert_upper_(inverse)
    torch.testing.assert_close(inverse @ upper, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(inverse, inverse.triu())


def shrunk(gram_II: Tensor, share: float) -> Tensor:
    return gram_II * share + torch.diag(gram_II.diagonal()) * (1 - share)


def test_shrinkage_grows_as_tokens_get_few() -> None:
    _, gram_II = problem()
    for tokens, share in ((10**6, 0.95), (640, 0.9), (64, 0.0), (1, 0.0)):
        assert kept_share(64, tokens) == pytest.approx(share)
        inputs, expected = prepare(gram_II, G16, share), prepare(shrunk(gram_II, share), G16)
        torch.testing.assert_close(inputs.upper_II, expected.upper_II)
        assert inputs.order == expected.order and torch.equal(inputs.importance_I, gram_II.diagonal())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), symmetric=st.booleans())
def test_range_is_no_worse_than_the_full_one(seed: int, symmetric: bool) -> None:
    scheme = Scheme(group_size=16, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)
    w_Og = torch.randn(5, 16, generator=generator) * torch.rand(5, 1, generator=generator)
    importance = torch.rand(16, generator=generator)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return ((numerics.fake_quantize(w_Og, scale, zero, scheme) - w_Og).square() * importance).sum(1)

    scale, zero, factor = fit_range(w_Og, importance, scheme)
    full = error(*numerics.scale_and_zero(*numerics.range_of(w_Og), scheme))
    assert bool((error(scale, zero) <= full * (1 + 1e-6)).all())
    assert bool(((factor >= 0.5) & (factor <= (8 / 7 + 1e-6 if symmetric else 1))).all())
