"""Weights as 8-bit integers: symmetric, one scale a row or a group, with error feedback that knows of rounded inputs.

Codes run from -128 to 127 and a scale is at most `amax / 127.5`, so that the largest weight is half a step off at
most: compressed-tensors' grid. A scale is rounded to the dtype in which the file holds it *before* codes are taken
with it.

With one scale a row, error feedback (`feedback`, GPTQ) may take the columns in any order without storing it: here by
falling mean square of the inputs. What reaches a W8A8 layer is not x but `x^ = x + n`, n being what quantizing the
inputs changed. The weight whose outputs come nearest to `W x'`, x' being the inputs of the original model, is

    W' = W + W (strength C - diag(m)) H^-1,   H = E[x x^T] + diag(v),   C = E[(x' - x) x^T]

where of each channel `m = E[n x^]` and `v = E[n n] + 2 E[n x]`. So W' is rounded, and H is what error feedback works
with: directions that hold less than the rounding noise of the inputs are not worth a large weight. m and v are measured
on sampled tokens; noise of two channels is taken for independent.

Shapes: S sampled tokens, O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress import numerics
from compress.quantize.feedback import Prepared, Rounded, group_order, inverse_factor, ordered
from compress.quantize.feedback_step import round_group
from compress.scheme import Scheme

LEVELS = 127.5
DAMPING = 0.001  # of the mean of diag(H); the noise of rounded inputs damps as well
# Ranges tried: from the full one to this share of it.
RANGE_STEPS = 10
RANGE_MIN = 0.75
# Columns that a step of error feedback settles before it passes their errors on to all others.
COLUMNS_AT_ONCE = 128


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as a file of `dtype` holds it, float32; never zero nor subnormal."""
    info = torch.finfo(dtype)
    return scale.clamp(max(info.tiny, 1e-30), info.max).to(dtype).float()


def full_scale(w_OGg: Tensor, dtype: torch.dtype) -> Tensor:
    """`amax / 127.5` of each group, float32 `[O, G]` holding values of `dtype`."""
    return stored_scale(w_OGg.abs().amax(dim=-1) / LEVELS, dtype)


