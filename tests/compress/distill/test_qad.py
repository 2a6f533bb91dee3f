"""Trained codes: they start as the folder's, follow the straight-through gradient, are written as they were used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress import numerics
from compress.activations import fake_quantize
from compress.distill import models, qad
from compress.distill.qad import LearnedLinear
from compress.errors import ConfigError
from compress.plan import ActivationScheme
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme


def quantized(scheme: Scheme, shape: tuple[int, int] = (6, 32), dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    w_OGg = numerics.to_groups(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), scheme)
    scale, zero = numerics.scale_and_zero(*numerics.range_of(w_OGg), scheme)
    return QuantizedWeight.from_parts(numerics.quantize(w_OGg, scale, zero, scheme), scale, zero, scheme, dtype)


@pytest.mark.parametrize(
    "scheme",
    [Scheme(group_size=8), Scheme(group_size=16, symmetric=True), Scheme(num_bits=8, group_size=-1, symmetric=True)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_starts_and_ends_as_stored(scheme: Scheme, dtype: torch.dtype) -> None:
    """The first weight is the folder's to the bit; after updates, what is written is what was computed with."""
    weight = quantized(scheme, dtype=dtype)
    layer = LearnedLinear(weight, None, None, None)
    assert torch.equal(layer.weight(), weight.dequantize())
    with torch.no_grad():
        layer.latent_OI += torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 3
        layer.factor_OG += torch.randn(layer.factor_OG.shape, generator=torch.Generator().manual_seed(2)) * 0.2
    written = layer.quantized(layer.latent_OI.detach(), layer.factor_OG.detach())
    written.check("layer")
    assert written.scale_OG.dtype == dtype
    assert torch.equal(layer.weight(), written.dequantize())
    assert not torch.equal(written.codes_OI, weight.codes_OI)


def test_gradient_is_straight_through() -> None:
    """Against autograd through the formula with rounding replaced by `u + (round(u) - u).detach()`."""
    scheme = Scheme(group_size=8)
    weight = quantized(scheme)
    layer = LearnedLinear(weight, None, None, None)
    with torch.no_grad():
        layer.latent_OI += torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 4
        layer.factor_OG += 0.1
    target = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    (layer.weight() * target).sum().backward()

    def through(value: Tensor, rounded: Tensor) -> Tensor:
        return value + (rounded - value).detach()

    u = layer.latent_OI.detach().clone().requires_grad_()
    f = layer.factor_OG.detach().clone().requires_grad_()
    codes = through(u, u.round()).clamp(0, 15)
    codes = torch.where((u > -0.5) & (u < 15.5), through(u, u.round().clamp(0, 15)), codes)
    exact = weight.scale_OG.float() * f.exp()
    scale = exact * (exact.detach().half().float() / exact.detach())
    w = (numerics.to_groups(codes, scheme) - weight.zero_point_OG.float()[..., None]) * scale[..., None]
    (w.flatten(1) * target).sum().backward()
    torch.testing.assert_close(layer.latent_OI.grad, u.grad)
    torch.testing.assert_close(layer.factor_OG.grad, f.grad)


def test_compiled_weights_are_the_same() -> None:
    """What a block is compiled into holds the layer whole: its codes, scales as the file holds them, its gradient."""
    layer = LearnedLinear(quantized(Scheme(group_size=8)), None, None, None)
    with torch.no_grad():
        layer.latent_OI += torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 3
        layer.factor_OG += 0.1
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    found = []
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)):
        layer.zero_grad()
        out = forward(x)
        out.square().sum().backward()
        found.append((out.detach(), layer.latent_OI.grad, layer.factor_OG.grad))
    for plain, compiled in zip(*found, strict=True):
        assert plain is not None and compiled is not None and torch.equal(plain, compiled)


def test_quantized_inputs_pass_straight_through() -> None:
    scheme = ActivationScheme()
    layer = LearnedLinear(quantized(Scheme(num_bits=8, group_size=-1, symmetric=True)), None, scheme, None)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, fake_quantize(x.detach(), scheme) @ layer.weight().detach().t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight().detach().sum(0).expand(3, 32))


def test_plain_folder_is_refused(build_model: Any) -> None:
    with pytest.raises(ConfigError, match="holds no quantized layer to train"):
        qad.learn_codes(models.load(build_model(), dtype=torch.float32))
