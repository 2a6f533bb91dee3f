"""Activation-aware weight quantization on the Gram matrix.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978: multiply the weight columns of salient
input channels by s > 1 before rounding and let the layer before divide by s, so that what matters most is rounded
most finely. The paper searches s = importance**r by running the layer for each r. Here the error of a candidate is
read off the Gram matrix G of the inputs, `tr(D G D^T)` with `D = Q(W s) / s - W`: the same quantity for a linear,
with no forward pass and no stored activations.

The paper's own loss is the error of the *parent's* output (attention, MLP); the caller therefore confirms the chosen
scale against the identity with one true forward, or by what error feedback loses with each.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import numerics
from compress.scheme import Scheme

# The search ranks candidates by a loss that is a sum over rows, so a sample will do: over the 24 groups of the
# reference model, the scale chosen on 512 rows loses 0.1 % more than the one chosen on all, on 256 0.6 %, on 128 1.1 %.
SEARCH_ROWS = 512
COARSE_RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FINE_STEPS = (-0.15, -0.10, -0.05, 0.05, 0.10, 0.15)


@dataclass(frozen=True, kw_only=True)
class ScaleChoice:
    """The scale found for a group. `error` and `identity_error` are mean squared output errors on the search rows."""

    s_I: Tensor
    ratio: float
    duo: bool
    error: float
    identity_error: float


def search_scale(
    weights: Sequence[Tensor],
    gram_II: Tensor,
    magnitude_I: Tensor,
    scheme: Scheme,
    shared: Tensor | None = None,
) -> ScaleChoice:
    """Per-input-channel scale s_I that minimises the quantized group's output error.

    weights: `[O, I]` float32 each, all fed by the inputs with mean outer product `gram_II` and mean magnitude
    `magnitude_I`. shared: int64 `[I]`, channels that must have one scale (grouped-query attention), or None.
    The grid holds the identity (r = 0), r = 1, and the formula with and without the weight's own magnitude ("duo
    scaling", AutoAWQ): s = x**r / w**(1 - r). Coarse ratios first, then steps of 0.05 around the best.
    """
    w_OI = torch.cat([w for w in weights])
    rows = sampled_rows(w_OI)
    x_I = _pooled(magnitude_I, shared)
    w_I = _pooled(_relative_magnitude(w_OI, scheme), shared)

    def loss(s_I: Tensor) -> float:
        delta = (numerics.round_to_nearest(rows * s_I, scheme) / s_I).sub_(rows)
        return output_error(delta, gram_II)

    ones = torch.ones_like(x_I)
    identity_error = loss(ones)
    best = ScaleChoice(s_I=ones, ratio=0.0, duo=False, error=identity_error, identity_error=identity_error)

    def consider(ratio: float, duo: bool) -> None:
        nonlocal best
        if ratio < 0 or ratio > 1 or (ratio == 0 and not duo):
            return
        s_I = scale_of(x_I, w_I if duo else None, ratio)
        error = loss(s_I)
        if error < best.error:
            best = ScaleChoice(s_I=s_I, ratio=ratio, duo=duo, error=error, identity_error=identity_error)

    for duo in (False, True):
        for ratio in COARSE_RATIOS:
            consider(ratio, duo)
    centre, duo = best.ratio, best.duo
    for offset in FINE_STEPS:
        consider(round(centre + offset, 2), duo)
    return best


def sampled_rows(w_OI: Tensor, most: int = SEARCH_ROWS) -> Tensor:
    """At most so many rows, evenly spread. A view."""
    return w_OI[:: -(-len(w_OI) // most)]


def scale_of(x_I: Tensor, w_I: Tensor | None, ratio: float) -> Tensor:
    """`x**r`, or `x**r / w**(1 - r)` with the weight's magnitude; normalised so that max(s) * min(s) = 1.

    Channels that never fire (x = 0) or are never read keep the scale of the smallest positive magnitude.
    """
    s = _floored(x_I).pow(ratio)
    if w_I is not None:
        s = s / _floored(w_I).pow(1 - ratio)
    s = s / (s.max() * s.min()).sqrt()
    # float16 holds norm / s and W * s only within reason; the paper's own clamp is 1e-4.
    return s.clamp(1e-4, 1e4)


def _floored(x_I: Tensor) -> Tensor:
    return x_I.clamp(min=max(1e-4 * float(x_I.mean()), 1e-12))


def output_error(delta_OI: Tensor, gram_II: Tensor) -> float:
    """`tr(D G D^T)`: summed over rows, the mean over tokens of the squared output error."""
    return float(row_errors(delta_OI, gram_II).sum(dtype=torch.float64))


def row_errors(delta_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The terms of `output_error`, one a row: the diagonal of `D G D^T`. `[O]`"""
    with numerics.tensor_float32():  # ranks candidates; see numerics for what that costs
        return (delta_OI @ gram_II).mul_(delta_OI).sum(dim=1)


def _relative_magnitude(w_OI: Tensor, scheme: Scheme) -> Tensor:
    """Mean over rows of |w| relative to its group's largest: what share of the range a channel takes. `[I]`."""
    w_OGg = numerics.to_groups(w_OI, scheme).abs()
    return (w_OGg / w_OGg.amax(dim=-1, keepdim=True).clamp(min=1e-6)).mean(dim=0).reshape(-1)


def _pooled(x_I: Tensor, shared: Tensor | None) -> Tensor:
    """Mean over the channels that share a scale, spread back over them."""
    if shared is None:
        return x_I
    index = shared.to(x_I.device)
    empty = torch.zeros(int(index.max()) + 1, dtype=x_I.dtype, device=x_I.device)
    total = numerics.add_by_index_(empty, index, x_I)
    count = numerics.add_by_index_(torch.zeros_like(total), index, torch.ones_like(x_I))
    return (total / count)[index]
