"""Rotary position tables.

Source: RoFormer (Su et al., 2021, section 3.4.2) for the frequencies; linear scaling is position interpolation (Chen et
al., 2023); `llama3` is the scaling that Meta published with Llama 3.1.

Shapes: S positions, F rotated pairs (`dims / 2`)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from exporters.trt.graph.architecture import Rope

Floats = npt.NDArray[np.float32]


def frequencies(rope: Rope) -> Floats:
    """Radians a token `[F]`: `theta ** (-2 i / dims)`, scaled. In float32 throughout, as transformers has them."""
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    plain: Floats = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        # a frequency is kept when it turns more than high_freq_factor times within the original context, divided
        # when it turns less than low_freq_factor times, and blended between
        turns = rope.original_context * plain / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        blended: Floats = (kept * plain + (1 - kept) * plain / rope.factor).astype(np.float32)
        return blended
    return plain


def tables(rope: Rope, num_positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines, float32 `[S, F]`."""
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * frequencies(rope)[None, :]
    return np.cos(angles), np.sin(angles)
