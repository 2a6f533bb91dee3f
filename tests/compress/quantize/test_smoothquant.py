"""The search of a smoothing scale against what it stands for: the error of the quantized layer's outputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress import activations
from compress.plan import ActivationScheme
from compress.quantize import int8, smoothquant
from compress.quantize.smoothquant import SampledInputs, search_smoothing
from compress.scheme import Scheme

CHANNEL = Scheme(num_bits=8, group_size=-1, symmetric=True)
SCHEMES = [
    ActivationScheme(),
    ActivationScheme(symmetric=False),
    ActivationScheme(dynamic=False),
    ActivationScheme(symmetric=False, dynamic=False),
]


def rounding(w_OI: Tensor) -> Tensor:
    return int8.round_to_nearest(w_OI, CHANNEL, torch.float32)


def problem(seed: int = 0, tokens: int = 600, size: int = 96) -> tuple[Tensor, SampledInputs]:
    """A weight, and inputs with a few loud channels and one token louder still, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator)
    x[:, ::13] *= 20
    x[5, 7] *= 500
    w_OI = torch.randn(48, size, generator=generator) * 0.1
    return w_OI, sampled(x)


def sampled(x: Tensor) -> SampledInputs:
    power_I = x.square().mean(0)
    return SampledInputs(gram_II=x.t() @ x / len(x), power_I=power_I, amax_I=x.abs().amax(0), rows_SI=x, measured_MI=x)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ActivationScheme.label)
def test_smoothing_lowers_the_error_of_the_quantized_layer(scheme: ActivationScheme) -> None:
    w_OI, inputs = problem()
    found = search_smoothing([w_OI[:20], w_OI[20:]], inputs, scheme, rounding)
    plain = search_smoothing([w_OI], inputs, scheme, rounding, descend=False)

    def true_error(s_I: Tensor) -> float:
        seen = smoothquant.fake_quantized(inputs.rows_SI / s_I, scheme) @ rounding(w_OI * s_I).t()
        return float((seen - inputs.rows_SI @ w_OI.t()).square().sum(1).mean())

    errors = [true_error(s) for s in (found.s_I, plain.s_I, torch.ones(96))]
    assert errors[0] < errors[1] < errors[2]
    assert abs(found.error - errors[0]) < 0.1 * errors[0]  # the two parts of it are nearly independent
    assert found.identity_error == plain.identity_error


@pytest.mark.parametrize("scheme", [*SCHEMES, None], ids=lambda s: s.label() if s else "floats")
def test_without_a_gram_matrix_the_error_is_that_of_the_quantized_layer_on_the_measured_tokens(
    scheme: ActivationScheme | None,
) -> None:
    w_OI, inputs = problem()
    inputs = replace(inputs, gram_II=None, measured_MI=inputs.rows_SI[::2])
    found = search_smoothing([w_OI], inputs, scheme, rounding)
    rows_MI = inputs.measured_MI / found.s_I
    seen_MI = rows_MI if scheme is None else smoothquant.fake_quantized(rows_MI, scheme)
    change_MO = seen_MI @ rounding(w_OI * found.s_I).t() - inputs.measured_MI @ w_OI.t()
    assert found.error == pytest.approx(float(change_MO.square().sum(1).mean()), rel=1e-4)
    assert found.error < found.identity_error


def test_a_dynamic_quantizer_is_the_one_that_the_forward_uses() -> None:
    _, inputs = problem()
    for scheme in SCHEMES[:2]:
        expected = activations.fake_quantize(inputs.rows_SI, scheme)
        assert torch.equal(smoothquant.fake_quantized(inputs.rows_SI, scheme), expected)


def test_the_identity_stays_where_nothing_is_loud_and_rounding_of_inputs_is_all_there_is() -> None:
    """Every channel alike, every weight alike: no scale can gain anything."""
    x = torch.ones(64, 32) * torch.linspace(1, 2, 64).unsqueeze(1)
    inputs = sampled(x)
    found = search_smoothing([torch.ones(8, 32)], inputs, ActivationScheme(), rounding)
    assert found.strength == 0 and not found.descended and torch.equal(found.s_I, torch.ones(32))


def test_a_strength_that_was_asked_for_is_taken_as_smoothquant_has_it() -> None:
    w_OI, inputs = problem()
    found = search_smoothing([w_OI], inputs, ActivationScheme(), rounding, strengths=[0.8])
    expected = inputs.amax_I**0.8 / w_OI.abs().amax(0) ** 0.2
    torch.testing.assert_close(found.s_I / found.s_I[0], expected / expected[0])
    assert found.strength == 0.8 and not found.descended


def test_channels_that_share_a_row_upstream_get_one_scale() -> None:
    w_OI, inputs = problem()
    shared = torch.arange(96) // 3
    found = search_smoothing([w_OI], inputs, ActivationScheme(), rounding, shared=shared)
    assert found.descended
    assert torch.equal(found.s_I.reshape(32, 3), found.s_I.reshape(32, 3)[:, :1].expand(32, 3))
