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
