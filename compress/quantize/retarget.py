"""Aim a layer at what the original model would have computed, not at what the original layer does to wrong inputs.

By the time a layer is quantized, its inputs x already differ from the original model's x', because the layers before
it are quantized. The weight W' that brings `W' x` as near as a linear can to a point between `W x` and `W x'` is

    W' = W + strength * W C H^-1,    C = E[(x' - x) x^T],  H = E[x x^T], shrunk and damped

and it is W' that is then rounded. The idea, for error feedback, is Li et al., "GPTAQ", arXiv:2504.02692, and Zhang et
al., "Qronos", arXiv:2505.11695; both correct in full (strength 1). C is an estimate from little text, and half of the
correction generalised best (METHODS.md). H is the matrix that error feedback rounds with, so its inverse is at hand:
`H^-1 = U^T U`. Where H holds only a share of the correlations that were measured (few tokens), C is taken times
that share: else correlated inputs would each be answered for in full, and together many times over.

Shapes: O out_features, I in_features
"""

from __future__ import annotations

from torch import Tensor

from compress import numerics
from compress.quantize.feedback import Prepared

STRENGTH = 0.5


def retarget(w_OI: Tensor, shift_OI: Tensor, inputs: Prepared, strength: float = STRENGTH) -> Tensor:
    """The weight W' to round instead of W; float32 `[O, I]`.

    shift_OI: `W C`, the mean of `(W x' - W x) x^T`, x being the inputs as they now are and x' the original model's.
    inputs: H of the inputs as they now are, factorised.
    """
    # A correction is a few hundredths of the weight, so TF32's rounding of it is far below that of float16.
    with numerics.tensor_float32():
        correction_OI = inputs.times_inverse(shift_OI[:, inputs.columns_I])
    # No column comes twice, so it does not matter in which order a GPU adds.
    return w_OI.clone().index_add_(1, inputs.columns_I, correction_OI, alpha=strength * inputs.off_diagonal)
