"""Fit the scales again once the codes are known.

With codes and zero points fixed, a row's output error is a quadratic function of its group scales s:

    (sum_g s_g c_g - w) H (sum_g s_g c_g - w)^T,    c_g = codes - zero points of group g, zero elsewhere

so the best scales solve a small linear system, one a row. Scales were chosen group by group before; this chooses them
together. A ridge towards the present scales keeps groups whose codes are nearly alike from drifting.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from compress import numerics
from compress.quantize.awq import row_errors
from compress.quantize.feedback import Rounded
from compress.scheme import Scheme

RIDGE = 0.3  # of the mean of the system's diagonal
LARGEST_CHANGE = 0.5
_ROWS = 256
# On a GPU as many as this many weights are in: a launch costs more than memory until then.
_GPU_WEIGHTS = 2**24
# Wider groups do not fit a tile of the kernel's; they are few, and torch passes over memory once for each.
_KERNEL_COLUMNS = 256


def refit_scales(
    rounded: Rounded, w_OI: Tensor, hessian_II: Tensor, scheme: Scheme, off_diagonal: float = 1.0
) -> Tensor:
    """New scales, float32 `[O, G]` holding float16 values; rows whose error would not fall keep theirs.

    w_OI: float32 `[O, I]`, the weight that the codes stand for. hessian_II: float32 `[I, I]`, H; its off-diagonal part
    is taken `off_diagonal` times.
    """
    step = max(_ROWS, _GPU_WEIGHTS // w_OI.shape[1]) if w_OI.is_cuda else _ROWS
    parts = [
        _refit(
            numerics.to_groups(rounded.codes_OI[rows], scheme).float() - rounded.zero_point_OG[rows].unsqueeze(-1),
            rounded.scale_OG[rows],
            w_OI[rows],
            hessian_II,
            off_diagonal,
        )
        for rows in (slice(i, i + step) for i in range(0, len(w_OI), step))
    ]
    return torch.cat(parts)


def _refit(steps_OGg: Tensor, old_OG: Tensor, w_OI: Tensor, hessian_II: Tensor, off_diagonal: float) -> Tensor:
    num_rows, num_groups, size = steps_OGg.shape
    diagonal_I = hessian_II.diagonal() * (1 - off_diagonal)  # H is off_diagonal * hessian_II and this
    with numerics.tensor_float32():  # steps are small integers, so exact; the ridge is far above the rounding of H
        target_OI = (w_OI @ hessian_II).mul_(off_diagonal).addcmul_(w_OI, diagonal_I)
        kernel = w_OI.is_cuda and size <= _KERNEL_COLUMNS
        system_OGG = kernels().system(steps_OGg, hessian_II) if kernel else system(steps_OGg, hessian_II)
    system_OGG *= off_diagonal
    diagonal_OG = system_OGG.diagonal(dim1=1, dim2=2)
    diagonal_OG += steps_OGg.square().mul_(diagonal_I.reshape(num_groups, size)).sum(dim=-1)
    right_OG = target_OI.reshape(steps_OGg.shape).mul_(steps_OGg).sum(dim=-1)
    del target_OI
    # The ridge makes the system positive definite well beyond float32's rounding; a row of all-zero codes or inputs,
    # whose factor may fail, gives no usable scale and keeps its own.
    ridge_O1 = RIDGE * diagonal_OG.mean(dim=1, keepdim=True) + 1e-30
    right_OG += ridge_O1 * old_OG
    diagonal_OG += ridge_O1
    factor_OGG, _ = torch.linalg.cholesky_ex(system_OGG)
    new_OG = torch.cholesky_solve(right_OG.unsqueeze(-1), factor_OGG).squeeze(-1)
    usable = ((new_OG / old_OG - 1).abs() < LARGEST_CHANGE) & torch.isfinite(new_OG)
    new_OG = numerics.round_scale(torch.where(usable, new_OG, old_OG))

    def errors(scale_OG: Tensor) -> Tensor:
        delta_OI = (steps_OGg * scale_OG.unsqueeze(-1)).reshape(w_OI.shape).sub_(w_OI)
        return row_errors(delta_OI, hessian_II).mul_(off_diagonal).add_(delta_OI.square_() @ diagonal_I)

    better = errors(new_OG) < errors(old_OG)
    return torch.where(better.unsqueeze(1), new_OG, old_OG)


def warm(scheme: Scheme, device: torch.device) -> None:
    """On a GPU, compile the kernel for these codes and start what solves; sets nothing that other threads read."""
    size = scheme.group_size
    if device.type == "cuda" and 0 < size <= _KERNEL_COLUMNS:
        system_OGG = kernels().system(torch.ones(64, 2, size, device=device), torch.eye(2 * size, device=device))
        factor_OGG, _ = torch.linalg.cholesky_ex(system_OGG)
        torch.cholesky_solve(torch.ones(64, 2, 1, device=device), factor_OGG)


def system(steps_OGg: Tensor, hessian_II: Tensor) -> Tensor:
    """`c_g H c_h^T` of each row, float32 `[O, G, G]`; what is solved reads it for g >= h alone."""
    num_rows, num_groups, size = steps_OGg.shape
    system_OGG = torch.empty(num_rows, num_groups, num_groups, device=hessian_II.device)
    for g in range(num_groups):
        reach_OGg = (steps_OGg[:, g] @ hessian_II[g * size : (g + 1) * size]).reshape(steps_OGg.shape)
        system_OGG[:, g] = reach_OGg.mul_(steps_OGg).sum(dim=-1)
    return system_OGG


@functools.cache
def kernels() -> Any:
    """`refit_triton`, compiled at first launch. A GPU has Triton: the codes came by way of it (`feedback_step`)."""
    from compress.quantize import refit_triton

    return refit_triton
