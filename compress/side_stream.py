"""A stream of its own for work before a CUDA graph is captured, which must not be on the default one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, what is done inside is done on a stream of its own, in order with what lies before and behind."""
    if device.type != "cuda":
        yield
        return
    before, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(before)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        before.wait_stream(side)
