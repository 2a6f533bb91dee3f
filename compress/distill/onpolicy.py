"""Text that the student writes, for the teacher to correct: what the student will meet when it runs by itself.

Generalised knowledge distillation (Agarwal et al., arXiv:2306.13649): a share of the updates learns from the student's
own continuations. Here the first quarter of a row is the data's and the rest is drawn from the student at temperature
1; the divergence is taken over what was drawn. Draws depend on (seed, update, place in it) alone, so a resumed run
repeats them.

Shapes: B rows, T tokens, P = B * T, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from compress.distill.rows import Batch
from compress.losses.in_blocks import IGNORED

PROMPT = 0.25


def is_on_policy(step: int, share: float) -> bool:
    """Whether update `step` learns from the student's text: evenly spread, `share` of all."""
    return int((step + 1) * share) > int(step * share)


def uniforms(step: int, places: Sequence[int], seq_len: int, seed: int) -> Tensor:
    """What the draws of some rows start from: float64 `[B, T]` in [0, 1)."""
    streams = [np.random.Generator(np.random.PCG64([seed, step, place])).random(seq_len) for place in places]
    return torch.from_numpy(np.stack(streams))


@torch.no_grad()
def rewrite(model: nn.Module, batch: Batch, uniform_BT: Tensor, num_ids: int) -> tuple[Batch, Tensor]:
    """The batch with its rows continued by `model`, and which tokens to count `[P]`: predictions of drawn ones.

    num_ids: ids that may be drawn. Positions run through, as the continuation belongs to the text before it.
    """
    seq_len = batch.ids_BT.shape[1]
    prompt = max(1, int(PROMPT * seq_len))
    ids_BT = batch.ids_BT.clone()
    uniform_BT = uniform_BT.to(ids_BT.device)
    cache, fed = None, ids_BT[:, :prompt]
    for place in range(prompt, seq_len):
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        cumulative_BV = out.logits[:, -1, :num_ids].double().softmax(-1).cumsum(-1)
        target_B1 = uniform_BT[:, place, None] * cumulative_BV[:, -1:]
        drawn_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=num_ids - 1)
        ids_BT[:, place] = drawn_B1[:, 0]
        fed = drawn_B1
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT[:, : prompt - 1] = ids_BT[:, 1:prompt]  # what the student wrote is no truth
    counted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    counted_BT[:, prompt - 1 : seq_len - 1] = True
    return replace(batch, ids_BT=ids_BT, labels_BT=labels_BT, positions_BT=None), counted_BT.flatten()
