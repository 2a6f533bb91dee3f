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


def test_prediction_against_what_autograd_keeps(pair: Pair) -> None:
    """Measured on two short rows; a row of other length keeps as much a token, and no parameters."""
    loaded = models.load(pair[0], dtype=torch.float32)
    loaded.model.requires_grad_(True)
    seen: dict[int, int] = {}
    own = {p.data_ptr() for p in loaded.model.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = loaded.base(input_ids=torch.arange(100)[None], use_cache=False).last_hidden_state
    predicted, _ = memory.probe(loaded.model, loaded.base, 3, loaded.hidden_size, torch.float32)
    del out
    assert abs(sum(seen.values()) / 100 - predicted) < 0.02 * predicted
