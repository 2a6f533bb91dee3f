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

from compress.quantize.feedback_triton import WARPS, rounded, tiles


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of(num_groups, COLUMNS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's group numbers, which of them are there, where their weights lie, and which of those are there.

    COLUMNS: g; SIZE: g rounded up to a power of two; ROWS: groups of a tile.
    """
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = group < num_groups
    used = inside[:, None] & (column < COLUMNS)[None, :]
    at = group.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    return group, inside, at, used


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
    ROWS: tl.constexpr,
):
    """One tile of groups."""
    group, inside, at, used = _tile_of(num_groups, COLUMNS, SIZE, ROWS)
    scale = tl.load(scale_ptr + group, mask=inside, other=1.0)
    zero = tl.load(zero_ptr + group, mask=inside, other=0.0)
    code = tl.load(start_ptr + at, mask=used, other=0.0) + tl.load(offset_ptr + at, mask=used, other=0.0)
    code = tl.minimum(tl.maximum(rounded(code), 0.0), max_code)
    tl.store(weight_ptr + at, (code - zero[:, None]) * scale[:, None], mask=used)


@triton.jit(do_not_specialize=["num_groups"])  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    gradient_ptr,
    weight_ptr,
    offset_ptr,
    log_ptr,
    num_groups,
    rate_ptr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of groups; a sign of 0 moves nothing."""
    group, inside, at, used = _tile_of(num_groups, COLUMNS, SIZE, ROWS)
    rate = tl.load(rate_ptr)
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
        grid, sizes = tiles(start.flatten(0, -2))
        _weight[grid](start, offset, scale, zero, out, scale.numel(), float(max_code), **sizes, **_OPTIONS)
    return out


def step(gradient: Tensor, weight: Tensor, offset: Tensor, log: Tensor, rate: Tensor) -> None:
    """Move `offset`, and `log` by what a group's gradient is along its weights, against the signs; in place.

    gradient, weight: float32, as many as `offset` `[..., g]` holds, contiguous; log: float32, one a group;
    rate: float32, one number.
    """
    assert all(x.is_contiguous() for x in (gradient, weight, offset, log))
    with torch.cuda.device_of(offset):
        grid, sizes = tiles(offset.flatten(0, -2))
        _step[grid](gradient, weight, offset, log, log.numel(), rate, **sizes, **_OPTIONS)


# A fused multiply-add would round once where torch rounds twice.
_OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
