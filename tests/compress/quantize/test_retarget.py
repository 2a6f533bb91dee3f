"""The weight that answers for wrong inputs, against least squares on the inputs themselves."""

import pytest
import torch
from torch import Tensor

from compress.quantize.feedback import Prepared, prepare
from compress.quantize.retarget import retarget
from compress.scheme import Scheme


def inputs(tokens: int = 400, size: int = 12) -> tuple[Tensor, Tensor]:
    """What a layer now receives, and what the original model has there."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    mistake = original @ torch.randn(size, size, generator=generator, dtype=torch.float64) * 0.05
    return original + mistake + 0.02 * torch.randn(original.shape, generator=generator, dtype=torch.float64), original


def prepared(x: Tensor, damping: float) -> Prepared:
    """In float64, columns in another order, so that a mix-up of orders shows."""
    size = x.shape[1]
    columns_I = torch.randperm(size, generator=torch.Generator().manual_seed(5))
    hessian = x.t() @ x / len(x)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[columns_I][:, columns_I]), upper=True)
    return Prepared(order=[0], columns_I=columns_I, upper_II=upper, importance_I=hessian.diagonal())


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_is_least_squares_towards_the_point_between(strength: float) -> None:
    x, original = inputs()
    w_OI = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift_OI = w_OI @ (original - x).t() @ x / len(x)
    found = retarget(w_OI, shift_OI, prepared(x, 0.0), strength=strength)
    wanted = (1 - strength) * x @ w_OI.t() + strength * original @ w_OI.t()
    slow = torch.linalg.lstsq(x, wanted).solution.t()
    torch.testing.assert_close(found, slow, rtol=1e-8, atol=1e-10)


def test_brings_the_output_nearer_the_original_and_damping_holds_it_back() -> None:
    x, original = inputs()
    w_OI = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift_OI = w_OI @ (original - x).t() @ x / len(x)

    def distance(w: Tensor) -> float:
        return float((x @ w.t() - original @ w_OI.t()).square().mean())

    weights = [retarget(w_OI, shift_OI, prepared(x, damping), strength=1.0) for damping in (0.0, 0.05, 1e6)]
    assert distance(weights[0]) < distance(weights[1]) < 0.5 * distance(w_OI)
    torch.testing.assert_close(weights[2], w_OI, rtol=1e-4, atol=1e-6)


def test_trusts_the_difference_as_far_as_the_correlations() -> None:
    """Shrunk to its diagonal, H would answer for correlated channels many times over: 16 times for 16 copies."""
    x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 16)
    original, w_OI = 1.1 * x, torch.ones(1, 16)
    shift_OI = w_OI @ (original - x).t() @ x / len(x)
    gram_II = x.t() @ x / len(x)
    wrong = float((x @ w_OI.t() - original @ w_OI.t()).square().mean())
    for share in (1.0, 0.5, 0.1, 0.0):
        found = retarget(w_OI, shift_OI, prepare(gram_II, Scheme(group_size=16), share), strength=1.0)
        distance = float((x @ found.t() - original @ w_OI.t()).square().mean())
        assert distance < (1e-3 if share == 1 else 0.2 if share == 0.5 else 1 + 1e-6) * wrong
        assert share > 0 or torch.equal(found, w_OI)
