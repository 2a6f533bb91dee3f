"""Rounding to eight bits against slow, obvious computations and against what it is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import numerics
from compress.plan import ActivationScheme
from compress.quantize import awq, int8
from compress.quantize.retarget import retarget
from compress.quantize.smoothquant import fake_quantized
from compress.scheme import Scheme

CHANNEL = Scheme(num_bits=8, group_size=-1, symmetric=True)


def problem(num_rows: int = 24, size: int = 200, tokens: int = 900, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and strongly correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + 0.3 * torch.eye(size)
    x = torch.randn(tokens, size, generator=generator) @ mixing
    x[:, ::13] *= 5
    return torch.randn(num_rows, size, generator=generator) * 0.1, x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-12, 1e4))
def test_plain_rounding_errs_by_half_a_stored_step(dtype: torch.dtype, seed: int, size: float) -> None:
    w_OGg = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(seed)) * size
    scale = int8.full_scale(w_OGg, dtype)
    assert torch.equal(scale, scale.to(dtype).float()) and bool((scale > 0).all())
    # Of a scale rounded down the outermost code stands for a little less than the largest weight.
    slack = 128 * float(torch.finfo(dtype).eps)
    assert bool(((int8.rounded(w_OGg, scale) - w_OGg).abs() <= (0.5 + slack) * scale.unsqueeze(-1)).all())


def test_codes_end_at_minus_128_and_127() -> None:
    w_OGg = torch.tensor([-1000.0, -128, -127.5, -127, 0.5, 1.5, 126.5, 127, 127.5, 1000]).reshape(1, 1, -1)
    expected = [-128, -128, -128, -127, 0, 2, 126, 127, 127, 127]
    assert int8.rounded(w_OGg, torch.ones(1, 1)).flatten().tolist() == expected


def test_a_fitted_scale_never_loses_to_the_full_range() -> None:
    w_OI, x = problem()
    w_OGg = numerics.to_groups(w_OI, Scheme(num_bits=8, group_size=40, symmetric=True))
    importance_I = x.square().mean(0)

    def error(scale_OG: Tensor) -> Tensor:
        return ((int8.rounded(w_OGg, scale_OG) - w_OGg).square() * importance_I.reshape(5, 40)).sum(-1)

    scale, factor = int8.fit_scale(w_OGg, importance_I, torch.float16)
    full = error(int8.full_scale(w_OGg, torch.float16))
    assert bool((error(scale) <= full).all()) and bool((error(scale) < full).any())
    assert float(factor.min()) < 1 and float(factor.max()) <= 1


def test_feedback_over_all_columns_is_the_long_way_round() -> None:
    """After each column, in float64, the best answer of all columns still open is solved for; no factor, no chunks."""
    w_OI, x = problem(num_rows=6, size=140)
    gram_II = x.t() @ x / len(x)
    inputs = int8.prepare(gram_II, CHANNEL)
    scale_O = int8.fit_scale(w_OI.unsqueeze(1), inputs.importance_I, torch.float16)[0][:, 0]
    damped = gram_II.double() + int8.DAMPING * float(gram_II.diagonal().mean()) * torch.eye(140).double()
    columns = gram_II.diagonal().argsort(descending=True).tolist()
    left, codes = w_OI.double().clone(), torch.zeros(w_OI.shape, dtype=torch.int64)
    for turn, column in enumerate(columns):
        q = (left[:, column] / scale_O).round().clamp(-128, 127)
        codes[:, column] = q.long() + 128
        rest = columns[turn + 1 :]
        if rest:
            answer = torch.linalg.solve(damped[rest][:, rest], damped[rest, column])
            left[:, rest] -= (q * scale_O - left[:, column])[:, None] * answer
    rounded = int8.round_with_feedback(w_OI, inputs, CHANNEL, torch.float16)
    assert torch.equal(rounded.scale_OG[:, 0], scale_O)
    found = rounded.codes_OI.long()
    assert int((found - codes).abs().max()) <= 1  # float32 may fall on the other side of a tie
    assert float((found != codes).float().mean()) < 0.01


@pytest.mark.parametrize("scheme", [CHANNEL, Scheme(num_bits=8, group_size=40, symmetric=True)], ids=Scheme.label)
def test_feedback_loses_less_than_rounding_to_nearest(scheme: Scheme) -> None:
    w_OI, x = problem()
    gram_II = x.t() @ x / len(x)
    found = int8.round_with_feedback(w_OI, int8.prepare(gram_II, scheme), scheme, torch.float16)
    nearest = int8.round_to_nearest(w_OI, scheme, torch.float16)
    with_feedback = awq.output_error(found.dequantize(scheme) - w_OI, gram_II)
    assert with_feedback < 0.5 * awq.output_error(nearest - w_OI, gram_II)
    assert bool((found.zero_point_OG == 128).all()) and found.codes_OI.dtype == torch.uint8
    assert torch.equal(found.scale_OG, found.scale_OG.half().float())


@pytest.mark.parametrize("activation", [ActivationScheme(), ActivationScheme(symmetric=False)])
def test_the_weight_for_rounded_inputs_takes_back_much_of_what_can_be(activation: ActivationScheme) -> None:
    """Least squares on what the layer really gets says how far a float weight can go."""
    w_OI, x = problem(tokens=3000)
    x[:, ::50] *= 20  # steps so coarse that rounding them is felt
    seen = fake_quantized(x, activation)
    noise = int8.InputNoise.of(x, seen)
    gram_II = x.t() @ x / len(x)
    inputs = int8.prepare(noise.with_noise(gram_II), CHANNEL)
    aimed = retarget(w_OI, -w_OI * noise.seen_I, inputs, 1.0)
    best = torch.linalg.lstsq(seen.double(), (x @ w_OI.t()).double()).solution.t().float()

    def error(w: Tensor) -> float:
        return float((seen @ w.t() - x @ w_OI.t()).square().mean())

    assert error(best) < error(w_OI)
    assert error(aimed) < error(w_OI) - 0.4 * (error(w_OI) - error(best))
