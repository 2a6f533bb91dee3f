"""The linear that reads what is left, refitted so that its outputs stay what they were: least squares on Gram matrices.

Of a linear W with inputs x, only the channels K stay. The weight that comes nearest to `W x` from `x_K` is

    W_K <- W H[:, K] H[K, K]^-1,        H = E[x x^T], shrunk and damped

and where, besides, the block's output should move by d (because blocks before or behind it are gone, or were pruned
themselves), the nearest is that plus `E[d x_K^T] H[K, K]^-1`. The first part is exact algebra on what the layer itself
computed. The second is an estimate of something else's work from this layer's inputs, so it is taken at `STRENGTH`, and
less where few tokens stand behind it, as far as the correlations are believed. Half is what generalised best; in full
it lowers the squared error and raises the divergence. The damping is large because the text that is calibrated on is of
one kind: correlations in directions of little energy hold there and nowhere else (METHODS.md has the figures).

Shapes: O out_features, I in_features, K input channels that stay
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.statistics import InputStatistics, kept_share

DAMPING = 0.3  # of the mean of diag(H)
# Where hidden channels go, every linear loses part of its input, and what is left must be believed more.
HIDDEN_DAMPING = 0.01
STRENGTH = 0.5


def hessian(statistics: InputStatistics, damping: float = DAMPING) -> tuple[Tensor, float]:
    """The Gram matrix as far as it is believed, damped, float32 `[I, I]`; and the share of its off-diagonal part.

    damping: of the mean of its diagonal.
    """
    gram_II = statistics.gram_II
    share = kept_share(len(gram_II), statistics.num_tokens)
    mean = float(gram_II.diagonal().mean())
    if not mean < float("inf"):
        raise ArtifactError("the Gram matrix of a layer's inputs is not finite; its weights or the text are damaged")
    hessian_II = gram_II * share
    hessian_II.diagonal().copy_(gram_II.diagonal()).add_(max(damping * mean, 1e-30))
    return hessian_II, share


def factor(hessian_II: Tensor) -> Tensor:
    """The lower Cholesky factor; damping is raised tenfold while the matrix is not positive definite in float32."""
    damping = max(DAMPING * float(hessian_II.diagonal().mean()), 1e-30)
    while True:
        found: Tensor
        found, failed = torch.linalg.cholesky_ex(hessian_II)
        if not int(failed):
            return found
        hessian_II = hessian_II + damping * torch.eye(len(hessian_II), device=hessian_II.device)
        damping *= 10


def refit(
    w_OI: Tensor,
    hessian_II: Tensor,
    kept: Tensor | None,
    moved_OI: Tensor | None = None,
    strength: float = STRENGTH,
) -> tuple[Tensor, float]:
    """The weight `[O, K]` on the channels `kept` (int64; None: all, which need no refitting for their own sake).

    w_OI: float32 `[O, I]`, not changed. moved_OI: the mean of `d x^T`, by how much the output should move, or None.
    Also returns the share of the outputs' energy that is lost with the other channels, before anything is moved.
    """
    if kept is None:
        if moved_OI is None:
            return w_OI.clone(), 0.0
        return w_OI + strength * torch.cholesky_solve(moved_OI.t(), factor(hessian_II)).t(), 0.0
    kept = kept.to(w_OI.device)
    wanted_OI = w_OI @ hessian_II
    wanted_OK = wanted_OI[:, kept]
    factor_KK = factor(hessian_II[kept][:, kept])
    own_OK: Tensor = torch.cholesky_solve(wanted_OK.t(), factor_KK).t()
    total = float((wanted_OI * w_OI).sum())
    lost = 1 - float((wanted_OK * own_OK).sum()) / max(total, 1e-30)
    if moved_OI is not None:
        own_OK = own_OK + strength * torch.cholesky_solve(moved_OI[:, kept].t(), factor_KK).t()
    return own_OK.contiguous(), lost


def lost_by_cutting(w_OI: Tensor, hessian_II: Tensor, kept: Tensor) -> float:
    """The share of the outputs' energy that is lost when the other channels go and nothing is refitted."""
    gone_OI = w_OI.clone()
    gone_OI[:, kept.to(w_OI.device)] = 0
    total = float(((w_OI @ hessian_II) * w_OI).sum())
    return float(((gone_OI @ hessian_II) * gone_OI).sum()) / max(total, 1e-30)
