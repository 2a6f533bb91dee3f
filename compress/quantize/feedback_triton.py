"""Triton kernels of `feedback` and `feedback_triton`; imported only when a CUDA tensor arrives.

Each keeps a tile of whole rows of one group in registers, reads every weight once and writes every result once.

Shapes: O rows, g columns of the group, C candidates for a row's range
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress import numerics
from compress.scheme import Scheme

# Weights that one program holds in its registers, and its warps; the best of those tried on an H100.
_TILE, WARPS = 4096, 4
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of(w_ptr, num_rows, w_stride, COLUMNS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's row numbers, the columns, which of them are there, and the weights.

    COLUMNS: g; SIZE: g rounded up to a power of two, which Triton's tiles must be. What is beyond them is zero, which
    leaves a group's range and its error alone.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = row < num_rows
    used = inside[:, None] & (column < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * w_stride + column[None, :]
    w = tl.load(w_ptr + at, mask=used, other=0.0)
    return row, column, inside, used, w


@triton.jit
def rounded(x):  # type: ignore[no-untyped-def]
    return (x + _ROUNDER) - _ROUNDER


@triton.jit  # type: ignore[untyped-decorator]
def _feedback(  # type: ignore[no-untyped-def]
    w_ptr,
    upper_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    error_ptr,
    num_rows,
    w_stride,
    upper_stride,
    max_code,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of rows."""
    row, column, inside, used, w = _tile_of(w_ptr, num_rows, w_stride, COLUMNS, SIZE, ROWS)
    scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + row, mask=inside, other=0.0)
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
        step = rounded(step)
        e = tl.div_rn(w_j - step * scale, u_jj)
        # Column j itself becomes its error, the columns after it take their share.
        w = tl.where(here[None, :], e[:, None], w - e[:, None] * u[None, :])
        steps = tl.where(here[None, :], step[:, None], steps)
    to = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(error_ptr + to, w, mask=used)
    tl.store(codes_ptr + to, (steps + zero[:, None]).to(tl.uint8), mask=used)


def round_group(
    w_Og: Tensor, upper_gg: Tensor, scale_O: Tensor, zero_O: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """`feedback_triton.round_group` on CUDA tensors."""
    codes_Og = torch.empty(w_Og.shape, dtype=torch.uint8, device=w_Og.device)
    error_Og = torch.empty(w_Og.shape, dtype=torch.float32, device=w_Og.device)
    w_Og, upper_gg = _rows_together(w_Og), _rows_together(upper_gg)
    with torch.cuda.device(w_Og.device):
        grid, sizes = tiles(w_Og)
        _feedback[grid](
            w_Og,
            upper_gg,
            scale_O.contiguous(),
            zero_O.contiguous(),
            codes_Og,
            error_Og,
            len(w_Og),
            w_Og.stride(0),
            upper_gg.stride(0),
            float(max_code),
            **sizes,
            num_warps=WARPS,
            # A fused multiply-add would round once where the CPU rounds twice.
            enable_fp_fusion=False,
        )
    return codes_Og, error_Og


@triton.jit  # type: ignore[untyped-decorator]
def _range(  # type: ignore[no-untyped-def]
    w_ptr,
    importance_ptr,
    factors_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    num_rows,
    w_stride,
    max_code,
    middle,
    smallest,
    largest,
    NUM_FACTORS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of rows, every candidate. middle: the zero point of symmetric codes."""
    row, column, inside, used, w = _tile_of(w_ptr, num_rows, w_stride, COLUMNS, SIZE, ROWS)
    importance = tl.load(importance_ptr + column, mask=column < COLUMNS, other=0.0)
    lo = tl.minimum(tl.min(w, axis=1), 0.0)
    hi = tl.maximum(tl.max(w, axis=1), 0.0)
    best_error = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    best_scale = tl.zeros((ROWS,), dtype=tl.float32)
    best_zero = tl.zeros((ROWS,), dtype=tl.float32)
    best_factor = tl.zeros((ROWS,), dtype=tl.float32)
    for i in range(NUM_FACTORS):
        factor = tl.load(factors_ptr + i)
        low = lo * factor
        high = hi * factor
        if SYMMETRIC:
            wide = tl.div_rn(tl.maximum(-low, high), tl.full((ROWS,), 1.0, dtype=tl.float32) * middle)
        else:
            wide = tl.div_rn(high - low, tl.full((ROWS,), 1.0, dtype=tl.float32) * max_code)
        scale = tl.minimum(tl.maximum(wide, smallest), largest).to(tl.float16).to(tl.float32)
        if SYMMETRIC:
            zero = tl.full((ROWS,), 1.0, dtype=tl.float32) * middle
        else:
            zero = rounded(tl.div_rn(-low, scale))
            zero = tl.minimum(tl.maximum(zero, 0.0), max_code)
        steps = tl.minimum(tl.maximum(tl.div_rn(w, scale[:, None]), -zero[:, None]), (max_code - zero)[:, None])
        steps = rounded(steps)
        delta = steps * scale[:, None] - w
        error = tl.sum(delta * delta * importance[None, :], axis=1)
        better = error < best_error
        best_error = tl.where(better, error, best_error)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        best_factor = tl.where(better, factor, best_factor)
    tl.store(scale_ptr + row, best_scale, mask=inside)
    tl.store(zero_ptr + row, best_zero, mask=inside)
    tl.store(factor_ptr + row, best_factor, mask=inside)


def fit_range(w_Og: Tensor, importance_g: Tensor, factors_C: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """`feedback.fit_range` on CUDA tensors, for these candidates (float32)."""
    scale_O, zero_O, factor_O = torch.empty(3, len(w_Og), device=w_Og.device).unbind()
    w_Og = _rows_together(w_Og)
    with torch.cuda.device(w_Og.device):
        grid, sizes = tiles(w_Og)
        _range[grid](
            w_Og,
            importance_g.contiguous(),
            factors_C,
            scale_O,
            zero_O,
            factor_O,
            len(w_Og),
            w_Og.stride(0),
            float(scheme.max_code),
            float(scheme.symmetric_zero_point),
            numerics.MIN_SCALE,
            numerics.MAX_SCALE,
            NUM_FACTORS=len(factors_C),
            SYMMETRIC=scheme.symmetric,
            **sizes,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return scale_O, zero_O, factor_O


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def tiles(w_Og: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs, and the sizes that each is compiled for."""
    num_rows, size = w_Og.shape
    padded = triton.next_power_of_2(size)
    rows = max(1, _TILE // padded)
    return (triton.cdiv(num_rows, rows),), {"COLUMNS": size, "SIZE": padded, "ROWS": rows}
