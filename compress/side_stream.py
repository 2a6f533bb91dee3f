"""What captures of CUDA graphs share: a stream that is not the default one, and why a capture broke."""

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


def first_cause(error: BaseException) -> str:
    """In one line: what broke a capture, and not that it was broken when it was ended."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0] or type(error).__name__
