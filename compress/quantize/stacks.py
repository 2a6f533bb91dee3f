"""Layers that share their inputs are rounded as one stack, as far as memory allows."""

from __future__ import annotations

from collections.abc import Mapping

# Weights in a stack, at most: a dozen float32 copies of them are alive at once.
STACKED_WEIGHTS = 2**26


def stacks(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names of layers in runs that are rounded together, in their order: all at once, unless that takes too much.

    sizes: numbers in each layer's weight.
    """
    runs: list[list[str]] = []
    total = STACKED_WEIGHTS + 1
    for name, size in sizes.items():
        total += size
        if total > STACKED_WEIGHTS:
            runs.append([])
            total = size
        runs[-1].append(name)
    return runs
