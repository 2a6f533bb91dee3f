"""How much of a layer's outliers to move from its inputs into its weights, by the error that is left.

Dividing input channel i by s_i and multiplying the weight's column i by it changes nothing, until both are rounded:
inputs with one scale a token, weights with one a row. Xiao et al., "SmoothQuant", arXiv:2211.10438, take

    s_i = amax(x_i)^a / amax(w_i)^(1 - a)

with one strength a for the whole model and never look at what it does. Here every group of linears has its own, which
may be none, and the error of a candidate is measured: by quantizing weights, and sampled tokens as the engine will, and
multiplying them; or, where error feedback will take a part of the weights' error away, of the weights on the Gram
matrix of all calibration tokens and of the inputs on sampled ones. And the formula is only where the search begins
(`descent`). What that finds counts only if the measured error says so.

Shapes: S sampled tokens, M measured ones, O out_features, I in_features
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import activations, numerics
from compress.plan import ActivationScheme
from compress.quantize.awq import output_error, sampled_rows
from compress.quantize.descent import descended

# Where descent may begin, beside the identity. It leaves all of them, so few are enough.
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
# Rows of the weight that candidates are measured on, as for AWQ's scales.
SEARCH_ROWS = 512
_FLOOR = 1e-5  # SmoothQuant's own, of both maxima


@dataclass(frozen=True, kw_only=True)
class SampledInputs:
    """What the search knows of a group's inputs; float32.

    gram_II: mean outer product over all calibration tokens, or None. power_I: mean squares. amax_I: largest |x|, over
    all calibration tokens. rows_SI: many of the tokens, to go down on. measured_MI: fewer, to measure on.
    """

    gram_II: Tensor | None
    power_I: Tensor
    amax_I: Tensor
    rows_SI: Tensor
    measured_MI: Tensor


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """The scale found. strength: of the formula, 0 for the identity; descended: whether it was left for a better one.

    Errors are mean squared output errors of the sampled rows of the weight: with this scale, and with none.
    """

    s_I: Tensor
    strength: float
    descended: bool
    error: float
    identity_error: float


# What the weight becomes, float32 `[O, I]`.
RoundWeight = Callable[[Tensor], Tensor]


def search_smoothing(
    weights: Sequence[Tensor],
    inputs: SampledInputs,
    activation: ActivationScheme | None,
    round_weight: RoundWeight,
    *,
    weight_share: float = 1.0,
    shared: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    descend: bool = True,
) -> Smoothing:
    """The scale s_I of a group of linears `[O, I]` that loses least, among the identity, the formula and its descent.

    weight_share: how much of the error of `round_weight` counts, because error feedback takes the rest away; other than
    1 only with a Gram matrix. shared:
    int64 `[I]`, channels that must have one scale (grouped-query attention). activation: None for inputs that stay
    floats; a static one is taken with the range of the sampled tokens. strengths: one alone is taken as it is, whatever
    its error.
    """
    w_OI = torch.cat(list(weights))
    rows_OI = sampled_rows(w_OI, SEARCH_ROWS)
    amax_x, amax_w = pooled_max(inputs.amax_I, shared), pooled_max(w_OI.abs().amax(dim=0), shared)

    assert inputs.gram_II is not None or weight_share == 1
    with numerics.tensor_float32():
        wanted_MO = None if inputs.gram_II is not None else inputs.measured_MI @ rows_OI.t()

    def error(s_I: Tensor) -> float:
        if wanted_MO is not None:
            return measured_error(rows_OI, s_I, inputs.measured_MI, wanted_MO, activation, round_weight)
        return smoothed_error(rows_OI, s_I, inputs, activation, round_weight, weight_share)

    ones = torch.ones_like(amax_x)
    identity_error = error(ones)
    best = Smoothing(s_I=ones, strength=0.0, descended=False, error=identity_error, identity_error=identity_error)
    for strength in strengths:
        s_I = smoothquant_scale(amax_x, amax_w, strength)
        found = error(s_I)
        if found < best.error or len(strengths) == 1:
            best = Smoothing(s_I=s_I, strength=strength, descended=False, error=found, identity_error=identity_error)
    if descend and len(strengths) > 1:
        dynamic = activation is not None and activation.dynamic
        s_I = descended(
            best.s_I,
            w_OI,
            inputs.power_I,
            inputs.rows_SI if dynamic else inputs.measured_MI,
            activation,
            weight_share=weight_share,
            shared=shared,
        )
        found = error(s_I)
        if found < best.error:
            best = Smoothing(
                s_I=s_I, strength=best.strength, descended=True, error=found, identity_error=identity_error
            )
    return best


def smoothquant_scale(amax_x_I: Tensor, amax_w_I: Tensor, strength: float) -> Tensor:
    """SmoothQuant's formula, divided by its geometric mean, which neither inputs nor weights notice."""
    s_I = amax_x_I.clamp(min=_FLOOR).pow(strength) / amax_w_I.clamp(min=_FLOOR).pow(1 - strength)
    return (s_I / s_I.log().mean().exp()).clamp(1e-4, 1e4)  # float16 holds norm / s and W * s only within reason


