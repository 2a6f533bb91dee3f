"""Triton kernels of `feedback_triton`; imported only when a CUDA tensor arrives.

Shapes: O rows, g columns of the group, C candidates
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights that one program holds in its registers, and its warps; the best of those tried on an H100 for each kernel.
_ROUND_TILE, _ROUND_WARPS = 4096, 4
_SCORE_TILE, _SCORE_WARPS = 4096, 1
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def _feedback(  # type: ignore[no-untyped-def]
    w_ptr,
    upper_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    error_ptr,
    loss_ptr,
    num_rows,
    w_stride,
    upper_stride,
    max_code,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SCORE: tl.constexpr,
):
    """One tile of rows (axis 0) for one candidate (axis 1). COLUMNS: g; SIZE: g rounded up to a power of two, which
    Triton's tiles must be. SCORE: write the loss, not codes and errors.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    candidate = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = row < num_rows
    used = inside[:, None] & (column < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * w_stride + column[None, :]
    w = tl.load(w_ptr + at, mask=used, other=0.0)
    scale = tl.load(scale_ptr + candidate * num_rows + row, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + candidate * num_rows + row, mask=inside, other=0.0)
    lowest = -zero
    highest = max_code - zero
    steps = tl.zeros((ROWS, SIZE), dtype=tl.float32)
    for j in range(COLUMNS):
        here = column == j
        # Row j of U from its diagonal on; what is left of it stays 0, so that settled columns stay as they are.
        u = tl.load(upper_ptr + j * upper_stride + column, mask=(column >= j) & (column < COLUMNS), other=0.0)
        u_jj = tl.sum(tl.where(here, u, 0.0), axis=0)
        w_j = tl.sum(tl.where(here[None, :], w, 0.0), axis=1)
        step = tl.minimum(tl.maximum(tl.div_rn(w_j, scale), lowest), highest)
        step = (step + _ROUNDER) - _ROUNDER
        e = tl.div_rn(w_j - step * scale, u_jj)
        # Column j itself becomes its error, the columns after it take their share.
        w = tl.where(here[None, :], e[:, None], w - e[:, None] * u[None, :])
        if not SCORE:
            steps = tl.where(here[None, :], step[:, None], steps)
    if SCORE:
        tl.store(loss_ptr + candidate * num_rows + row, tl.sum(w * w, axis=1), mask=inside)
    else:
        to = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(error_ptr + to, w, mask=used)
        tl.store(codes_ptr + to, (steps + zero[:, None]).to(tl.uint8), mask=used)


def _launch(w_Og: Tensor, upper_gg: Tensor, scale: Tensor, zero: Tensor, max_code: int, **out: Tensor) -> None:
    num_rows, size = w_Og.shape
    padded = triton.next_power_of_2(size)
    if w_Og.stride(1) != 1:
        w_Og = w_Og.contiguous()
    if upper_gg.stride(1) != 1:
        upper_gg = upper_gg.contiguous()
    tile, warps = (_SCORE_TILE, _SCORE_WARPS) if "loss" in out else (_ROUND_TILE, _ROUND_WARPS)
    rows = max(1, tile // padded)
    unused = w_Og  # a pointer that the compiled variant does not touch
    _feedback[(triton.cdiv(num_rows, rows), scale.numel() // num_rows)](
        w_Og,
        upper_gg,
        scale.contiguous(),
        zero.contiguous(),
        out.get("codes", unused),
        out.get("error", unused),
        out.get("loss", unused),
        num_rows,
        w_Og.stride(0),
        upper_gg.stride(0),
        float(max_code),
        COLUMNS=size,
        SIZE=padded,
        ROWS=rows,
        SCORE="loss" in out,
        num_warps=warps,
        # A fused multiply-add would round once where the CPU rounds twice.
        enable_fp_fusion=False,
    )


def round_group(
    w_Og: Tensor, upper_gg: Tensor, scale_O: Tensor, zero_O: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """`feedback_triton.round_group` on CUDA tensors."""
    codes_Og = torch.empty(w_Og.shape, dtype=torch.uint8, device=w_Og.device)
    error_Og = torch.empty(w_Og.shape, dtype=torch.float32, device=w_Og.device)
    with torch.cuda.device(w_Og.device):
        _launch(w_Og, upper_gg, scale_O, zero_O, max_code, codes=codes_Og, error=error_Og)
    return codes_Og, error_Og


def score_group(w_Og: Tensor, upper_gg: Tensor, scale_CO: Tensor, zero_CO: Tensor, max_code: int) -> Tensor:
    """`feedback_triton.score_group` on CUDA tensors."""
    loss_CO = torch.empty(scale_CO.shape, dtype=torch.float32, device=w_Og.device)
    with torch.cuda.device(w_Og.device):
        _launch(w_Og, upper_gg, scale_CO, zero_CO, max_code, loss=loss_CO)
    return loss_CO
