"""Activation-aware weight quantization on the Gram matrix.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978: multiply the weight columns of salient
input channels by s > 1 before rounding and let the layer before divide by s, so that what matters most is rounded
most finely. The paper searches s = importance**r by running the layer for each r. Here the error of a candidate is
read off the Gram matrix G of the inputs, `tr(D G D^T)` with `D = Q(W s) / s - W`: the same quantity for a linear,
with no forward pass and no stored activations.

The paper's own loss is the error of the *parent's* output (attention, MLP); the caller therefore confirms the chosen
scale against the identity with one true forward, or by what error feedback loses with each.

Shapes: O out_features, I in_features, G groups along I, g group size, S candidates
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from compress import numerics
from compress.scheme import Scheme

# The search ranks candidates by a loss that is a sum over rows, so a sample will do: over the 24 groups of the
# reference model, the scale chosen on 512 rows loses 0.1 % more than the one chosen on all, on 256 0.6 %, on 128 1.1 %.
SEARCH_ROWS = 512
COARSE_RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FINE_STEPS = (-0.15, -0.10, -0.05, 0.05, 0.10, 0.15)
# Weights that a GPU tries scales on at once: for small layers a launch costs more than its work. A CPU tries one scale
# after the other, whose rows stay in its cache.
_AT_ONCE = 2**24


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

    def tried(candidates: Sequence[tuple[float, bool]]) -> list[ScaleChoice]:
        scales_SI = scales_of(x_I, w_I, candidates)
        return [
            ScaleChoice(s_I=s_I, ratio=ratio, duo=duo, error=error, identity_error=identity_error)
            for s_I, (ratio, duo), error in zip(scales_SI, candidates, errors_of(scales_SI), strict=True)
        ]

    at_once = max(1, _AT_ONCE // rows.numel()) if rows.is_cuda else 1
    errors_of = partial(rounding_errors, rows, gram_II=gram_II, scheme=scheme, at_once=at_once)
    ones = torch.ones_like(x_I)
    (identity_error,) = errors_of(ones.unsqueeze(0))
    identity = ScaleChoice(s_I=ones, ratio=0.0, duo=False, error=identity_error, identity_error=identity_error)
    coarse = [(ratio, duo) for duo in (False, True) for ratio in COARSE_RATIOS if duo or ratio]
    by_error = attrgetter("error")
    best = min([identity, *tried(coarse)], key=by_error)  # of equals the first
    around = [(round(best.ratio + step, 2), best.duo) for step in FINE_STEPS]
    fine = [(ratio, duo) for ratio, duo in around if 0 <= ratio <= 1 and (duo or ratio)]
    return min([best, *tried(fine)], key=by_error)


def rounding_errors(
    rows_OI: Tensor, scales_SI: Tensor, gram_II: Tensor, scheme: Scheme, *, at_once: int = 1
) -> list[float]:
    """`output_error` of the rows rounded to nearest under each of the scales, so many of them at once."""
    found = []
    for s_SI in scales_SI.split(at_once):
        s_S1I = s_SI.unsqueeze(1)
        scaled_OI = (rows_OI * s_S1I).flatten(0, 1)  # of every scale all rows, one scale's below the other's
        rounded_SOI = numerics.round_to_nearest(scaled_OI, scheme).unflatten(0, (len(s_SI), -1))
        delta_SOI = (rounded_SOI / s_S1I).sub_(rows_OI)
        errors = row_errors(delta_SOI.flatten(0, 1), gram_II).reshape(len(s_SI), -1)
        found.append(errors.sum(dim=1, dtype=torch.float64))
    return torch.cat(found).tolist()


def sampled_rows(w_OI: Tensor, most: int = SEARCH_ROWS) -> Tensor:
    """At most so many rows, evenly spread. A view."""
    return w_OI[:: -(-len(w_OI) // most)]


def scales_of(x_I: Tensor, w_I: Tensor, candidates: Sequence[tuple[float, bool]]) -> Tensor:
    """For each candidate `(r, duo)` the scale `x**r`, or with duo `x**r / w**(1 - r)`; so that max(s) * min(s) = 1.

    Channels that never fire (x = 0) or are never read keep the scale of the smallest positive magnitude. `[S, I]`
    """
    x_I, w_I = _floored(x_I), _floored(w_I)
    s_SI = torch.stack([x_I.pow(r) / w_I.pow(1 - r) if duo else x_I.pow(r) for r, duo in candidates])
    s_SI = s_SI / (s_SI.amax(dim=1, keepdim=True) * s_SI.amin(dim=1, keepdim=True)).sqrt()
    # float16 holds norm / s and W * s only within reason; the paper's own clamp is 1e-4.
    return s_SI.clamp(1e-4, 1e4)


def _floored(x_I: Tensor) -> Tensor:
    least = x_I.mean().double().mul(1e-4).clamp(min=1e-12)  # stays where it is: to read it would be to wait for it
    return torch.maximum(x_I, least.to(x_I.dtype))


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
