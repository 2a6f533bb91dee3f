"""Perplexity: `exp` of the mean over windows of the mean NLL of the T-1 predicted tokens, float32, T = 512.

The first 200 windows are the definition behind the reference model's published 20.186.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

WINDOW = 512
BATCH = 10  # windows a forward; a larger batch is no faster on a CPU

# sha256 of model.safetensors and of the evaluation text -> perplexity over the first 200 windows.
# Source: README.md of the reference model, three decimals.
PUBLISHED = {
    (
        "2e3d79ed1f4fd102b5182168aa8101b1b7b97d7907c665a916dfb2d29e6fe504",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    ): 20.186,
}


class Perplexity(NamedTuple):
    """One text, one model; `gap` is over FP16 and `gap_error` its paired standard error over windows."""

    ppl: float
    gap: float
    gap_error: float


def window_nll(model: Path, encode: Any, text: Path, most: int, device: str) -> list[float]:
    """Mean NLL (nats a token) of each of the first `most` windows of WINDOW tokens.

    encode: a tokenizer. The text is tokenized line by line, as the calibration text is.
    """
    import torch
    from transformers import AutoModelForCausalLM

    lines = [line + "\n" for line in text.read_text(encoding="utf-8").split("\n")]
    ids = [i for line in encode(lines, add_special_tokens=False)["input_ids"] for i in line]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:most]
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
    nll: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(windows), BATCH):
            batch = windows[start : start + BATCH].to(device)
            logits = lm(batch, use_cache=False).logits[:, :-1].transpose(1, 2)
            nll += torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1).tolist()
    return nll


def perplexity(nll: Sequence[float], base: Sequence[float]) -> Perplexity:
    """Of windows `nll`, beside the same windows of FP16; the error is that of the paired difference."""
    count = len(nll)
    ppl, base_ppl = math.exp(sum(nll) / count), math.exp(sum(base) / count)
    rise = [a - b for a, b in zip(nll, base, strict=True)]
    mean = sum(rise) / count
    spread = math.sqrt(sum((r - mean) ** 2 for r in rise) / max(count - 1, 1) / count)
    return Perplexity(ppl=ppl, gap=ppl - base_ppl, gap_error=ppl * spread)
