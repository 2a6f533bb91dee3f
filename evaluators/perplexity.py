"""Perplexity of a candidate beside its reference, window by window, one decoder block in memory at a time.

Both models read the same windows of `[T]` tokens, without overlap and without a token added in front; the first token
of a window is context only. What is compared is paired: each window's own difference.

Shapes: N windows, B batch, T tokens, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.model import StreamedModel

BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Scores:
    """nll_N: mean negative log-likelihood of each window's T - 1 predicted tokens, nats, float64."""

    nll_N: Tensor
    tokens_per_window: int

    @property
    def perplexity(self) -> float:
        """exp of the mean over windows (all have the same number of predicted tokens)."""
        return math.exp(float(self.nll_N.mean()))


@torch.no_grad()
def window_nll(model: StreamedModel, ids_NT: Tensor, on_block: Callable[[int], None] = lambda index: None) -> Scores:
    """Negative log-likelihoods of every window. Raises ArtifactError naming the block where NaN first appears.

    Holds the windows' hidden states and one block; logits exist for one window at a time, `[1, T, V]`.
    """
    batch = max(1, BATCH_TOKENS // ids_NT.shape[1])
    hidden = [model.embed(part) for part in ids_NT.split(batch)]
    for index in range(model.num_blocks):
        model.load_block(index)
        for i, h in enumerate(hidden):
            hidden[i] = model.run_block(index, h)
            if not bool(torch.isfinite(hidden[i]).all()):
                raise ArtifactError(
                    f"{model.checkpoint.path}: {model.block_prefix(index).rstrip('.')} is the first block whose "
                    "output is not finite; the artifact is damaged or overflows in this dtype"
                )
        model.release_block(index)
        on_block(index)
    with model.head_loaded():
        nll = [_nll(logits_TV, ids_T) for logits_TV, ids_T in _logits(model, hidden, ids_NT)]
    return Scores(nll_N=torch.tensor(nll, dtype=torch.float64), tokens_per_window=ids_NT.shape[1] - 1)


def _logits(model: StreamedModel, hidden: list[Tensor], ids_NT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    row = 0
    for batch in hidden:
        for h in batch.split(1):
            yield model.head(h)[0], ids_NT[row].to(h.device)
            row += 1


def _nll(logits_TV: Tensor, ids_T: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:]))
