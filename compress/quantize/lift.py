"""Weights far below what float16 scales can hold: a power of two moves between a group and its producer.

A norm times 2**13 and the linears behind it times 2**-13 compute the same, but the scales of such linears lie below the
smallest normal float16, and every code becomes zero. Where a fold is proven, the producer can take the factor back:
multiplying by a power of two changes no bit of a mantissa.

Shapes: O out_features, I in_features, G groups along I, g group size
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compress import numerics
from compress.scheme import Scheme

# The share of a layer's squared weights that may lie below the floor before it matters.
NEGLIGIBLE = 1e-3
# A lifted layer's scales stand so many times above the floor: the search that follows may shrink columns again.
HEADROOM = 2.0**6
# Never so far up that scales come near the largest float16.
HIGHEST = 2.0**10
# What all squared weights add up to where shares of them are counted.
_WHOLE = 2**52


def lift_of(weights: Sequence[Tensor], scheme: Scheme) -> float:
    """The power of two that a group's columns need, 1.0 for weights of any usual size.

    weights: float32 `[O, I]` each, the group's linears. The layer that needs most decides, as far as none gets scales
    beyond `HIGHEST`.
    """
    scales = [_scales(w, scheme) for w in weights]
    lows = [_low_end(*s) for s in scales]
    lowest = min((low for low in lows if low > 0), default=numerics.MIN_SCALE)
    if lowest >= numerics.MIN_SCALE:
        return 1.0
    top = max(float(scale.max()) for scale, _ in scales)
    return _power(min(numerics.MIN_SCALE * HEADROOM / lowest, HIGHEST / top))


def room_of(weight: Tensor, scheme: Scheme) -> float:
    """By what power of two a producer's weight can be divided and still be held; at least 1.0.

    weight: float32, `[O, I]` of a linear that is quantized in `scheme`, or a norm's `[I]` (what it multiplies with),
    which float16 holds.
    """
    if weight.ndim == 1:
        low = float(weight.abs().median())
    else:
        low = _low_end(*_scales(weight, scheme))
    return max(1.0, _power(low / numerics.MIN_SCALE))


def _scales(w_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The scale that each group of a weight asks for, and its squared weights; flat."""
    w_OGg = numerics.to_groups(w_OI, scheme)
    scale = numerics.wanted_scale(*numerics.range_of(w_OGg), scheme)
    return scale.flatten(), w_OGg.double().square().sum(-1).flatten()


def _low_end(scale: Tensor, mass: Tensor) -> float:
    """The scale below which a negligible share of the weights lies; 0.0 where all are zero."""
    if not bool(mass.any()):
        return 0.0
    order = scale.argsort()
    # As integers: a GPU adds up runs of floats in another order every time.
    shares = (mass[order] * (_WHOLE / mass.sum())).to(torch.int64)
    sought = torch.tensor(int(NEGLIGIBLE * _WHOLE), device=shares.device)
    index = min(int(torch.searchsorted(shares.cumsum(0), sought)), len(order) - 1)
    return float(scale[order[index]])


def _power(factor: float) -> float:
    """The largest power of two that is not above `factor`."""
    return 2.0 ** math.floor(math.log2(factor)) if factor > 0 else 1.0
