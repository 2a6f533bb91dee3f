"""Attention of one query a row over a cache that holds whole rows.

The fused kernels are made for many queries: with one they compute a tile of them, and keys and values that several
heads share are copied for each. Here the heads of a group are the rows of one matrix product, so keys and values are
read once.

Shapes: B rows, H heads, K key heads, Q heads that share one, S places of the cache, D head size
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "one_query"


@contextmanager
def one_query(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by `attend` inside the context, if it attends by SDPA outside."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: nn.Module,
    query_BH1D: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """As transformers calls attention: `[B, 1, H, D]`, and no weights.

    attention_mask: `[B or 1, 1, 1, S]`, bool (what is seen) or added to the scores; None: all of the cache is seen.
    NotImplementedError for anything else that a model asks of its attention.
    """
    rows, heads, queries, size = query_BH1D.shape
    asked = [name for name in ("softcap", "s_aux", "sinks", "position_bias") if rest.get(name) is not None]
    if queries != 1 or (attention_mask is not None and attention_mask.shape[1] != 1):
        asked.append(f"{queries} queries, or a mask of each head")
    if asked:
        raise NotImplementedError(f"attention of one query knows no {', '.join(asked)}")
    query_BKQD = query_BH1D.reshape(rows, key_BKSD.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    score_BKQS = (query_BKQD @ key_BKSD.transpose(-1, -2)).float()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        score_BKQS.masked_fill_(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        score_BKQS += attention_mask
    out_BKQD = score_BKQS.softmax(-1).to(value_BKSD.dtype) @ value_BKSD
    return out_BKQD.reshape(rows, heads, 1, -1).transpose(1, 2), None
