"""Perplexity and KL divergence from the original on windows of a text, T = 512 tokens, everything float32.

Perplexity is `exp` of the mean over windows of the mean NLL of the T - 1 predicted tokens. Where the tokenizer begins
a text with BOS, so does every window. The first 200 windows are the definition behind the reference model's 20.186.
"""

# Shapes: N windows, B windows of a forward, T tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

WINDOW = 512
BATCH = 10  # windows a forward; a larger batch is no faster on a CPU
MOST_LOGITS = 2**28  # of a forward: fewer windows at a time with a large vocabulary

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


def windows(encode: Any, text: Path, first: int, most: int) -> torch.Tensor:
    """int64 [N, WINDOW]: the windows of the text from number `first` on, at most `most`.

    encode: a tokenizer. The text is tokenized line by line, as the calibration text is.
    """
    import torch

    from compress.tokens import begin_id

    lines = [line + "\n" for line in text.read_text(encoding="utf-8").split("\n")]
    ids = [i for line in encode(lines, add_special_tokens=False, verbose=False)["input_ids"] for i in line]
    front = begin_id(encode)
    own = WINDOW - (front is not None)
    ids_NT = torch.tensor(ids[: len(ids) // own * own]).view(-1, own)[first : first + most]
    if not len(ids_NT):
        raise SystemExit(f"{text} has {len(ids) // own} windows of {own} tokens, none from number {first} on")
    if front is not None:
        ids_NT = torch.cat([torch.full((len(ids_NT), 1), front), ids_NT], 1)
    return ids_NT


def losses(lm: Any, original: Any | None, ids_NT: torch.Tensor) -> dict[str, list[float]]:
    """Of each window: `nll`, nats a predicted token, and `kl` from the predictions of `original` (None: none)."""
    import torch

    out: dict[str, list[float]] = {"nll": [], "kl": []}
    with torch.inference_mode():
        for ids_BT in batches(ids_NT, lm):
            logits_BTV = lm(ids_BT, use_cache=False).logits[:, :-1]
            # not cross_entropy, which wants the vocabulary second: five times as long with 262,144 words
            nll_BT = logits_BTV.logsumexp(-1) - logits_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
            out["nll"] += nll_BT.mean(1).tolist()
            if original is not None:
                base_BTV = original(ids_BT, use_cache=False).logits[:, :-1]
                out["kl"] += [float(kl(ours, base).mean()) for ours, base in zip(logits_BTV, base_BTV, strict=True)]
    return out


def batches(ids_NT: torch.Tensor, lm: Any) -> Iterator[torch.Tensor]:
    fit = MOST_LOGITS // (ids_NT.shape[1] * lm.config.vocab_size)
    for ids_BT in ids_NT.split(max(1, min(BATCH, fit))):
        yield ids_BT.to(lm.device)


def kl(logits_TV: torch.Tensor, base_TV: torch.Tensor) -> torch.Tensor:
    """KL(base || model) of each position, nats: float32 [T]."""
    base_TV = base_TV.float().log_softmax(-1)
    return (base_TV.exp() * (base_TV - logits_TV.float().log_softmax(-1))).sum(-1)


def perplexity(nll: Sequence[float], base: Sequence[float]) -> Perplexity:
    """Of windows `nll`, beside the same windows of FP16; the error is that of the paired difference."""
    count = len(nll)
    ppl, base_ppl = math.exp(sum(nll) / count), math.exp(sum(base) / count)
    rise = [a - b for a, b in zip(nll, base, strict=True)]
    mean = sum(rise) / count
    spread = math.sqrt(sum((r - mean) ** 2 for r in rise) / max(count - 1, 1) / count)
    return Perplexity(ppl=ppl, gap=ppl - base_ppl, gap_error=ppl * spread)
