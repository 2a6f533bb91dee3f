"""Error feedback on the Gram matrix: each column's rounding error is made up for by columns not yet rounded.

Frantar et al., "GPTQ", arXiv:2210.17323. With H the (damped) Gram matrix of a linear's inputs and `H^-1 = U^T U`, U
upper triangular, rounding column j with error e_j (in units of U_jj) is best answered by subtracting `e_j U_jk` from
every later column k. Here, and not in the paper:

- Whole groups are processed in order of importance, the sum of diag(H) over the group, and columns keep their order
  inside a group. The paper's order by single columns needs a stored permutation, which AutoAWQ's format has no room
  for; this order costs nothing there.
- A group's scale and zero point are searched when its turn comes, on weights that carry the corrections of the groups
  before it, with errors weighted by diag(H).
- U is the inverse of one triangular factor, `H = R R^T`, `U = R^-1`, inverted in place by halves: a third of the work
  of inverting H and factorising again, and two matrices of H's size at most.

What was tried and what won is in METHODS.md.

Shapes: O out_features, I in_features, G groups along I, g group size, R columns from a group's first to the last
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress import numerics, threads
from compress.errors import ArtifactError
from compress.quantize.feedback_step import kernels, round_group
from compress.scheme import Scheme

DAMPING = 0.01  # of the mean of diag(H); the paper's
RANGE_STEPS = 20
RANGE_MIN = 0.5
_INVERTED_AT_ONCE = 256
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A rounded weight: `w_OI ~= (codes - zero_point) * scale`.

    codes_OI uint8, scale_OG (float16 values) and zero_point_OG float32. factor_OG: what each group's range was shrunk
    by. wanted_OI float32: the weight that each code was rounded from, corrections included; None when not asked for.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    factor_OG: Tensor
    wanted_OI: Tensor | None

    def rows(self, rows: slice) -> Rounded:
        """A part of a stack of layers; views."""
        return Rounded(
            codes_OI=self.codes_OI[rows],
            scale_OG=self.scale_OG[rows],
            zero_point_OG=self.zero_point_OG[rows],
            factor_OG=self.factor_OG[rows],
            wanted_OI=None if self.wanted_OI is None else self.wanted_OI[rows],
        )

    def dequantize(self, scheme: Scheme) -> Tensor:
        """The weight that a reader computes with, float32 `[O, I]`."""
        q_OGg = numerics.to_groups(self.codes_OI, scheme).float()
        return numerics.dequantize(q_OGg, self.scale_OG, self.zero_point_OG).reshape(self.codes_OI.shape)


def inverse_factor(hessian_II: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with `(H + d I)^-1 = U^T U`, `d = damping * mean(diag(H))`; float32 `[I, I]`.

    Damping is raised tenfold while H is not positive definite in float32. Raises ArtifactError when H holds NaN.
    """
    mean = float(hessian_II.diagonal().mean())
    if not mean < float("inf"):
        raise ArtifactError("the Gram matrix of a layer's inputs is not finite; its weights or the text are damaged")
    # Reversing rows and columns turns the lower Cholesky factor into the upper one. A wide layer's matrices are
    # gigabytes, so each is dropped once the next is there.
    reversed_II = hessian_II.flip(0, 1)
    del hessian_II
    reversed_II.diagonal().add_(max(damping * mean, 1e-30))
    while True:
        with nullcontext() if reversed_II.is_cuda else threads.pinned():
            factor, failed = torch.linalg.cholesky_ex(reversed_II)
        if not int(failed):
            break
        reversed_II.diagonal().add_(9 * max(damping * mean, 1e-30))
        damping *= 10
    del reversed_II
    upper_II: Tensor = factor.flip(0, 1)
    del factor
    invert_upper_(upper_II)
    return upper_II


def invert_upper_(upper_II: Tensor) -> None:
    """Invert an upper triangular matrix in place: `[[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]`."""
    size = len(upper_II)
    if size <= _INVERTED_AT_ONCE:
        eye = torch.eye(size, dtype=upper_II.dtype, device=upper_II.device)
        upper_II.copy_(torch.linalg.solve_triangular(upper_II, eye, upper=True))
        return
    half = size // 2
    top, bottom = upper_II[:half, :half], upper_II[half:, half:]
    invert_upper_(top)
    invert_upper_(bottom)
    corner = upper_II[:half, half:]
    corner.copy_((top @ corner).neg_() @ bottom)


def group_order(hessian_II: Tensor, size: int) -> list[int]:
    """Groups by falling sum of diag(H); equal ones in their own order."""
    importance_G = hessian_II.diagonal().reshape(-1, size).sum(dim=1)
    return [int(g) for g in torch.sort(importance_G, descending=True, stable=True).indices.tolist()]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What error feedback needs to know of a layer's inputs, whatever is then rounded.

    order: groups in the order of processing. columns_I: int64 `[I]`, the columns in that order. upper_II: the factor U,
    in that order. importance_I: float32 `[I]`, diag(H), in the columns' own order. scale_I: what the inputs were
    divided by after that, in the order of processing, or None. off_diagonal: how many times H holds the off-diagonal
    part that was measured.
    """

    order: list[int]
    columns_I: Tensor
    upper_II: Tensor
    importance_I: Tensor
    off_diagonal: float = 1.0
    scale_I: Tensor | None = None

    def scaled(self, s_I: Tensor) -> Prepared:
        """The same for inputs divided by s, and weights multiplied by it: `D^-1 H D^-1 = ((U D)^T (U D))^-1`.

        U itself is shared, and multiplied where it is read: it is gigabytes for a wide layer.
        """
        assert self.scale_I is None
        return replace(self, scale_I=s_I[self.columns_I], importance_I=self.importance_I / s_I.square())

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of the factor, from column `first` on."""
        upper = self.upper_II[first:last, first:]
        return upper if self.scale_I is None else upper * self.scale_I[first:]

    def times_inverse(self, x_OI: Tensor) -> Tensor:
        """`x H^-1 = x U^T U`, the columns of x and of the result in processing order."""
        if self.scale_I is None:
            found: Tensor = x_OI @ self.upper_II.t() @ self.upper_II
            return found
        return ((x_OI * self.scale_I) @ self.upper_II.t() @ self.upper_II).mul_(self.scale_I)


