"""Judge a quantized model inside the quantizer's own process, its activation quantizers on.

A dense copy of the weights, which `dense.py` writes, hides what rounding the inputs costs. So the model is run as its
own library runs it, beside the original, on windows of token ids: EVAL.npz holds one int64 `[windows, tokens]` a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

BATCH = 2


def judge(model: Any, original: Any, texts: Path) -> dict[str, dict[str, list[float]]]:
    """Text -> `nll` and `base_nll` of each window (nats a predicted token), `kl` from the original's predictions (mean
    over its tokens), `same_top` (share of tokens with the same most likely next one)."""
    import torch

    out: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode(), np.load(texts) as found:
        for name in found.files:
            rows: dict[str, list[float]] = {"nll": [], "base_nll": [], "kl": [], "same_top": []}
            for batch in torch.from_numpy(found[name]).split(BATCH):
                for window in batch.to(next(original.parameters()).device):
                    logp = [
                        m(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                        for m in (model, original)
                    ]
                    gold = window[1:, None]
                    rows["nll"].append(-float(logp[0].gather(1, gold).mean()))
                    rows["base_nll"].append(-float(logp[1].gather(1, gold).mean()))
                    rows["kl"].append(float((logp[1].exp() * (logp[1] - logp[0])).sum(-1).mean()))
                    rows["same_top"].append(float((logp[0].argmax(-1) == logp[1].argmax(-1)).float().mean()))
            out[name] = rows
    return out
