"""The forward divergence of whole rows of logits and its gradient, as one Triton kernel; imported only on a GPU.

In torch each operation of `at_once.whole_rows` reads and writes all logits. Here a program goes over its row twice:
once for both sums of exponentials, with running maxima (Milakov and Gimelshein, arXiv:1805.02867), and once for the
divergence and the gradient. A row is added up in one order, so the same comes out again.

Shapes: p tokens, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _WARPS = 4096, 8
# Below every logit, and a number: a difference of it and itself is one.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _lse(top, total):  # type: ignore[no-untyped-def]
    highest = tl.max(top, axis=0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit(do_not_specialize=["temperature", "scale", "cap"])  # type: ignore[untyped-decorator]
def _forward_kl(  # type: ignore[no-untyped-def]
    z_ptr,
    t_ptr,
    count_ptr,
    value_ptr,
    grad_ptr,
    z_stride,
    t_stride,
    temperature,
    scale,
    cap,
    VOCABULARY: tl.constexpr,
    IS_CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    z_row, t_row = z_ptr + row.to(tl.int64) * z_stride, t_ptr + row.to(tl.int64) * t_stride
    column = tl.arange(0, COLUMNS)
    z_top = tl.full([COLUMNS], _LOWEST, tl.float32)
    t_top = tl.full([COLUMNS], _LOWEST, tl.float32)
    z_sum = tl.zeros([COLUMNS], tl.float32)
    t_sum = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, VOCABULARY, COLUMNS):
        used = start + column < VOCABULARY
        z = tl.load(z_row + start + column, mask=used, other=float("-inf")) / temperature
        t = tl.load(t_row + start + column, mask=used, other=float("-inf")) / temperature
        higher = tl.maximum(z_top, z)
        z_sum = z_sum * tl.exp(z_top - higher) + tl.exp(z - higher)
        z_top = higher
        higher = tl.maximum(t_top, t)
        t_sum = t_sum * tl.exp(t_top - higher) + tl.exp(t - higher)
        t_top = higher
    z_lse, t_lse = _lse(z_top, z_sum), _lse(t_top, t_sum)
    times = tl.load(count_ptr + row) * temperature
    value = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, VOCABULARY, COLUMNS):
        used = start + column < VOCABULARY
        logit = tl.load(z_row + start + column, mask=used, other=0.0)
        log_q = logit / temperature - z_lse
        log_p = tl.load(t_row + start + column, mask=used, other=0.0) / temperature - t_lse
        p = tl.exp(log_p)
        value += tl.where(used, p * (log_p - log_q), 0.0)
        grad = (tl.exp(log_q) - p) * times * scale
        if IS_CAPPED:
            grad *= 1.0 - (logit / cap) * (logit / cap)
        tl.store(
            grad_ptr + row.to(tl.int64) * VOCABULARY + start + column, grad.to(grad_ptr.dtype.element_ty), mask=used
        )
    tl.store(value_ptr + row, tl.sum(value, axis=0))


def forward_kl(
    z_pV: Tensor, t_pV: Tensor, count_p: Tensor, temperature: float, scale: float, cap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`sum p log(p / q)` of each row in nats, float32 `[p]`, and the gradient of `sum T^2 count value` by `W h + b`.

    z_pV, t_pV: the student's and the teacher's logits, float32, their last dimension contiguous; z after `scale` and
    `cap` (see `Head`). count_p: float32, contiguous. The gradient is `[p, V]` in `dtype`. T is the temperature.
    """
    assert z_pV.dtype == t_pV.dtype == torch.float32 and z_pV.shape == t_pV.shape
    assert z_pV.stride(1) == t_pV.stride(1) == 1 and count_p.dtype == torch.float32 and count_p.is_contiguous()
    value_p = torch.empty(len(z_pV), dtype=torch.float32, device=z_pV.device)
    grad_pV = torch.empty(z_pV.shape, dtype=dtype, device=z_pV.device)
    with torch.cuda.device_of(z_pV):
        _forward_kl[(len(z_pV),)](
            z_pV, t_pV, count_p, value_p, grad_pV, z_pV.stride(0), t_pV.stride(0),
            temperature, scale, 1.0 if cap is None else cap, VOCABULARY=z_pV.shape[1], IS_CAPPED=cap is not None,
            COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return value_p, grad_pV