def prepare(hessian_II: Tensor, scheme: Scheme, off_diagonal: float = 1.0) -> Prepared:
    """Order the groups and factorise H, its off-diagonal part taken `off_diagonal` times.

    hessian_II: float32 `[I, I]`, not changed.
    """
    num_groups = scheme.groups(len(hessian_II))
    size = len(hessian_II) // num_groups
    order = group_order(hessian_II, size)
    columns_I = torch.arange(len(hessian_II), device=hessian_II.device).reshape(num_groups, size)[order].reshape(-1)
    return Prepared(
        order=order,
        columns_I=columns_I,
        # The matrix in between has no other name, so that it is gone as soon as it is factorised.
        upper_II=inverse_factor(ordered(hessian_II, columns_I, off_diagonal)),
        importance_I=hessian_II.diagonal().clone(),
        off_diagonal=off_diagonal,
    )


def ordered(hessian_II: Tensor, columns_I: Tensor, off_diagonal: float) -> Tensor:
    """Rows and columns in processing order, the off-diagonal part scaled."""
    out = torch.empty_like(hessian_II)
    for rows in torch.arange(len(hessian_II), device=hessian_II.device).split(_ROWS_AT_ONCE):
        out[rows] = hessian_II[columns_I[rows]].mul_(off_diagonal)[:, columns_I]
    out.diagonal().copy_(hessian_II.diagonal()[columns_I])
    return out


def round_with_feedback(w_OI: Tensor, inputs: Prepared, scheme: Scheme, *, wanted: bool = True) -> Rounded:
    """Round a weight with error feedback. w_OI: float32 `[O, I]`, not changed. wanted: whether to return `wanted_OI`.

    Rows do not depend on each other, so linears that share an input may be stacked.
    """
    num_groups = len(inputs.order)
    size = w_OI.shape[1] // num_groups
    left_OI = w_OI[:, inputs.columns_I]  # a copy, in processing order
    wanted_OI = torch.empty_like(w_OI) if wanted else None
    found: dict[int, tuple[Tensor, ...]] = {}  # codes, scale, zero point and factor of each group
    for turn, group in enumerate(inputs.order):
        first, last = turn * size, (turn + 1) * size
        there = slice(group * size, (group + 1) * size)
        w_Og, upper_gR = left_OI[:, first:last], inputs.rows(first, last)
        upper_gg = upper_gR[:, :size]
        scale, zero, factor = fit_range(w_Og, inputs.importance_I[there], scheme)
        codes, error = round_group(w_Og, upper_gg, scale, zero, scheme.max_code)
        left_OI[:, last:].addmm_(error, upper_gR[:, size:], alpha=-1)
        found[group] = codes, scale, zero, factor
        if wanted_OI is not None:
            value = numerics.dequantize(codes.float(), scale, zero)
            wanted_OI[:, there] = value + error * upper_gg.diagonal()
    all_codes, scales, zeros, factors = zip(*(found[group] for group in range(num_groups)), strict=True)
    return Rounded(
        codes_OI=torch.cat(all_codes, dim=1),
        scale_OG=torch.stack(scales, dim=1),
        zero_point_OG=torch.stack(zeros, dim=1),
        factor_OG=torch.stack(factors, dim=1),
        wanted_OI=wanted_OI,
    )


def warm(scheme: Scheme, device: torch.device) -> None:
    """On a GPU, compile the kernels for these codes, and start what factorises and multiplies, by rounding a little.

    May run in a thread beside other work: it sets nothing that others read.
    """
    if device.type == "cuda" and scheme.group_size > 0:  # a whole row's tiles depend on its width
        inputs = prepare(torch.eye(2 * scheme.group_size, device=device), scheme)
        round_with_feedback(torch.ones(64, 2 * scheme.group_size, device=device), inputs, scheme)


def fit_range(w_Og: Tensor, importance_g: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point `[O]` of one group that minimise `sum_j importance_j (w_j - rounded_j)^2`, row by row.

    Candidates are the full range times `numerics.range_factors`, from `RANGE_MIN` on. Also returns the factor chosen.
    """
    factors_C = _on(w_Og.device, *numerics.range_factors(scheme, RANGE_MIN, RANGE_STEPS))
    if w_Og.is_cuda:
        fitted: tuple[Tensor, Tensor, Tensor] = kernels().fit_range(w_Og, importance_g, factors_C, scheme)
        return fitted
    lo, hi = numerics.range_of(w_Og)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for factor in factors_C:
        scale, zero = numerics.scale_and_zero(lo * factor, hi * factor, scheme)
        delta = numerics.fake_quantize(w_Og, scale, zero, scheme).sub_(w_Og)
        error = delta.square_() @ importance_g
        found = (error, scale, zero, factor.expand_as(scale))
        if best is None:
            best = found
            continue
        better = error < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2], best[3]


@functools.cache
def _on(device: torch.device, *values: float) -> Tensor:
    """float32 `[C]`, made once: a copy to a GPU waits for it."""
    return torch.tensor(values, device=device)
