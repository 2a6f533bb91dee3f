"""Aim a layer at what the original model would have computed, not at what the original layer does to wrong inputs.

By the time a layer is quantized, its inputs x already differ from the original model's x', because the layers before
it are quantized. The weight W' that brings `W' x` as near as a linear can to a point between `W x` and `W x'` is

    W' = W + strength * W C (G + d I)^-1,    C = E[(x' - x) x^T],  G = E[x x^T]

and it is W' that is then rounded. The idea, for error feedback, is Li et al., "GPTAQ", arXiv:2504.02692, and Zhang et
al., "Qronos", arXiv:2505.11695; both correct in full (strength 1). C is an estimate from little text, and half of the
correction generalised best (METHODS.md).

Shapes: O out_features, I in_features
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5
DAMPING = 0.05  # of the mean of diag(G)


def retarget(
    w_OI: Tensor, gram_II: Tensor, cross_II: Tensor, strength: float = STRENGTH, damping: float = DAMPING
) -> Tensor:
    """The weight W' to round instead of W; float32 `[O, I]`.

    gram_II: mean outer product of the inputs as they now are; cross_II: mean of `(x' - x) x^T`, x' the original's.
    """
    damped = gram_II.clone()
    damped.diagonal().add_(max(damping * float(gram_II.diagonal().mean()), 1e-30))
    factor = torch.linalg.cholesky(damped)
    return w_OI + strength * torch.cholesky_solve((w_OI @ cross_II).t(), factor).t()
