"""Fit the scales again once the codes are known.

With codes and zero points fixed, a row's output error is a quadratic function of its group scales s:

    (sum_g s_g c_g - w) H (sum_g s_g c_g - w)^T,    c_g = codes - zero points of group g, zero elsewhere

so the best scales solve a small linear system, one a row. Scales were chosen group by group before; this chooses them
together. A ridge towards the present scales keeps groups whose codes are nearly alike from drifting.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress import numerics
from compress.quantize.awq import row_errors
from compress.quantize.feedback import Rounded
from compress.scheme import Scheme

RIDGE = 0.3  # of the mean of the system's diagonal
LARGEST_CHANGE = 0.5
_ROWS = 256


def refit_scales(rounded: Rounded, w_OI: Tensor, hessian_II: Tensor, scheme: Scheme) -> Tensor:
    """New scales, float32 `[O, G]` holding float16 values; rows whose error would not fall keep theirs.

    w_OI: float32 `[O, I]`, the weight that the codes stand for. hessian_II: float32 `[I, I]`.
    """
    old_OG = rounded.scale_OG
    parts = [
        _refit(
            numerics.to_groups(rounded.codes_OI[rows], scheme).float() - rounded.zero_point_OG[rows].unsqueeze(-1),
            old_OG[rows],
            w_OI[rows],
            hessian_II,
        )
        for rows in (slice(i, i + _ROWS) for i in range(0, len(w_OI), _ROWS))
    ]
    return torch.cat(parts)


def _refit(steps_OGg: Tensor, old_OG: Tensor, w_OI: Tensor, hessian_II: Tensor) -> Tensor:
    num_rows, num_groups, size = steps_OGg.shape
    system_OGG = torch.empty(num_rows, num_groups, num_groups, dtype=torch.float64, device=w_OI.device)
    target_OI = w_OI @ hessian_II
    for g in range(num_groups):
        reach_OGg = (steps_OGg[:, g] @ hessian_II[g * size : (g + 1) * size]).reshape(steps_OGg.shape)
        system_OGG[:, g] = (reach_OGg * steps_OGg).sum(dim=-1)
    right_OG = (target_OI.reshape(steps_OGg.shape) * steps_OGg).sum(dim=-1).double()
    diagonal_OG = system_OGG.diagonal(dim1=1, dim2=2)
    ridge_O1 = RIDGE * diagonal_OG.mean(dim=1, keepdim=True) + 1e-30
    right_OG += ridge_O1 * old_OG
    diagonal_OG += ridge_O1
    new_OG = torch.linalg.solve(system_OGG, right_OG).float()
    usable = ((new_OG / old_OG - 1).abs() < LARGEST_CHANGE) & torch.isfinite(new_OG)
    new_OG = numerics.round_scale(torch.where(usable, new_OG, old_OG))

    def errors(scale_OG: Tensor) -> Tensor:
        return row_errors((steps_OGg * scale_OG.unsqueeze(-1)).reshape(w_OI.shape).sub_(w_OI), hessian_II)

    better = errors(new_OG) < errors(old_OG)
    return torch.where(better.unsqueeze(1), new_OG, old_OG)
