"""The Triton kernel of refitted scales against float64, and what is made of it against torch's own products."""

import pytest
import torch
from torch import Tensor

from compress import numerics
from compress.quantize import refit
from compress.quantize.feedback import prepare, round_with_feedback
from compress.scheme import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the Triton kernel was not tested"),
]


def gram(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x = torch.randn(2 * size, size, generator=generator) @ mixing
    return x.t() @ x / len(x)


@pytest.mark.parametrize("columns", [8, 16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (33, 2), (64, 5), (1000, 9)])
def test_the_system_is_that_of_float64_but_for_tf32(num_rows: int, num_groups: int, columns: int) -> None:
    hessian_II = gram(num_groups * columns, seed=columns)
    generator = torch.Generator().manual_seed(num_rows)
    steps = torch.randint(-15, 16, (num_rows, num_groups, columns), generator=generator).float()
    found = refit.kernels().system(steps.cuda(), hessian_II.cuda()).cpu().double()
    wide = steps.double()
    cells = hessian_II.double().reshape(num_groups, columns, num_groups, columns)
    exact = torch.einsum("ogi,gihj,ohj->ogh", wide, cells, wide).tril()
    # Ten bits of a factor's mantissa, and the size of what is added up.
    size = torch.einsum("ogi,gihj,ohj->ogh", wide.abs(), cells.abs(), wide.abs())
    assert bool(((found - exact).abs() <= 2**-10 * size).all())
    assert float((found - exact).norm() / exact.norm()) < 1e-3
    assert torch.equal(refit.kernels().system(steps.cuda(), hessian_II.cuda()).cpu().double(), found)


def test_refitted_scales_are_nearly_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(group_size=128)
    hessian_II = gram(1024, seed=1).cuda()
    w_OI = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)).cuda()
    rounded = round_with_feedback(w_OI, prepare(hessian_II, scheme), scheme)
    found = refit.refit_scales(rounded, w_OI, hessian_II, scheme)
    monkeypatch.setattr(refit, "_KERNEL_COLUMNS", 0)
    plain = refit.refit_scales(rounded, w_OI, hessian_II, scheme)
    assert not torch.equal(found, rounded.scale_OG)
    # A scale is rounded to float16, so one that lies between two of these may become the other.
    assert float(((found - plain).abs() <= 2**-9 * plain).float().mean()) > 0.99
    assert torch.equal(numerics.round_scale(found), found)
