"""The Triton kernels of error feedback against torch: the walk in the same order bit for bit, the range search."""

import pytest
import torch
from torch import Tensor

from compress import numerics
from compress.quantize.feedback import fit_range
from compress.quantize.feedback_step import round_group
from compress.scheme import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the Triton kernel was not tested"),
]
MAX_CODE = 15


def problem(num_rows: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights inside a wider matrix (so rows are strided), a factor of a correlated inverse Hessian, scales, zeros."""
    generator = torch.Generator().manual_seed(seed)
    w_Og = (torch.randn(num_rows, 3 * size, generator=generator) * 0.05)[:, size : 2 * size]
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x = torch.randn(4 * size, size, generator=generator) @ mixing
    hessian = (x.t() @ x / len(x) + 0.01 * torch.eye(size)).double()
    upper_gg = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    lo, hi = w_Og.amin(1).clamp(max=0), w_Og.amax(1).clamp(min=0)
    scale_O = ((hi - lo) / MAX_CODE).clamp(min=1e-4)
    return w_Og, upper_gg, scale_O, (-lo / scale_O).round().clamp(0, MAX_CODE)


@pytest.mark.parametrize("size", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("num_rows", [1, 31, 33, 1000, 14336])
def test_kernel_equals_the_walk_on_the_cpu(num_rows: int, size: int) -> None:
    arguments = problem(num_rows, size, seed=num_rows + size)
    codes_Og, error_Og = round_group(*arguments, MAX_CODE, chunk=0)
    found_codes, found_error = round_group(*(a.cuda() for a in arguments), MAX_CODE)
    assert torch.equal(found_codes.cpu(), codes_Og)
    assert torch.equal(found_error.cpu(), error_Og)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 96, 128])
@pytest.mark.parametrize("num_rows", [1, 33, 14336])
def test_range_is_that_of_the_search_on_the_cpu(num_rows: int, size: int, symmetric: bool) -> None:
    """Errors are summed in another order, so where two candidates are equal within rounding the other may be taken."""
    scheme = Scheme(group_size=size, symmetric=symmetric)
    w_Og, *_ = problem(num_rows, size, seed=num_rows + size)
    importance = torch.rand(size, generator=torch.Generator().manual_seed(3))
    expected = fit_range(w_Og, importance, scheme)
    found = [x.cpu() for x in fit_range(w_Og.cuda(), importance.cuda(), scheme)]
    same = torch.stack([a == b for a, b in zip(found, expected, strict=True)]).all(dim=0)
    assert float(same.float().mean()) > 0.999 or num_rows < 1000 and int((~same).sum()) <= 1

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return (numerics.fake_quantize(w_Og, scale, zero, scheme) - w_Og).square() @ importance

    torch.testing.assert_close(error(found[0], found[1]), error(expected[0], expected[1]), rtol=1e-5, atol=0)


def test_strided_weights_stay_as_they_are() -> None:
    arguments = [a.cuda() for a in problem(100, 64, seed=1)]
    before = arguments[0].clone()
    round_group(*arguments, MAX_CODE)
    assert torch.equal(arguments[0], before)