def fit_scale(w_OGg: Tensor, importance_I: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale of each group that minimises `sum_i importance_i (w_i - rounded_i)^2`, and what share of the full range.

    importance_I: mean squared inputs. Both results float32 `[O, G]`.
    """
    importance_Gg = importance_I.reshape(w_OGg.shape[1], w_OGg.shape[2])
    amax_OG = w_OGg.abs().amax(dim=-1)
    best_error = torch.full_like(amax_OG, torch.inf)
    best_scale, best_factor = torch.empty_like(amax_OG), torch.ones_like(amax_OG)
    for i in range(RANGE_STEPS + 1):
        factor = 1 - (1 - RANGE_MIN) * i / RANGE_STEPS
        scale_OG = stored_scale(amax_OG * (factor / LEVELS), dtype)
        delta = rounded(w_OGg, scale_OG).sub_(w_OGg)
        error_OG = (delta.square_() * importance_Gg).sum(dim=-1)
        better = error_OG < best_error
        best_error = torch.where(better, error_OG, best_error)
        best_scale = torch.where(better, scale_OG, best_scale)
        best_factor = torch.where(better, torch.full_like(best_factor, factor), best_factor)
    return best_scale, best_factor


def rounded(w_OGg: Tensor, scale_OG: Tensor) -> Tensor:
    """Weights rounded to nearest and read back."""
    scale = scale_OG.unsqueeze(-1)
    return (w_OGg / scale).round_().clamp_(-128, 127).mul_(scale)


def round_to_nearest(w_OI: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """A whole weight rounded with its full ranges, read back; float32 `[O, I]`."""
    w_OGg = numerics.to_groups(w_OI, scheme)
    return rounded(w_OGg, full_scale(w_OGg, dtype)).reshape(w_OI.shape)


# ---- what rounding the inputs does ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InputNoise:
    """Of each channel, what quantizing the inputs adds to their mean square (v), and `E[n x^]` (m); float32 `[I]`."""

    added_I: Tensor
    seen_I: Tensor

    @classmethod
    def of(cls, rows_SI: Tensor, quantized_SI: Tensor) -> InputNoise:
        """Measured on sampled tokens, as they are and as they are quantized."""
        noise_SI = quantized_SI - rows_SI
        return cls(
            added_I=(quantized_SI.square() - rows_SI.square()).mean(dim=0),
            seen_I=(noise_SI * quantized_SI).mean(dim=0),
        )

    def with_noise(self, gram_II: Tensor) -> Tensor:
        """H of the module docstring: a copy of the Gram matrix, of the inputs as they are quantized."""
        out = gram_II.clone()
        diagonal_I = out.diagonal()
        # Where nearly all is lost the sample may say more was lost than there is.
        diagonal_I.copy_(torch.maximum(diagonal_I + self.added_I, 0.1 * diagonal_I))
        return out


# ---- error feedback ------------------------------------------------------------------------------------


def prepare(hessian_II: Tensor, scheme: Scheme, off_diagonal: float = 1.0, damping: float = DAMPING) -> Prepared:
    """The factor of H, its off-diagonal part taken `off_diagonal` times, and the order of columns.

    With one scale a row, columns go by falling diag(H); with groups, these do, and columns keep their order inside.
    hessian_II: float32 `[I, I]`, not changed.
    """
    importance_I = hessian_II.diagonal().clone()
    if scheme.group_size == -1:
        order, columns_I = [0], torch.sort(importance_I, descending=True, stable=True).indices
    else:
        order = group_order(hessian_II, scheme.group_size)
        places = torch.arange(len(hessian_II), device=hessian_II.device)
        columns_I = places.reshape(-1, scheme.group_size)[order].reshape(-1)
    return Prepared(
        order=order,
        columns_I=columns_I,
        # The matrix in between has no other name, so that it is gone as soon as it is factorised.
        upper_II=inverse_factor(ordered(hessian_II, columns_I, off_diagonal), damping),
        importance_I=importance_I,
        off_diagonal=off_diagonal,
    )


def round_with_feedback(w_OI: Tensor, inputs: Prepared, scheme: Scheme, dtype: torch.dtype) -> Rounded:
    """Codes around 128 of a weight, with error feedback over all its columns. w_OI: float32, not changed.

    The scale of a whole row is fitted beforehand, that of a group when its turn comes. Rows do not depend on each
    other, so linears that share an input may be stacked.
    """
    num_groups = scheme.groups(w_OI.shape[1])
    size = w_OI.shape[1] // num_groups
    left_OI = w_OI[:, inputs.columns_I]  # a copy, in processing order
    codes_OI = torch.empty(w_OI.shape, dtype=torch.uint8, device=w_OI.device)
    scale_OG = torch.empty(len(w_OI), num_groups, device=w_OI.device)
    factor_OG = torch.empty_like(scale_OG)
    for turn, group in enumerate(inputs.order):
        first, last = turn * size, (turn + 1) * size
        importance_g = inputs.importance_I[inputs.columns_I[first:last]]
        scale_O1, factor_O1 = fit_scale(left_OI[:, first:last].unsqueeze(1), importance_g, dtype)
        scale_OG[:, group], factor_OG[:, group] = scale_O1[:, 0], factor_O1[:, 0]
        for start in range(first, last, COLUMNS_AT_ONCE):
            _round_columns(left_OI, codes_OI, inputs, scale_O1[:, 0], start, min(start + COLUMNS_AT_ONCE, last))
    return Rounded(
        codes_OI=codes_OI,
        scale_OG=scale_OG,
        zero_point_OG=torch.full_like(scale_OG, 128.0),
        factor_OG=factor_OG,
        wanted_OI=None,
    )


def _round_columns(left_OI: Tensor, codes_OI: Tensor, inputs: Prepared, scale_O: Tensor, first: int, last: int) -> None:
    """Settle columns `first` to `last` of the processing order, and pass their errors on to those behind them."""
    upper_gR = inputs.rows(first, last)
    upper_gg = upper_gR[:, : last - first].contiguous()
    middle_O = torch.full_like(scale_O, 128.0)
    codes_Og, error_Og = round_group(left_OI[:, first:last], upper_gg, scale_O, middle_O, 255)
    codes_OI[:, inputs.columns_I[first:last]] = codes_Og
    if last < left_OI.shape[1]:
        left_OI[:, last:].addmm_(error_Og, upper_gR[:, last - first :], alpha=-1)
