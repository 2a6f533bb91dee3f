"""How far models' predictions lie from the original's, given what leaves their last blocks.

Shapes: B batch, T tokens, H hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.model import StreamedModel

Batches = list[Tensor]
# Positions whose logits exist at once, of the original and of one other.
_CHUNK = 256


@torch.no_grad()
def divergences(model: StreamedModel, original: Batches, others: Sequence[Batches], times: float = 1.0) -> list[float]:
    """Mean KL divergence, in nats a token, of each model's predictions from the original's, given final hidden states.

    times: what the others' logits are multiplied by. Logits of `_CHUNK` positions exist at once, of two models.
    """
    totals = [0.0] * len(others)
    tokens = 0
    with model.head_loaded():
        for i, hidden in enumerate(original):
            flat = hidden.flatten(0, 1)
            for start in range(0, len(flat), _CHUNK):
                part = slice(start, start + _CHUNK)
                log_p = model.head(flat[None, part])[0].float().log_softmax(-1)
                for k, other in enumerate(others):
                    logits = model.head(other[i].flatten(0, 1)[None, part])[0].float()
                    log_q = logits.mul_(times).log_softmax(-1)
                    totals[k] += _summed(log_p, log_q)
                tokens += len(log_p)
    return [total / tokens for total in totals]


@torch.no_grad()
def head_divergence(model: StreamedModel, original: Batches, weight_VH: Tensor) -> float:
    """The same of the model whose output matrix is `weight_VH`, its final hidden states those of the original."""
    total, tokens = 0.0, 0
    with model.head_loaded():
        for hidden in original:
            for part in hidden.flatten(0, 1).split(_CHUNK):
                log_p = model.head(part[None])[0].float().log_softmax(-1)
                with model.head_of(weight_VH):
                    log_q = model.head(part[None])[0].float().log_softmax(-1)
                total += _summed(log_p, log_q)
                tokens += len(part)
    return total / tokens


def _summed(log_p: Tensor, log_q: Tensor) -> float:
    """Divergence of log-probabilities `[tokens, V]`, summed over the tokens."""
    return float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