def smoothed_error(
    w_OI: Tensor,
    s_I: Tensor,
    inputs: SampledInputs,
    activation: ActivationScheme | None,
    round_weight: RoundWeight,
    weight_share: float = 1.0,
) -> float:
    """Mean squared output error with scale s, summed over rows: of the weights' rounding and of the inputs'."""
    assert inputs.gram_II is not None
    w_s = w_OI * s_I
    delta_OI = (round_weight(w_s) / s_I).sub_(w_OI)
    error = weight_share * output_error(delta_OI, inputs.gram_II)
    if activation is None:
        return error
    rows_SI = inputs.measured_MI / s_I
    return error + input_error(w_s, rows_SI, fake_quantized(rows_SI, activation))


def measured_error(
    w_OI: Tensor,
    s_I: Tensor,
    rows_MI: Tensor,
    wanted_MO: Tensor,
    activation: ActivationScheme | None,
    round_weight: RoundWeight,
) -> float:
    """Mean squared output error of the quantized layer with scale s, summed over rows. wanted_MO: `x w^T`."""
    seen_MI = rows_MI / s_I
    if activation is not None:
        seen_MI = fake_quantized(seen_MI, activation)
    with numerics.tensor_float32():  # as in `input_error`
        change_MO = (seen_MI @ round_weight(w_OI * s_I).t()).sub_(wanted_MO)
    return float(change_MO.square_().sum(dtype=torch.float64)) / max(1, len(rows_MI))


def input_error(w_OI: Tensor, rows_SI: Tensor, quantized_SI: Tensor) -> float:
    """Mean over tokens of the squared output error that quantizing the inputs causes, summed over rows of W."""
    with numerics.tensor_float32():  # ranks candidates; see numerics for what that costs
        change_SO = (quantized_SI - rows_SI) @ w_OI.t()
    return float(change_SO.square_().sum(dtype=torch.float64)) / max(1, len(rows_SI))


def fake_quantized(rows_SI: Tensor, activation: ActivationScheme) -> Tensor:
    """Tokens as they are after quantization; a static quantizer takes the range that these tokens have."""
    if activation.dynamic:
        return activations.fake_quantize(rows_SI, activation)
    if activation.symmetric:
        scale, zero = rows_SI.abs().max() / 127.5, torch.zeros((), device=rows_SI.device)
    else:
        low, high = rows_SI.min().clamp(max=0), rows_SI.max().clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - low / scale.clamp(min=1e-30)).round()
    scale = scale.clamp(min=1e-30)
    return ((rows_SI / scale).round_().add_(zero).clamp_(-128, 127) - zero).mul_(scale)


def pooled_max(x_I: Tensor, shared: Tensor | None) -> Tensor:
    """Largest over the channels that share a scale, spread back over them."""
    if shared is None:
        return x_I
    index = shared.to(x_I.device)
    largest = torch.zeros(int(index.max()) + 1, dtype=x_I.dtype, device=x_I.device)
    return largest.scatter_reduce_(0, index, x_I, "amax")[index]
