"""What a run is predicted to need."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.distill import memory, models

Pair = tuple[Path, Path]


def test_weights_in_the_products_dtype_are_not_counted_for_every_token(pair: Pair) -> None:
    """Autocast keeps 16-bit copies of the weights for the backward pass, once a pass and not once a token."""
    loaded = models.load(pair[0], dtype=torch.float32)
    loaded.model.requires_grad_(True)
    whole, kept = (
        memory.probe(loaded.model, loaded.base, 3, loaded.hidden_size, dtype)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0.4 * whole < kept < whole


def test_weights_are_kept_whole_where_more_than_half_stays_free() -> None:
    """Two processes, a student and a teacher of 1000 parameters, blocks of 100: by hand."""
    needs = memory.Needs(
        trained=1000, frozen=0, compute_bytes=2, teacher_parameters=1000, teacher_bytes=2.0, tokens=0, token_bytes=0.0,
        kept_bytes=0.0, checkpointing=False, shares=2, on_gpu=True, gathered=100, teacher_gathered=100,
    )  # fmt: skip
    shared, whole = 8000 + 800 + 1000 + 200, 8000 + 800 + 4000 + 2000
    assert needs.total() == int(memory.MARGIN * shared)
    assert memory.has_room(needs, int(memory.MARGIN * whole / memory.ROOM) + 2)
    assert not memory.has_room(needs, int(memory.MARGIN * whole / memory.ROOM) - 2)
