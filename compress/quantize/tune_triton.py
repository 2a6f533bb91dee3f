"""Triton kernels of `tune`; imported only when a CUDA tensor arrives.

An update of a block's offsets and scales is arithmetic on every weight, number by number: in torch each operation reads
and writes all of them. Here one kernel makes the weight and one takes its gradient, with the same float32 operations.

Shapes: N groups of all rows, g columns of a group
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights that one program takes, and its warps.
_TILE, _WARPS = 4096, 4
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["num_groups"])  # type: ignore[untyped-decorator]
def _weight(  # type: ignore[no-untyped-def]
    start_ptr,
    offset_ptr,
    scale_ptr,
    zero_ptr,
    weight_ptr,
    num_groups,
    max_code,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One tile of groups. SIZE: g rounded up to a power of two."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, SIZE)
    inside = group < num_groups
    used = inside[:, None] & (column < COLUMNS)[None, :]
    at = group.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + group, mask=inside, other=0.0)
    code = tl.load(start_ptr + at, mask=used, other=0.0) + tl.load(offset_ptr + at, mask=used, other=0.0)
    code = (code + _ROUNDER) - _ROUNDER
    code = tl.minimum(tl.maximum(code, 0.0), max_code)
    tl.store(weight_ptr + at, (code - zero[:, None]) * scale[:, None], mask=used)


@triton.jit(do_not_specialize=["num_groups", "rate"])  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    gradient_ptr,
    weight_ptr,
    offset_ptr,
    log_ptr,
    num_groups,
    rate,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One tile of groups; a sign of 0 moves nothing."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, SIZE)
    inside = group < num_groups
    used = inside[:, None] & (column < COLUMNS)[None, :]
    at = group.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    gradient = tl.load(gradient_ptr + at, mask=used, other=0.0)
    weight = tl.load(weight_ptr + at, mask=used, other=0.0)
    along = tl.sum(gradient * weight, axis=1)
    log = tl.load(log_ptr + group, mask=inside, other=0.0)
    log = tl.where(along > 0, log - rate, tl.where(along < 0, log + rate, log))
    tl.store(log_ptr + group, log, mask=inside)
    offset = tl.load(offset_ptr + at, mask=used, other=0.0)
    offset = tl.where(gradient > 0, offset - rate, tl.where(gradient < 0, offset + rate, offset))
    tl.store(offset_ptr + at, tl.minimum(tl.maximum(offset, -0.5), 0.5), mask=used)


def weight(start: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """`(clamp(round(start + offset)) - zero) * scale`, float32, of the shape of `start`.

    start, offset: float32 `[..., g]`, contiguous. scale, zero: float32, one a group, contiguous.
    """
    assert all(x.is_contiguous() for x in (start, offset, scale, zero))
    out = torch.empty_like(start)
    with torch.cuda.device_of(start):
        grid, sizes = _tiles(start)
        _weight[grid](start, offset, scale, zero, out, scale.numel(), float(max_code), **sizes, **_OPTIONS)
    return out


def step(gradient: Tensor, weight: Tensor, offset: Tensor, log: Tensor, rate: float) -> None:
    """Move `offset`, and `log` by what a group's gradient is along its weights, against the signs; in place.

    gradient, weight: float32, as many as `offset` `[..., g]` holds, contiguous; log: float32, one a group.
    """
    assert all(x.is_contiguous() for x in (gradient, weight, offset, log))
    with torch.cuda.device_of(offset):
        grid, sizes = _tiles(offset)
        _step[grid](gradient, weight, offset, log, log.numel(), rate, **sizes, **_OPTIONS)


# A fused multiply-add would round once where torch rounds twice.
_OPTIONS: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}


def _tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """How many programs, and the sizes that each is compiled for."""
    columns = x.shape[-1]
    size = triton.next_power_of_2(columns)
    groups = max(1, _TILE // size)
    return (triton.cdiv(x.numel() // columns, groups),), {"COLUMNS": columns, "SIZE": size, "GROUPS": groups}
