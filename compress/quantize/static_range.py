"""One range for all tokens of a layer's inputs, chosen by the error of the layer's outputs.

Readers that know no scale by token (Q/DQ graphs) need it stored. The largest value ever seen makes every step as coarse
as the rarest token asks for; a smaller range clips that token. Which is worse depends on the weights behind it, so
both are measured: the outputs of sampled tokens, quantized with ever smaller ranges, against what they are.

Shapes: S sampled tokens, O out_features, I in_features
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress import activations
from compress.plan import ActivationScheme
from compress.quantize.awq import sampled_rows
from compress.quantize.int8 import LEVELS, stored_scale
from compress.quantize.smoothquant import SEARCH_ROWS, input_error
from compress.quantized import StaticInput

# Each range is so much of the one before it, down to a hundredth of the first.
SHRINK = 2**-0.25
CANDIDATES = 27


def fit_static(rows_SI: Tensor, w_OI: Tensor, activation: ActivationScheme, dtype: torch.dtype) -> StaticInput:
    """The quantizer of the inputs whose outputs come nearest to those of inputs that are not quantized.

    rows_SI: tokens, those with the largest values among them. w_OI: the weights behind them, stacked. The scale holds a
    value of `dtype`.
    """
    rows_OI = sampled_rows(w_OI, SEARCH_ROWS)
    low, high = float(rows_SI.min().clamp(max=0)), float(rows_SI.max().clamp(min=0))
    best_error, best = float("inf"), None
    for step in range(CANDIDATES):
        static = quantizer(low * SHRINK**step, high * SHRINK**step, activation, dtype, rows_SI.device)
        error = input_error(rows_OI, rows_SI, activations.fake_quantize(rows_SI, activation, static))
        if error < best_error:
            best_error, best = error, static
    assert best is not None
    return best


def quantizer(
    low: float, high: float, activation: ActivationScheme, dtype: torch.dtype, device: torch.device
) -> StaticInput:
    """The quantizer that covers `low <= 0` to `high >= 0`: symmetric, or with a zero point."""
    wanted = max(-low, high) / LEVELS if activation.symmetric else (high - low) / 255
    scale = stored_scale(torch.tensor([wanted]), dtype)
    zero = 128.0 if activation.symmetric else min(255.0, max(0.0, round(-low / float(scale))))
    return StaticInput(
        scale=scale.to(dtype).to(device),
        zero_point=torch.tensor([zero], dtype=torch.uint8, device=device),
    )
