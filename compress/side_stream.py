"""A stream of its own for work before a CUDA graph is captured, which must not be on the default one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, what is done inside is done on a stream of its own, in order with what lies before and behind.

    It is one stream for all: memory that is freed there is kept for that stream, and of no use to another.
    """
    if device.type != "cuda":
        yield
        return
    before, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(before)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        before.wait_stream(side)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
