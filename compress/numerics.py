"""Uniform quantization of weights: ranges, codes and back. Pure tensors in, tensors out.

Shapes: O out_features, I in_features, G groups along I, g = I / G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress.scheme import Scheme

# The smallest normal float16. A subnormal scale has too few mantissa bits to carry a weight, and some
# GPU kernels flush it to zero, so no group gets a smaller one.
MIN_SCALE = 2.0**-14
MAX_SCALE = 65504.0


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Let float32 matrix products on a GPU round their inputs to TF32 (10 bits of mantissa) inside the context.

    For sums over a whole layer whose only use is to rank candidates or to be reported: on an H100, with the reference
    model, no choice and no code changed and the summed error moved by 5e-6 of itself. Not for proofs of folds, whose
    tolerance is as fine as TF32's error: with TF32 there as well, 5 of 24 choices changed. Nothing changes on a CPU.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def mean_of(x: Tensor) -> float:
    """Mean of all values, the same for any number of threads: those share out a sum over everything, not one a row."""
    return math.fsum(x.reshape(-1, x.shape[-1]).sum(-1, dtype=torch.float64).tolist()) / max(1, x.numel())


def add_by_index_(total_K: Tensor, index_I: Tensor, value_I: Tensor) -> Tensor:
    """Add each value at its index, in place, in the order of the values; indices may repeat. Returns `total_K`.

    A GPU's own `index_add_` adds where an index repeats in the order in which its threads come, so that the last bit
    differs from run to run: three heads that share a scale are enough. Vectors are short, so the CPU adds them.
    """
    if not total_K.is_cuda:
        return total_K.index_add_(0, index_I, value_I)
    return total_K.copy_(total_K.cpu().index_add_(0, index_I.cpu(), value_I.cpu()))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, let operations that have an implementation of fixed order take it inside the context.

    The backward pass of fused attention sums with atomic operations otherwise. Nothing changes on a CPU, whose
    operations have one order anyhow.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # we read nothing that was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def to_groups(w_OI: Tensor, scheme: Scheme) -> Tensor:
    """View `[O, I]` as `[O, G, g]`."""
    num_groups = scheme.groups(w_OI.shape[1])
    return w_OI.reshape(w_OI.shape[0], num_groups, -1)


def range_of(w_OGg: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each group, widened to contain zero. float, `[O, G]` each.

    A range that leaves zero out (an all-positive group) has no representable zero point; the AutoAWQ
    reference saturates there. Widening costs nothing in the file format.
    """
    lo = w_OGg.amin(dim=-1).clamp(max=0.0)
    hi = w_OGg.amax(dim=-1).clamp(min=0.0)
    return lo, hi


def round_scale(scale: Tensor) -> Tensor:
    """The scale as the file will hold it: float16 values, returned in float32, never zero nor subnormal."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.float16).to(torch.float32)


def wanted_scale(lo: Tensor, hi: Tensor, scheme: Scheme) -> Tensor:
    """The scale that covers `[lo, hi]` as it would be without the file's limits; see `scale_and_zero`."""
    if scheme.symmetric:
        return torch.maximum(-lo, hi) / scheme.symmetric_zero_point
    return (hi - lo) / scheme.max_code


def scale_and_zero(lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover `[lo, hi]` (which contains 0); float32, zero points integral.

    Asymmetric: `scale = (hi - lo) / max_code`, `zero_point = round(-lo / scale)`. Symmetric:
    `scale = max(-lo / 2**(b-1), hi / (2**(b-1) - 1))` would never clip; the field instead uses
    `amax / 2**(b-1)`, which clips one code of one side and is measurably better (10.55 against 11.73 %
    relative error on Gaussian weights), and a searched range decides the rest.
    """
    scale = round_scale(wanted_scale(lo, hi, scheme))
    if scheme.symmetric:
        return scale, torch.full_like(scale, scheme.symmetric_zero_point)
    return scale, (-lo / scale).round().clamp(0, scheme.max_code)


def range_factors(scheme: Scheme, lowest: float, steps: int) -> list[float]:
    """What a search multiplies a group's full range by: `steps` equal steps from 1 down to `lowest`.

    Symmetric codes reach one further below zero than above, so their full range (`scale_and_zero`) cuts off the largest
    weight where that is positive. There, as many steps of that size as fit lead up to the range that cuts off nothing,
    `2**(b-1) / (2**(b-1) - 1)`: 5 with 4 bits, none with 8.
    """
    factors = [1 - (1 - lowest) * i / steps for i in range(steps + 1)]
    if not scheme.symmetric:
        return factors
    room = scheme.symmetric_zero_point / (scheme.max_code - scheme.symmetric_zero_point) - 1
    more = int(room * steps / (1 - lowest))
    return factors + [1 + room * i / more for i in range(1, more + 1)]


def quantize(w_OGg: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Codes of each weight, `clamp(round(w / scale) + zero_point, 0, max_code)`; float, same shape as `w`.

    Rounds half to even, as AutoAWQ's packer does. `scale` and `zero_point` broadcast over the last axis.
    """
    q = (w_OGg / scale.unsqueeze(-1)).round_().add_(zero_point.unsqueeze(-1))
    return q.clamp_(0, scheme.max_code)


def dequantize(q_OGg: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`(q - zero_point) * scale`, same shape as `q`."""
    return (q_OGg - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)


def fake_quantize(w_OGg: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """What `w` becomes after being quantized and read back; same shape and dtype."""
    return dequantize(quantize(w_OGg, scale, zero_point, scheme), scale, zero_point)


def round_to_nearest(w_OI: Tensor, scheme: Scheme) -> Tensor:
    """Plain min-max round-to-nearest of a whole weight, dequantized: the floor that every method must beat."""
    w_OGg = to_groups(w_OI, scheme)
    scale, zero_point = scale_and_zero(*range_of(w_OGg), scheme)
    return fake_quantize(w_OGg, scale, zero_point, scheme).reshape(w_OI.shape)
