"""Rows of one text each, and transformers told so: it looks for packed rows in each forward pass, and there the host
waits until a GPU has done all that it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compress.distill.rows import Batch

LOOK = "find_packed_sequence_indices"


@contextmanager
def as_known(batch: Batch) -> Iterator[None]:
    """Around a forward pass: no look for packed rows where the batch has none, whose positions are not given."""
    from transformers import masking_utils

    look = getattr(masking_utils, LOOK, None)
    if batch.positions_BT is not None or look is None:
        yield
        return
    setattr(masking_utils, LOOK, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, LOOK, look)
