"""Going down from SmoothQuant's formula to scales that no formula of maxima gives.

Rounding noise is nearly independent of what is rounded, so the error of a layer with scale s is close to

    E(s) = mean_t sum_i min(d_t^2 / 12, x_ti^2 / s_i^2) s_i^2 |w_i|^2  +  c sum_o e_o^2 / 12  sum_i g_i / s_i^2

with d_t the step of token t, `max_i |x_ti| / s_i / 127`, e_o that of row o, `max_i |w_oi| s_i / 127.5`, g the mean
squared inputs, and c the share of the weights' error that is counted. (A value below half a step is lost, not rounded:
that is the minimum.) It can be differentiated by hand.

Each token's step is set by one channel, so a thousand tokens say next to nothing of seven hundred channels, and going
down on them fits these tokens. So every step takes other tokens and other rows of the weight, few at a time: what is
gone down on are thousands, for the price of a hundred.

Shapes: S tokens, O out_features, R some of them, I in_features, K channels with a scale of their own
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import numerics
from compress.plan import ActivationScheme

STEPS = 100
RATE = 0.06
TOKENS_AT_ONCE = 128
ROWS_AT_ONCE = 128


def descended(
    start_I: Tensor,
    w_OI: Tensor,
    power_I: Tensor,
    rows_SI: Tensor,
    activation: ActivationScheme | None,
    *,
    weight_share: float = 1.0,
    shared: Tensor | None = None,
    steps: int = STEPS,
) -> Tensor:
    """The scale `[I]` where going down E(s) (module docstring) from `start_I` ends, by Adam on log s; geometric mean 1.

    w_OI: the weights of the layers that share the inputs. power_I: mean squared inputs. rows_SI: tokens. activation:
    None for inputs that stay floats; one range for all tokens is taken from all of `rows_SI` at every step. shared:
    int64 `[I]`, channels that must have one scale.
    """
    index, pooled = _pooling(torch.arange(len(start_I)) if shared is None else shared, start_I.device)
    log_s = torch.zeros(int(index.max()) + 1, device=start_I.device).scatter_(0, index, start_I.log())
    noise = Noise(norm_I=w_OI.square().sum(dim=0), power_I=power_I, num_rows=len(w_OI), weight_share=weight_share)
    all_at_once = activation is None or not activation.dynamic
    mean_K, square_K = torch.zeros_like(log_s), torch.zeros_like(log_s)
    for step in range(1, steps + 1):
        x_SI = rows_SI if all_at_once else _turn(rows_SI, TOKENS_AT_ONCE, step)
        s_I = log_s[index].exp()
        _, gradient_I = noise.error_and_gradient(s_I, _turn(w_OI, ROWS_AT_ONCE, step), x_SI, activation)
        gradient_K = pooled(gradient_I)
        mean_K = 0.9 * mean_K + 0.1 * gradient_K
        square_K = 0.99 * square_K + 0.01 * gradient_K.square()
        rate = RATE * (1 - (step - 1) / steps)
        log_s = log_s - rate * (mean_K / (1 - 0.9**step)) / ((square_K / (1 - 0.99**step)).sqrt() + 1e-12)
    s_I = log_s[index].exp()
    return (s_I / s_I.log().mean().exp()).clamp(1e-4, 1e4)


def _pooling(shared: Tensor, device: torch.device) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Of each channel its scale, `[I]`, and what adds up the values of the channels of each scale, `[I]` -> `[K]`.

    Where each scale has as many channels (which heads that share a key head have), without a round trip to the CPU.
    """
    index, counts = shared.to(device), torch.bincount(shared.cpu())
    first = int(counts[0])
    if bool((counts == 1).all()) and torch.equal(shared.cpu(), torch.arange(len(shared))):
        return index, lambda x_I: x_I
    if bool((counts == first).all()):
        order = torch.argsort(shared.cpu(), stable=True).to(device)
        return index, lambda x_I: x_I[order].reshape(len(counts), first).sum(dim=1)
    return index, lambda x_I: numerics.add_by_index_(torch.zeros(len(counts), device=device), index, x_I)


