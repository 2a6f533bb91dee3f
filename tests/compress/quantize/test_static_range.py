"""Calibrated ranges against the largest value, and against the outputs that they are for."""

import pytest
import torch
from torch import Tensor

from compress import activations
from compress.plan import ActivationScheme
from compress.quantize.static_range import fit_static, quantizer

SCHEMES = [ActivationScheme(dynamic=False), ActivationScheme(dynamic=False, symmetric=False)]


def problem(loud: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, one of whose values is `loud` times too large and hardly matters to the weights behind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(800, 64, generator=generator).abs()  # one-sided, as after an activation function
    x[17, 3] *= loud
    w_OI = torch.randn(32, 64, generator=generator)
    w_OI[:, 3] *= 1e-3
    return x, w_OI


def error(x: Tensor, w_OI: Tensor, scheme: ActivationScheme, static: object) -> float:
    seen = activations.fake_quantize(x, scheme, static)  # type: ignore[arg-type]
    return float(((seen - x) @ w_OI.t()).square().mean())


@pytest.mark.parametrize("scheme", SCHEMES, ids=ActivationScheme.label)
def test_a_lonely_value_that_hardly_matters_is_clipped(scheme: ActivationScheme) -> None:
    x, w_OI = problem(loud=100)
    found = fit_static(x, w_OI, scheme, torch.float16)
    full = quantizer(0.0, float(x.max()), scheme, torch.float16, x.device)
    assert error(x, w_OI, scheme, found) < 0.01 * error(x, w_OI, scheme, full)
    assert found.scale.dtype == torch.float16


@pytest.mark.parametrize("scheme", SCHEMES, ids=ActivationScheme.label)
def test_a_value_that_matters_is_not_clipped(scheme: ActivationScheme) -> None:
    x, w_OI = problem(loud=100)
    w_OI[:, 3] *= 1e4
    found = fit_static(x, w_OI, scheme, torch.float16)
    assert float(activations.fake_quantize(x, scheme, found)[17, 3]) > 0.99 * float(x[17, 3])


def test_one_sided_inputs_use_all_codes_when_asymmetric() -> None:
    x, w_OI = problem(loud=1)
    errors = [error(x, w_OI, scheme, fit_static(x, w_OI, scheme, torch.float16)) for scheme in SCHEMES]
    assert errors[1] < 0.5 * errors[0]
    assert int(fit_static(x, w_OI, SCHEMES[1], torch.float16).zero_point) == 0


def test_inputs_that_are_all_zero_get_a_scale_that_a_file_can_hold() -> None:
    for scheme in SCHEMES:
        found = fit_static(torch.zeros(10, 8), torch.ones(4, 8), scheme, torch.float16)
        found.check("layer")
        assert torch.equal(activations.fake_quantize(torch.zeros(3, 8), scheme, found), torch.zeros(3, 8))
