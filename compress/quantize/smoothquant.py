"""How much of a layer's outliers to move from its inputs into its weights, by the error that is left.

Dividing input channel i by s_i and multiplying the weight's column i by it changes nothing, until both are rounded:
inputs with one scale a token, weights with one a row. Xiao et al., "SmoothQuant", arXiv:2211.10438, take

    s_i = amax(x_i)^a / amax(w_i)^(1 - a)

with one strength a for the whole model and never look at what it does. Here every group of linears has its own, which
may be none, and the error of a candidate is measured: of the weights on the Gram matrix of all calibration tokens, of
the inputs by quantizing sampled tokens as the engine will. And the formula is only where the search begins. Rounding
noise is nearly independent of what is rounded, so the error is close to

    E(s) = mean_t sum_i min(d_t^2 / 12, x_ti^2 / s_i^2) s_i^2 |w_i|^2  +  c sum_o e_o^2 / 12  sum_i g_i / s_i^2

with d_t the step of token t, `max_i |x_ti| / s_i / 127`, e_o that of row o, `max_i |w_oi| s_i / 127.5`, g the mean
squared inputs, and c the share of the weights' error that error feedback leaves. (A value below half a step is lost,
not rounded: that is the minimum.) It can be differentiated by hand, and going down from the best strength finds scales
that no formula of maxima gives. Whatever it finds counts only if the measured error says so.

Shapes: S sampled tokens, O out_features, I in_features, K channels with a scale of their own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import activations, numerics
from compress.plan import ActivationScheme
from compress.quantize.awq import output_error, sampled_rows

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Rows of the weight that candidates are measured on, as for AWQ's scales.
SEARCH_ROWS = 512
DESCENT_STEPS = 120
DESCENT_RATE = 0.05
_FLOOR = 1e-5  # SmoothQuant's own, of both maxima


@dataclass(frozen=True, kw_only=True)
class SampledInputs:
    """What the search knows of a group's inputs: mean outer product `[I, I]`, largest |x| of each channel `[I]` over
    all calibration tokens, and some of the tokens `[S, I]`; float32."""

    gram_II: Tensor
    amax_I: Tensor
    rows_SI: Tensor


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

    weight_share: how much of the error of `round_weight` counts, because error feedback takes the rest away. shared:
    int64 `[I]`, channels that must have one scale (grouped-query attention). activation: None for inputs that stay
    floats; a static one is taken with the range of the sampled tokens. strengths: one alone is taken as it is, whatever
    its error.
    """
    w_OI = torch.cat(list(weights))
    rows_OI = sampled_rows(w_OI, SEARCH_ROWS)
    amax_x, amax_w = pooled_max(inputs.amax_I, shared), pooled_max(w_OI.abs().amax(dim=0), shared)

    def error(s_I: Tensor) -> float:
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
        s_I = descended(best.s_I, rows_OI, inputs, activation, weight_share, shared)
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
    w_s = w_OI * s_I
    delta_OI = (round_weight(w_s) / s_I).sub_(w_OI)
    error = weight_share * output_error(delta_OI, inputs.gram_II)
    if activation is None:
        return error
    rows_SI = inputs.rows_SI / s_I
    return error + input_error(w_s, rows_SI, fake_quantized(rows_SI, activation))


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


# ---- going down from the formula -----------------------------------------------------------------------


