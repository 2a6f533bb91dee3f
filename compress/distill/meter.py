"""How fast a run goes: tokens a second and model FLOPs utilisation, over the steps of this process."""

from __future__ import annotations

import time

# Steps whose time is not counted: kernels are chosen and compiled in them.
WARM_UP = 3


class Meter:
    """tokens: of a step, in all processes. flops: of a token. peak: operations a second of all processes' GPUs."""

    def __init__(self, tokens: int, flops: float, peak: float | None) -> None:
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self._steps = 0
        self._started = self._ended = time.monotonic()

    def step(self) -> None:
        """A step has ended."""
        self._steps += 1
        self._ended = time.monotonic()
        if self._steps == WARM_UP:
            self._started = self._ended

    @property
    def tokens_per_second(self) -> float | None:
        """None until it can be told. Up to the last step: what a run writes afterwards is not training."""
        counted = self._steps - WARM_UP
        elapsed = self._ended - self._started
        return counted * self.tokens / elapsed if counted > 0 and elapsed > 0 else None

    @property
    def mfu(self) -> float | None:
        """Share of the GPUs' peak, None where that is not known."""
        rate = self.tokens_per_second
        return None if rate is None or self.peak is None else rate * self.flops / self.peak

    def text(self) -> str:
        """`12,300 tokens/s, MFU 41.2 %`, or nothing yet."""
        rate = self.tokens_per_second
        if rate is None:
            return ""
        use = "" if self.mfu is None else f", MFU {100 * self.mfu:.1f} %"
        return f", {rate:,.0f} tokens/s{use}"
