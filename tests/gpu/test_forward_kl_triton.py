"""The Triton kernel of the forward divergence beside the same formula in torch, in float64."""

import pytest
import torch

from compress.losses import at_once
from compress.losses.at_once import Weights
from compress.losses.heads import DenseTeacher, Head
from compress.losses.in_blocks import Objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the Triton kernels were not tested"),
]


@pytest.mark.parametrize(("scale", "cap", "temperature"), [(1.0, None, 1.0), (0.5, 30.0, 2.0)])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 100), (5, 4096), (9, 49_152), (7, 262_145)])
def test_is_the_formula(tokens: int, vocabulary: int, scale: float, cap: float | None, temperature: float) -> None:
    from compress.losses.forward_kl_triton import forward_kl

    generator = torch.Generator().manual_seed(vocabulary)
    w, t = (torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64).cuda() * 5 for _ in range(2))
    count = torch.rand(tokens, generator=generator, dtype=torch.float64).cuda()
    w.requires_grad_()
    z = w * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    (value * temperature**2 * count).sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    asked = (z.detach().float(), t.float(), count.float(), temperature, scale, cap)
    found, grad = forward_kl(*asked, torch.float32)
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), w.grad, rtol=1e-3, atol=1e-6 * float(w.grad.abs().max()))
    assert all(torch.equal(*pair) for pair in zip((found, grad), forward_kl(*asked, torch.float32), strict=True))
    narrow = forward_kl(*asked, torch.bfloat16)[1]
    torch.testing.assert_close(narrow, grad.bfloat16(), rtol=2**-7, atol=1e-6 * float(grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_total_is_the_same_with_the_kernel_and_without(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(300, 64, generator=generator).cuda().to(dtype) for _ in range(2))
    weight = torch.randn(5000, 64, generator=generator).cuda().to(dtype) / 4
    head = Head(weight_VH=weight)
    weights = Weights(divergence_P=torch.rand(300, generator=generator).cuda() / 300, cross_entropy_P=None)
    found = []
    for has in (True, False):
        if not has:
            monkeypatch.setattr(at_once, "_has_kernel", lambda z_pV, job: False)
        leaf = hidden.clone().requires_grad_()
        total, divergence_P, entropy_P = at_once.total(
            leaf, head, DenseTeacher(hidden_PH=taught, head=head), torch.zeros(300, dtype=torch.int64, device="cuda"),
            Objective(), weights, budget=1 << 19,
        )  # fmt: skip
        total.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None and not bool(entropy_P.any())
        found.append((total.detach(), divergence_P, leaf.grad))
    for one, other in zip(*found, strict=True):
        close = 1e-5 if one.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one, other, rtol=close, atol=close * float(other.abs().max()))
