"""The Triton kernels of tuning against the same arithmetic in torch, update by update."""

import pytest
import torch

from compress.quantize import tune
from compress.quantize.feedback import Rounded
from compress.scheme import Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the Triton kernels were not tested"),
]


def rounded(num_rows: int, num_groups: int, scheme: Scheme) -> Rounded:
    generator = torch.Generator().manual_seed(num_rows)
    wide, narrow = (num_rows, num_groups * scheme.group_size), (num_rows, num_groups)
    scale = torch.rand(narrow, generator=generator) * 0.01 + 0.001
    zero = torch.randint(0, 16, narrow, generator=generator).float()
    codes = torch.randint(0, 16, wide, dtype=torch.uint8, generator=generator)
    near = codes + 0.7 * torch.randn(wide, generator=generator)
    of_column = [x.repeat_interleave(scheme.group_size, dim=1) for x in (scale, zero)]
    values = (codes, scale, zero, torch.ones(narrow), (near - of_column[1]) * of_column[0])
    names = ("codes_OI", "scale_OG", "zero_point_OG", "factor_OG", "wanted_OI")
    return Rounded(**{name: value.cuda() for name, value in zip(names, values, strict=True)})


@pytest.mark.parametrize("size", [16, 64, 96, 128])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (33, 5), (1000, 9)])
def test_weights_and_updates_are_those_of_torch(num_rows: int, num_groups: int, size: int) -> None:
    """Weights bit for bit; a group's gradient along its weights is summed in another order, so its sign may differ
    where it is nearly zero."""
    scheme = Scheme(group_size=size)
    old = rounded(num_rows, num_groups, scheme)
    ours, torchs = tune._Layer(old, scheme), tune._Layer(old, scheme)
    assert ours.kernel
    torchs.kernel = False
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        made = [layer.weight().requires_grad_() for layer in (ours, torchs)]
        assert torch.equal(*made)
        gradient = torch.randn(made[0].shape, generator=generator)
        gradient[torch.rand(gradient.shape, generator=generator) < 0.1] = 0
        for layer, weight in zip((ours, torchs), made, strict=True):
            weight.grad = gradient.cuda()
            layer.step(weight, 0.05 * (1 - step / 12))
        assert torch.equal(ours.offset_OGg, torchs.offset_OGg)
        assert float((ours.log_OG1 == torchs.log_OG1).float().mean()) > 0.999
        ours.log_OG1.copy_(torchs.log_OG1)
    codes = ours.rounded(old).codes_OI
    assert torch.equal(codes, torchs.rounded(old).codes_OI)
    assert num_rows < 1000 or 0 < float((codes != old.codes_OI).float().mean()) < 0.5