def _turn(rows: Tensor, at_once: int, step: int) -> Tensor:
    """Every so manieth row, about `at_once` of them, others at every step until all had their turn; a view."""
    parts = max(1, round(len(rows) / at_once))
    return rows[step % parts :: parts]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """E(s) of the module docstring and its gradient, on some tokens and some rows of the weight.

    norm_I: squared norms of the weight's columns, of all `num_rows` rows. power_I: mean squared inputs.
    """

    norm_I: Tensor
    power_I: Tensor
    num_rows: int
    weight_share: float

    def error_and_gradient(
        self, s_I: Tensor, w_RI: Tensor, x_SI: Tensor, activation: ActivationScheme | None
    ) -> tuple[Tensor, Tensor]:
        """E(s), and the derivative of its logarithm by log s, `[I]`."""
        total, gradient_I = self._of_weights(w_RI, s_I)
        if activation is not None:
            inputs, inputs_I = self._of_inputs(x_SI, s_I, activation)
            total, gradient_I = total + inputs, gradient_I + inputs_I
        return total, gradient_I / total.clamp(min=1e-30)

    def _of_inputs(self, x_SI: Tensor, s_I: Tensor, activation: ActivationScheme) -> tuple[Tensor, Tensor]:
        seen_SI = x_SI / s_I
        step_S, ends = _steps(seen_SI, activation)
        power_S = step_S.square() / 12
        cost_I = s_I.square() * self.norm_I
        square_SI = seen_SI.square_()
        # A value that is lost costs the same under every scale that loses it.
        kept_SI = (square_SI > power_S.unsqueeze(1)).to(s_I.dtype)
        by_token_S = power_S * (kept_SI @ cost_I)
        error = torch.minimum(square_SI, power_S.unsqueeze(1)).sum(dim=0) @ cost_I / len(x_SI)
        gradient_I = 2 / len(x_SI) * cost_I * (power_S @ kept_SI)
        slope_S = 2 / len(x_SI) * by_token_S
        if not activation.dynamic:
            slope_S = slope_S.sum().expand(len(x_SI))
        for share_S, sets_SI in ends:
            gradient_I -= (slope_S * share_S) @ sets_SI
        return error, gradient_I

    def _of_weights(self, w_RI: Tensor, s_I: Tensor) -> tuple[Tensor, Tensor]:
        large_RI = w_RI.abs().mul_(s_I)
        top_R1 = large_RI.amax(dim=1, keepdim=True)
        sets_RI = (large_RI == top_R1).to(s_I.dtype)
        steps_R = (top_R1[:, 0] / 127.5).square()
        share = self.weight_share / 12 * self.num_rows / len(w_RI)
        passed_I = self.power_I / s_I.square()
        error = share * steps_R.sum() * passed_I.sum()
        gradient_I = 2 * share * (passed_I.sum() * (steps_R @ sets_RI) - steps_R.sum() * passed_I)
        return error, gradient_I


def _steps(seen_SI: Tensor, activation: ActivationScheme) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The step between codes of each token, `[S]`, and what sets it: its share, `[S]`, and where, 1 or 0, `[S, I]`."""
    values = seen_SI.abs() if activation.symmetric else seen_SI
    ends = [(1, values.amax(dim=1, keepdim=True))]
    if not activation.symmetric:
        ends.append((-1, values.amin(dim=1, keepdim=True)))  # which widens the range as it falls
    if not activation.dynamic:
        ends = [(sign, (end * sign).amax().mul(sign).expand(len(seen_SI), 1)) for sign, end in ends]
    range_S = sum(sign * end[:, 0] for sign, end in ends).clamp(min=1e-30)  # type: ignore[union-attr]
    sets = [(sign * end[:, 0] / range_S, (values == end).to(seen_SI.dtype)) for sign, end in ends]
    return range_S / (127 if activation.symmetric else 255), sets
