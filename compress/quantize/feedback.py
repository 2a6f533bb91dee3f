"""Error feedback on the Gram matrix: each column's rounding error is made up for by columns not yet rounded.

Frantar et al., "GPTQ", arXiv:2210.17323. With H the (damped) Gram matrix of a linear's inputs and `H^-1 = U^T U`, U
upper triangular, rounding column j with error e_j (in units of U_jj) is best answered by subtracting `e_j U_jk` from
every later column k. Here, and not in the paper:

- Whole groups are processed in order of importance, the sum of diag(H) over the group, and columns keep their order
  inside a group. The paper's order by single columns needs a stored permutation, which AutoAWQ's format has no room
  for; this order costs nothing there.
- A group's scale and zero point are searched when its turn comes, on weights that carry the corrections of the groups
  before it, with errors weighted by diag(H).
- U is the inverse of one triangular factor, `H = R R^T`, `U = R^-1`: a third of the work of inverting H and
  factorising again.

What was tried and what won is in METHODS.md.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress import numerics
from compress.errors import ArtifactError
from compress.quantize.feedback_triton import round_group
from compress.scheme import Scheme

DAMPING = 0.01  # of the mean of diag(H); the paper's
SHRINKAGE = 0.05  # of H towards its diagonal, at least
RANGE_STEPS = 20
RANGE_MIN = 0.5


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A rounded weight: `w_OI ~= (codes - zero_point) * scale`.

    codes_OI uint8, scale_OG (float16 values) and zero_point_OG float32. wanted_OI float32: the weight that each code
    was rounded from, corrections included. factor_OG: what each group's range was shrunk by.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor
    wanted_OI: Tensor
    factor_OG: Tensor

    def dequantize(self, scheme: Scheme) -> Tensor:
        """The weight that a reader computes with, float32 `[O, I]`."""
        q_OGg = numerics.to_groups(self.codes_OI, scheme).float()
        return numerics.dequantize(q_OGg, self.scale_OG, self.zero_point_OG).reshape(self.codes_OI.shape)


def shrunk(gram_II: Tensor, num_tokens: int) -> Tensor:
    """The Gram matrix with its off-diagonal part scaled down, by more the fewer tokens it was measured on.

    The correlations of a few thousand tokens are partly chance, and corrections that trust them overfit. The share of
    the off-diagonal part that is chance grows as I / num_tokens (the sampling variance of a covariance matrix over its
    size, as in Ledoit and Wolf's shrinkage), so that much is taken off, and never less than `SHRINKAGE`.
    """
    share = min(1.0, max(SHRINKAGE, len(gram_II) / max(1, num_tokens)))
    out = gram_II * (1 - share)
    out.diagonal().copy_(gram_II.diagonal())
    return out


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
        factor, failed = torch.linalg.cholesky_ex(reversed_II)
        if not int(failed):
            break
        reversed_II.diagonal().add_(9 * max(damping * mean, 1e-30))
        damping *= 10
    del reversed_II
    upper_II = factor.flip(0, 1)
    del factor
    eye = torch.eye(len(upper_II), dtype=upper_II.dtype, device=upper_II.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper_II, eye, upper=True)
    return inverse


def group_order(hessian_II: Tensor, size: int) -> list[int]:
    """Groups by falling sum of diag(H); equal ones in their own order."""
    importance_G = hessian_II.diagonal().reshape(-1, size).sum(dim=1)
    return [int(g) for g in torch.sort(importance_G, descending=True, stable=True).indices.tolist()]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What error feedback needs to know of a layer's inputs, whatever is then rounded.

    order: groups in the order of processing. columns_I: int64 `[I]`, the columns in that order. upper_II: the factor U,
    in that order. importance_I: float32 `[I]`, diag(H), in the columns' own order.
    """

    order: list[int]
    columns_I: Tensor
    upper_II: Tensor
    importance_I: Tensor

    def scaled(self, s_I: Tensor) -> Prepared:
        """The same for inputs divided by s, and weights multiplied by it: `D^-1 H D^-1 = ((U D)^T (U D))^-1`.

        Without a scale this is `self`: U is gigabytes for a wide layer, and most groups have none.
        """
        if bool((s_I == 1).all()):
            return self
        return replace(
            self, upper_II=self.upper_II * s_I[self.columns_I], importance_I=self.importance_I / s_I.square()
        )


def prepare(hessian_II: Tensor, scheme: Scheme) -> Prepared:
    """Order the groups and factorise; hessian_II: float32 `[I, I]`, not changed."""
    num_groups = scheme.groups(len(hessian_II))
    size = len(hessian_II) // num_groups
    order = group_order(hessian_II, size)
    columns_I = torch.arange(len(hessian_II), device=hessian_II.device).reshape(num_groups, size)[order].reshape(-1)
    upper_II = inverse_factor(hessian_II[columns_I][:, columns_I])
    return Prepared(order=order, columns_I=columns_I, upper_II=upper_II, importance_I=hessian_II.diagonal().clone())


def round_with_feedback(w_OI: Tensor, inputs: Prepared, scheme: Scheme) -> Rounded:
    """Round a weight with error feedback. w_OI: float32 `[O, I]`, not changed.

    Rows do not depend on each other, so linears that share an input may be stacked.
    """
    num_rows, num_columns = w_OI.shape
    num_groups = len(inputs.order)
    size = num_columns // num_groups
    upper_II = inputs.upper_II
    left_OI = w_OI[:, inputs.columns_I]  # a copy, in processing order
    out = Rounded(
        codes_OI=torch.empty(w_OI.shape, dtype=torch.uint8, device=w_OI.device),
        scale_OG=torch.empty(num_rows, num_groups, device=w_OI.device),
        zero_point_OG=torch.empty(num_rows, num_groups, device=w_OI.device),
        wanted_OI=torch.empty_like(w_OI),
        factor_OG=torch.empty(num_rows, num_groups, device=w_OI.device),
    )
    for turn, group in enumerate(inputs.order):
        here = slice(turn * size, (turn + 1) * size)
        there = slice(group * size, (group + 1) * size)
        upper_gg = upper_II[here, here]
        scale, zero, factor = fit_range(left_OI[:, here], inputs.importance_I[there], scheme)
        codes, error = round_group(left_OI[:, here], upper_gg.contiguous(), scale, zero, scheme.max_code)
        left_OI[:, here.stop :].addmm_(error, upper_II[here, here.stop :], alpha=-1)
        out.codes_OI[:, there] = codes
        out.scale_OG[:, group], out.zero_point_OG[:, group], out.factor_OG[:, group] = scale, zero, factor
        value = (codes.float() - zero.unsqueeze(1)) * scale.unsqueeze(1)
        out.wanted_OI[:, there] = value + error * upper_gg.diagonal()
    return out


def fit_range(w_Og: Tensor, importance_g: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point `[O]` of one group that minimise `sum_j importance_j (w_j - rounded_j)^2`, row by row.

    Candidates shrink the range from the full one to `RANGE_MIN` of it. Also returns the factor chosen.
    """
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for factor, scale, zero in _candidates(w_Og, scheme):
        delta = numerics.fake_quantize(w_Og, scale, zero, scheme).sub_(w_Og)
        error = delta.square_() @ importance_g
        if best is None:
            best = error, scale, zero, torch.full_like(scale, factor)
            continue
        better = error < best[0]
        found = (error, scale, zero, torch.full_like(scale, factor))
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2], best[3]


def _candidates(w_Og: Tensor, scheme: Scheme) -> Iterator[tuple[float, Tensor, Tensor]]:
    lo, hi = numerics.range_of(w_Og)
    for i in range(RANGE_STEPS + 1):
        factor = 1.0 - (1.0 - RANGE_MIN) * i / RANGE_STEPS
        yield factor, *numerics.scale_and_zero(lo * factor, hi * factor, scheme)
