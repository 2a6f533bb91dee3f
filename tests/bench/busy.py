"""What a GPU does of some steps' time: kernels, messages to other GPUs with nothing beside them, nothing at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[float, float, str]
MESSAGES = "nccl"
TOP = 12


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what is covered by at least one span."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def shares(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Of spans (begin, end, name) in microseconds, in ms a step: from the first begin to the last end, and parts."""
    own = [(a, b) for a, b, name in spans if MESSAGES not in name.lower()]
    sent = [(a, b) for a, b, name in spans if MESSAGES in name.lower()]
    busy = union([*own, *sent])
    whole = max(b for _, b, _ in spans) - min(a for a, _, _ in spans)
    by_name: dict[str, float] = defaultdict(float)
    for a, b, name in spans:
        by_name[name] += b - a
    parts = {
        "whole": whole, "kernels": union(own), "messages": union(sent), "messages_alone": busy - union(own),
        "idle": whole - busy,
    }  # fmt: skip
    top = sorted(by_name.items(), key=lambda item: -item[1])[:TOP]
    return {
        **{name: round(value / steps / 1000, 3) for name, value in parts.items()},
        "top": {name[:90]: round(value / steps / 1000, 3) for name, value in top},
    }


class Watched:
    """A GPU's activity between two steps. `step` is to be called as each has ended."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.found: dict[str, Any] | None = None
        self._profiler: Any = None

    def step(self, number: float) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        if number == self.first:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()
        elif number == self.last:
            torch.cuda.synchronize()
            self._profiler.stop()
            spans = [
                (e.time_range.start, e.time_range.end, e.name)
                for e in self._profiler.events()
                if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
            ]
            self.found = shares(spans, self.last - self.first)
