"""A Triton kernel of `refit`; imported only when a CUDA tensor arrives.

In torch the products of a row's steps with the Gram matrix go to memory, all columns of every row once for each group,
and are read three times. Here a tile of them is multiplied, weighted and summed in registers: what is written is the
system alone.

Shapes: O rows, I columns, G groups, g columns of a group
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that one program takes, columns of the Gram matrix that it multiplies at once, and its warps.
_ROWS, _DEPTH, _WARPS = 64, 32, 4
# What Triton multiplies has at least so many columns; what is beyond a smaller group's is zero.
_LEAST = 16


# Not compiled again for other numbers of rows and groups.
@triton.jit(do_not_specialize=["num_rows", "num_groups"])  # type: ignore[untyped-decorator]
def _system(  # type: ignore[no-untyped-def]
    steps_ptr,
    gram_ptr,
    system_ptr,
    num_rows,
    num_columns,
    num_groups,
    gram_stride,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of rows of one pair of groups. COLUMNS: g; SIZE: g rounded up to a power of two."""
    second = tl.program_id(1)
    first = tl.program_id(2)
    if second <= first:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < num_rows
        column = tl.arange(0, SIZE)
        there = column < COLUMNS
        of_row = row.to(tl.int64) * num_columns
        reach = tl.zeros((ROWS, SIZE), dtype=tl.float32)
        for begin in range(0, SIZE, DEPTH):
            depth = begin + tl.arange(0, DEPTH)
            used = depth < COLUMNS
            steps = tl.load(
                steps_ptr + of_row[:, None] + (first * COLUMNS + depth)[None, :],
                mask=inside[:, None] & used[None, :],
                other=0.0,
            )
            gram = tl.load(
                gram_ptr
                + (first * COLUMNS + depth).to(tl.int64)[:, None] * gram_stride
                + (second * COLUMNS + column)[None, :],
                mask=used[:, None] & there[None, :],
                other=0.0,
            )
            # To the nearest TF32: the matrix unit cuts the last 13 bits off, which would make every sum smaller.
            gram = ((gram.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
            reach = tl.dot(steps, gram, reach, input_precision="tf32")
        other = tl.load(
            steps_ptr + of_row[:, None] + (second * COLUMNS + column)[None, :],
            mask=inside[:, None] & there[None, :],
            other=0.0,
        )
        to = row.to(tl.int64) * num_groups * num_groups + first * num_groups + second
        tl.store(system_ptr + to, tl.sum(reach * other, axis=1), mask=inside)


def system(steps_OGg: Tensor, gram_II: Tensor) -> Tensor:
    """`c_g G c_h^T` of each row for g >= h, what is above the diagonal zero: float32 `[O, G, G]`.

    steps_OGg: float32, small integers. gram_II: float32, rounded to TF32 in the product.
    """
    num_rows, num_groups, columns = steps_OGg.shape
    assert steps_OGg.is_contiguous() and gram_II.stride(1) == 1
    system_OGG = torch.zeros(num_rows, num_groups, num_groups, device=gram_II.device)
    size = max(_LEAST, triton.next_power_of_2(columns))
    sizes: dict[str, Any] = {"COLUMNS": columns, "SIZE": size, "ROWS": _ROWS, "DEPTH": min(_DEPTH, size)}
    grid = (triton.cdiv(num_rows, _ROWS), num_groups, num_groups)
    with torch.cuda.device_of(gram_II):
        _system[grid](
            steps_OGg,
            gram_II,
            system_OGG,
            num_rows,
            num_groups * columns,
            num_groups,
            gram_II.stride(0),
            **sizes,
            num_warps=_WARPS,
        )
    return system_OGG
