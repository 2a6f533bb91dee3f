"""Activation quantizers against slow, obvious ones, and products that must be exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.activations import EXACT_INPUTS, fake_quantize, integer_product, linear, quantize_inputs
from compress.numerics import quantize, scale_and_zero, to_groups
from compress.plan import ActivationScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme

ASYM = ActivationScheme(symmetric=False)
STATIC = ActivationScheme(dynamic=False)


def inputs(num_tokens: int = 6, size: int = 64, seed: int = 0) -> Tensor:
    x_TI = torch.randn(num_tokens, size, generator=torch.Generator().manual_seed(seed))
    return x_TI * torch.linspace(0.01, 40, num_tokens).unsqueeze(1)  # tokens of very different size


def weight(rows: int, columns: int, group_size: int, num_bits: int = 8) -> QuantizedWeight:
    scheme = Scheme(num_bits=num_bits, group_size=group_size, symmetric=True)
    w_OGg = to_groups(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), scheme)
    scale, zero = scale_and_zero(w_OGg.amin(-1), w_OGg.amax(-1), scheme)
    return QuantizedWeight.from_parts(quantize(w_OGg, scale, zero, scheme), scale, zero, scheme, torch.float32)


def test_per_token_is_what_one_token_alone_gives() -> None:
    x_TI = inputs()
    for scheme in (ActivationScheme(), ASYM):
        whole = fake_quantize(x_TI, scheme)
        alone = torch.cat([fake_quantize(row.unsqueeze(0), scheme) for row in x_TI])
        assert torch.equal(whole, alone)


@pytest.mark.parametrize("scheme", [ActivationScheme(), ASYM], ids=["symmetric", "asymmetric"])
def test_codes_against_one_number_at_a_time(scheme: ActivationScheme) -> None:
    x_TI = inputs()
    found = quantize_inputs(x_TI, scheme)
    for row, values in enumerate(x_TI.double().tolist()):
        span = max(map(abs, values)) / 127 if scheme.symmetric else (max(values) - min(values)) / 255
        zero = 0 if scheme.symmetric else round(-128 - min(values) / span)
        wanted = [min(127, max(-128, round(v / span) + zero)) for v in values]
        off = [abs(a - b) for a, b in zip(found.q_TI[row].tolist(), wanted, strict=True)]
        assert max(off) <= 1 and sum(off) <= 1  # float32 may fall on the other side of a tie
        assert float(found.scale_T[row]) == pytest.approx(span, rel=1e-6)


def test_error_is_at_most_half_a_step() -> None:
    x_TI = inputs()
    for scheme in (ActivationScheme(), ASYM):
        step_T = quantize_inputs(x_TI, scheme).scale_T
        # asymmetric: the zero point is rounded as well, so the ends may clip by another half
        slack = 0.501 if scheme.symmetric else 1.001
        assert bool(((fake_quantize(x_TI, scheme) - x_TI).abs().amax(1) <= slack * step_T).all())


def test_asymmetric_is_finer_on_one_sided_inputs() -> None:
    x_TI = inputs().abs()  # as after a ReLU: half of the symmetric codes are never used
    one, two = (float((fake_quantize(x_TI, s) - x_TI).square().sum()) for s in (ActivationScheme(), ASYM))
    assert two < 0.35 * one  # a quarter, but for the ends


@pytest.mark.parametrize("scheme", [ActivationScheme(), ASYM], ids=["symmetric", "asymmetric"])
def test_tokens_without_a_range_come_back(scheme: ActivationScheme) -> None:
    x_TI = torch.tensor([[0.0, 0.0], [-3.5, -3.5], [2.25, 2.25]])
    assert torch.allclose(fake_quantize(x_TI, scheme), x_TI, rtol=1e-6)


def test_static_clips_what_calibration_did_not_see() -> None:
    static = StaticInput(scale=torch.tensor([0.5]), zero_point=torch.tensor([128], dtype=torch.uint8))
    x_TI = torch.tensor([[-1000.0, -0.26, 0.24, 63.5, 1000.0]])
    assert fake_quantize(x_TI, STATIC, static).tolist() == [[-64.0, -0.5, 0.0, 63.5, 63.5]]
    moved = StaticInput(scale=torch.tensor([0.5]), zero_point=torch.tensor([0], dtype=torch.uint8))
    assert fake_quantize(x_TI, STATIC, moved).tolist() == [[0.0, 0.0, 0.0, 63.5, 127.5]]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1, 7, EXACT_INPUTS, EXACT_INPUTS + 1, 5000]), st.booleans())
def test_products_of_full_range_codes_are_exact(num_tokens: int, size: int, worst: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    q_TI, w_OI = (
        torch.full((n, size), -128, dtype=torch.int8)
        if worst
        else torch.randint(-128, 128, (n, size), generator=generator, dtype=torch.int8)
        for n in (num_tokens, 5)
    )
    assert torch.equal(integer_product(q_TI, w_OI).long(), q_TI.long() @ w_OI.long().t())


@pytest.mark.parametrize("group_size", [-1, 32], ids=["channel", "group"])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("scheme", [ActivationScheme(), ASYM], ids=["symmetric", "asymmetric"])
def test_linear_is_the_product_of_what_the_codes_mean(group_size: int, num_bits: int, scheme: ActivationScheme) -> None:
    q = weight(16, 64, group_size, num_bits)
    x = inputs().reshape(2, 3, 64)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(2))
    codes = quantize_inputs(x.reshape(6, 64), scheme)
    wanted = codes.dequantize().double() @ q.dequantize(torch.float64).t() + bias.double()
    found = linear(x, q, bias, codes)
    assert found.shape == (2, 3, 16) and found.dtype == x.dtype
    assert torch.allclose(found.reshape(6, 16).double(), wanted, rtol=1e-5, atol=1e-5)