def descended(
    start_I: Tensor,
    w_OI: Tensor,
    inputs: SampledInputs,
    activation: ActivationScheme | None,
    weight_share: float,
    shared: Tensor | None,
    steps: int = DESCENT_STEPS,
) -> Tensor:
    """The scale `[I]` with the least E(s) (module docstring) on the way down from `start_I`, by Adam on log s."""
    index = torch.arange(len(start_I)) if shared is None else shared
    index = index.to(start_I.device)
    num_scales = int(index.max()) + 1
    log_s = torch.zeros(num_scales, device=start_I.device).scatter_(0, index, start_I.log())
    model = _Noise.of(w_OI, inputs, activation, weight_share)
    best, best_log = float("inf"), log_s
    mean_K, square_K = torch.zeros_like(log_s), torch.zeros_like(log_s)
    for step in range(1, steps + 1):
        error, gradient_I = model.error_and_gradient(log_s[index].exp())
        if error < best:
            best, best_log = error, log_s
        gradient_K = numerics.add_by_index_(torch.zeros_like(log_s), index, gradient_I)
        mean_K = 0.9 * mean_K + 0.1 * gradient_K
        square_K = 0.99 * square_K + 0.01 * gradient_K.square()
        rate = DESCENT_RATE * (1 - (step - 1) / steps)
        change_K = (mean_K / (1 - 0.9**step)) / ((square_K / (1 - 0.99**step)).sqrt() + 1e-12)
        log_s = log_s - rate * change_K
    s_I = best_log[index].exp()
    return (s_I / s_I.log().mean().exp()).clamp(1e-4, 1e4)


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """E(s) of the module docstring and its gradient. w_OI: magnitudes. norm_I: of its columns, squared."""

    x_SI: Tensor
    w_OI: Tensor
    norm_I: Tensor
    power_I: Tensor
    weight_share: float
    activation: ActivationScheme | None

    @classmethod
    def of(
        cls, w_OI: Tensor, inputs: SampledInputs, activation: ActivationScheme | None, weight_share: float
    ) -> _Noise:
        return cls(
            x_SI=inputs.rows_SI,
            w_OI=w_OI.abs(),
            norm_I=w_OI.square().sum(dim=0),
            power_I=inputs.gram_II.diagonal(),
            weight_share=weight_share,
            activation=activation,
        )

    def error_and_gradient(self, s_I: Tensor) -> tuple[float, Tensor]:
        """E(s), and the derivative of its logarithm by log s, `[I]`."""
        total, gradient_I = self._of_weights(s_I)
        if self.activation is not None:
            inputs, inputs_I = self._of_inputs(s_I, self.activation)
            total, gradient_I = total + inputs, gradient_I + inputs_I
        return float(total), gradient_I / total.clamp(min=1e-30)

    def _of_inputs(self, s_I: Tensor, activation: ActivationScheme) -> tuple[Tensor, Tensor]:
        num_tokens = len(self.x_SI)
        step_S, ends = _steps(self.x_SI / s_I, activation)
        rounded_SI = (step_S.square() / 12).unsqueeze(1) * (s_I.square() * self.norm_I)
        lost_SI = self.x_SI.square() * self.norm_I
        # A value that is lost costs the same under every scale that loses it.
        rounded_SI = torch.where(rounded_SI < lost_SI, rounded_SI, 0.0)
        error = torch.where(rounded_SI > 0, rounded_SI, lost_SI).sum() / num_tokens
        gradient_I = 2 * rounded_SI.sum(dim=0) / num_tokens
        slope_S = 2 * rounded_SI.sum(dim=1) / num_tokens
        if not activation.dynamic:
            slope_S = slope_S.sum().reshape(1)
        for share_S, channel_S in ends:
            numerics.add_by_index_(gradient_I, channel_S, -slope_S * share_S)
        return error, gradient_I

    def _of_weights(self, s_I: Tensor) -> tuple[Tensor, Tensor]:
        top_O, channel_O = (self.w_OI * s_I).max(dim=1)
        steps = (top_O / 127.5).square()
        passed_I = self.power_I / s_I.square()
        error = self.weight_share / 12 * steps.sum() * passed_I.sum()
        gradient_I = -2 * (self.weight_share / 12) * steps.sum() * passed_I
        numerics.add_by_index_(gradient_I, channel_O, 2 * (self.weight_share / 12) * passed_I.sum() * steps)
        return error, gradient_I


def _steps(x_SI: Tensor, activation: ActivationScheme) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The step between codes, of each token or `[1]` of all, and which channels set it, each with its share of it."""
    (high_S, high_at), (low_S, low_at) = x_SI.max(dim=1), x_SI.min(dim=1)
    if activation.symmetric:
        low_is_more = -low_S > high_S
        high_S, high_at = torch.where(low_is_more, -low_S, high_S), torch.where(low_is_more, low_at, high_at)
    if not activation.dynamic:
        top, bottom = high_S.argmax(), low_S.argmin()
        high_S, high_at = high_S[top].reshape(1), high_at[top].reshape(1)
        low_S, low_at = low_S[bottom].reshape(1), low_at[bottom].reshape(1)
    if activation.symmetric:
        return high_S / 127, [(torch.ones_like(high_S), high_at)]
    range_S = (high_S - low_S).clamp(min=1e-30)
    return range_S / 255, [(high_S / range_S, high_at), (-low_S / range_S, low_at)]
