"""Shapes of decoders, by the names that the decode benches take: sizes only, weights are random."""

from __future__ import annotations

# hidden, intermediate, layers, query heads, key heads, head size, vocabulary
SHAPES = {
    "reference-11m": (384, 1024, 6, 6, 2, 64, 4096),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152),
    "llama-1b": (2048, 8192, 16, 32, 8, 64, 128256),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256),
}


def group_size(shape: str) -> int:
    """Of 4-bit weights: what divides the columns of every linear."""
    return 64 if shape == "smollm2-135m" else 128
