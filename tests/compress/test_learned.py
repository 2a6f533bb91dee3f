import pytest
import torch

from compress import learned, numerics
from compress.scheme import Scheme


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_real_codes_and_the_files_give_one_weight_and_one_gradient_of_scales(stored: torch.dtype) -> None:
    scheme = Scheme(num_bits=4, group_size=8, symmetric=False)
    torch.manual_seed(0)
    codes_OI = torch.randint(0, 16, (6, 16), dtype=torch.uint8)
    scale_OG = (torch.rand(6, 2) / 50 + 0.01).to(stored).float()
    zero_OG = torch.randint(0, 16, (6, 2)).float()
    grad_OI = torch.randn(6, 16)
    found = []
    for codes in (codes_OI, (codes_OI.float() + torch.empty(6, 16).uniform_(-0.4, 0.4)).requires_grad_()):
        log_OG = torch.full((6, 2), 0.03, requires_grad=True)
        w_OI = learned.dequantized(codes, log_OG, scale_OG, zero_OG, scheme, stored)
        w_OI.backward(grad_OI)
        made = learned.as_stored(codes.detach(), log_OG.detach(), scale_OG, zero_OG, scheme, stored)
        assert made.scale_OG.dtype == stored and torch.equal(made.codes_OI, codes_OI)
        assert torch.equal(made.dequantize(), w_OI)  # what is trained is what is written
        found.append((w_OI.detach(), log_OG.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    held_OG1 = (scale_OG * torch.tensor(0.03).exp()).to(stored).float()[..., None]
    slow_OGg = (numerics.to_groups(codes_OI.float(), scheme) - zero_OG[..., None]) * held_OG1
    assert torch.equal(found[0][0], slow_OGg.flatten(1))
    assert torch.allclose(codes.grad, (grad_OI.view(6, 2, 8) * held_OG1).flatten(1))  # type: ignore[union-attr, arg-type]
    assert torch.allclose(found[0][1], (grad_OI.view(6, 2, 8) * slow_OGg).sum(-1))  # type: ignore[arg-type]
