"""Fold a scale into a loaded block, prove that the block still computes the same, or put everything back."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.block import LoadedBlock
from compress.groups import Group, apply_fold, keep, output_unchanged, restore, scale_columns
from compress.linear import is_linear, weight_OI


def fold_proven(
    loaded: LoadedBlock,
    group: Group,
    s_I: Tensor,
    row_scale: dict[str, Tensor],
    before: Tensor,
    store: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Multiply the group's columns by s and divide the producer by it. Changes the loaded weights.

    before: the block's output on the check rows with the weights as they are. store: what norms are rounded to. Returns
    the scale that is now in the columns (that of the rounded norm), or None where the block's output changed and the
    fold was undone; and the block's output with the weights as they then are. What the rows of a producing linear were
    divided by is noted in `row_scale`.
    """
    assert group.fold is not None
    module = loaded.module
    kept = keep(module, [group.fold.producer, *group.layers])
    actual = apply_fold(module, group.fold, s_I, store)
    for name in group.layers:
        scale_columns(module.get_submodule(name), actual)
    after = loaded.run()
    if output_unchanged(before, after, loaded.check_input):
        producer = module.get_submodule(group.fold.producer)
        if is_linear(producer):
            rows = torch.ones(weight_OI(producer).shape[0], device=actual.device)
            rows[group.fold.rows.to(actual.device)] = actual
            row_scale[group.fold.producer] = rows * row_scale.get(group.fold.producer, 1.0)
        return actual, after
    restore(module, kept)
    return None, before
