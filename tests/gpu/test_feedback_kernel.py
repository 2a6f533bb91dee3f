"""The Triton kernel of error feedback against the torch walk in the same order: equal, bit for bit."""

import pytest
import torch
from torch import Tensor

from compress.quantize.feedback_triton import round_group, score_group

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


@pytest.mark.parametrize("size", [32, 128])
def test_scores_equal_the_walk_on_the_cpu(size: int) -> None:
    w_Og, upper_gg, scale_O, zero_O = problem(777, size, seed=size)
    scale_CO = scale_O * torch.linspace(1, 0.5, 11)[:, None]
    zero_CO = zero_O.repeat(11, 1)
    arguments = w_Og, upper_gg, scale_CO, zero_CO
    loss_CO = score_group(*arguments, MAX_CODE, chunk=0)
    found = score_group(*(a.cuda() for a in arguments), MAX_CODE).cpu()
    torch.testing.assert_close(found, loss_CO, rtol=1e-5, atol=0)  # the same terms, summed in another order


def test_strided_weights_stay_as_they_are() -> None:
    arguments = [a.cuda() for a in problem(100, 64, seed=1)]
    before = arguments[0].clone()
    round_group(*arguments, MAX_CODE)
    assert torch.equal(arguments[0], before)
