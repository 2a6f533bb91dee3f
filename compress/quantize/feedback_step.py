"""The step of error feedback inside one group: round a column, pass its error on to the columns that are left.

Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1, for the columns that share a scale. Rows do not depend on each
other, columns do, one after the other. So the GPU kernel keeps a tile of whole rows in registers and walks over its
columns there: each weight is read once and each code written once. The CPU version walks over contiguous columns of
the transposed weight, and hands what is far to the right to a matrix product.

Both do the same float32 operations on the same numbers. `round_group(..., chunk=0)` on the CPU does them in the same
order as the kernel, which neither fuses a product with a sum nor approximates a division: codes and errors are equal
bit for bit. With `chunk` columns handled at once (the CPU's default) sums are taken in another order, and a weight that
lies within rounding noise of the middle between two codes may take the other one.

Shapes: O rows (out_features), g columns of the group
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from compress.errors import UnsupportedError

# Columns that a CPU tile settles one by one before it updates the rest by a matrix product.
CHUNK_COLUMNS = 32
# Rows whose columns stay in a core's cache together.
CHUNK_ROWS = 4096


def round_group(
    w_Og: Tensor, upper_gg: Tensor, scale_O: Tensor, zero_point_O: Tensor, max_code: int, *, chunk: int = CHUNK_COLUMNS
) -> tuple[Tensor, Tensor]:
    """Codes of a group with error feedback inside it, and the errors that the columns outside it must absorb.

    w_Og: float32 `[O, g]`, not changed. upper_gg: float32 `[g, g]`, the group's diagonal block of the upper factor U of
    the inverse Hessian, `H^-1 = U^T U`. scale_O, zero_point_O: float32 `[O]`, zero points integral. For each column j:

        q = clamp(round_half_even(w_j / scale) + zero_point, 0, max_code)
        e_j = (w_j - (q - zero_point) * scale) / U_jj;   w_k -= e_j * U_jk for k > j

    Returns codes_Og uint8 and error_Og float32; the caller subtracts `error_Og @ U[group, rest]` from the columns of
    the rest. chunk: see the module docstring; the GPU kernel always goes column by column.
    """
    _check(w_Og, upper_gg)
    if w_Og.is_cuda:
        found: tuple[Tensor, Tensor] = kernels().round_group(w_Og, upper_gg, scale_O, zero_point_O, max_code)
        return found
    upper_gg = upper_gg.contiguous()
    codes_Og = torch.empty(w_Og.shape, dtype=torch.uint8)
    error_Og = torch.empty_like(w_Og, memory_format=torch.contiguous_format)
    for start in range(0, w_Og.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        w_gO = w_Og[rows].t().clone(memory_format=torch.contiguous_format)
        codes_gO = torch.empty_like(w_gO)
        error_gO = _walk(w_gO, upper_gg, scale_O[rows], zero_point_O[rows], max_code, chunk, codes_gO)
        codes_Og[rows] = codes_gO.t()
        error_Og[rows] = error_gO.t()
    return codes_Og, error_Og


def _check(w_Og: Tensor, upper_gg: Tensor) -> None:
    assert w_Og.dtype == upper_gg.dtype == torch.float32
    assert upper_gg.shape == (w_Og.shape[1], w_Og.shape[1])


def _walk(
    w_gO: Tensor,
    upper_gg: Tensor,
    scale_O: Tensor,
    zero_point_O: Tensor,
    max_code: int,
    chunk: int,
    codes_gO: Tensor,
) -> Tensor:
    """Round column after column; `w_gO` (contiguous) is used up and becomes the errors `[g, O]`, which it returns."""
    size = w_gO.shape[0]
    chunk = chunk or size
    lowest_O, highest_O = -zero_point_O, max_code - zero_point_O
    diagonal = upper_gg.diagonal().tolist()
    for begin in range(0, size, chunk):
        end = min(begin + chunk, size)
        for j in range(begin, end):
            w_O = w_gO[j]
            # Bounds are integers, so clamping before rounding or after it is the same.
            steps_O = torch.div(w_O, scale_O).clamp_(lowest_O, highest_O).round_()
            torch.add(steps_O, zero_point_O, out=codes_gO[j])
            # In place: the column's weights are not needed any more, its errors are.
            w_O.sub_(steps_O.mul_(scale_O)).div_(diagonal[j])
            if j + 1 < end:
                w_gO[j + 1 : end].sub_(upper_gg[j, j + 1 : end].unsqueeze(1) * w_O)
        if end < size:
            w_gO[end:].addmm_(upper_gg[begin:end, end:].t(), w_gO[begin:end], alpha=-1)
    return w_gO


# ---- the GPU kernels ---------------------------------------------------------------------------------


@functools.cache
def kernels() -> Any:
    """`feedback_triton`, compiled at first launch. Triton is imported here, so that a CPU run does not need it."""
    try:
        from compress.quantize import feedback_triton
    except ImportError as e:
        raise UnsupportedError(
            f"error feedback on a GPU needs Triton, which cannot be imported ({e}); install triton or use --device cpu"
        ) from e
    return feedback_triton
