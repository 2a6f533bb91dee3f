"""Text as windows of tokens to be scored: how long, how far apart, what stands in front, and from where on they count.

A window holds `context` tokens and starts `stride` tokens after the one before. Its tokens from position `min_context`
on are scored, those before are context only. So context=512, stride=512, min_context=1 scores nearly everything once,
context=2048, stride=512, min_context=1536 is the sliding window of many papers, and context=512, stride=512,
min_context=257 is what llama.cpp scores.

Shapes: S tokens of the text, T tokens of a window
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from compress import calibration, tokens
from compress.errors import ConfigError
from compress.runtime.runner import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of one text, in order. bos: whether a begin-of-text token stands in front of each (inside `context`)."""

    sequences: list[Tokens]
    context: int
    stride: int
    min_context: int
    bos: bool
    source: str
    text_sha256: str
    ids_sha256: str
    num_bytes: int
    """UTF-8 bytes of the scored tokens, for bits per byte."""

    def targets(self, index: int) -> Tensor:
        """Ids `[T - min_context]` of a window's scored tokens; position p is predicted after reading p - 1."""
        return self.sequences[index].ids_T[self.min_context :]

    @property
    def num_scored(self) -> int:
        return sum(len(s.ids_T) - self.min_context for s in self.sequences)


def load_windows(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    stride: int | None,
    min_context: int | None,
    bos: Bos,
    max_tokens: int,
    model: Path,
    vocab_size: int,
) -> Windows:
    """The windows of a text (a file or `hf:` data set, as for calibration), from at most `max_tokens` tokens of it.

    stride defaults to context, min_context to `context - stride` but at least 1, so that no token is scored twice.
    bos="auto" does what the tokenizer does in front of a text. Raises ConfigError for sizes that do not fit together,
    and when not one window fills.
    """
    stride = context if stride is None else stride
    least = max(1, context - stride)
    min_context = least if min_context is None else min_context
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride {stride} is not between 1 and the context of {context}; tokens would be left out")
    if not least <= min_context < context:
        raise ConfigError(
            f"--min-context {min_context} is outside {least}..{context - 1} for --context {context} --stride {stride}; "
            "tokens would be scored twice, or none at all"
        )
    front = bos_id(tokenizer, bos)
    body = context - (front is not None)
    if body < 1 or max_tokens < body:
        raise ConfigError(f"--max-tokens {max_tokens} does not fill one window of {context} tokens; lower --context")
    step = min(stride, body)
    text = calibration.load(
        spec,
        tokenizer,
        num_samples=max_tokens,
        seq_len=1,
        seed=0,
        model=model,
        is_reference=False,
        vocab_size=vocab_size,
    )
    ids_S = text.ids_NT.reshape(-1)
    sequences = cut(ids_S, body=body, step=step, front=front, first=min_context - 1)
    if not sequences:
        raise ConfigError(
            f"{text.source} gives {len(ids_S)} tokens, one window needs {body}; pass more text, or --context "
            f"{1 << (len(ids_S).bit_length() - 1)}"
        )
    scored = [tokenizer.decode(s.ids_T[min_context:].tolist()) for s in sequences]
    return Windows(
        sequences=sequences,
        context=context,
        stride=stride,
        min_context=min_context,
        bos=front is not None,
        source=text.source,
        text_sha256=text.text_sha256,
        ids_sha256=tokens.ids_sha256(ids_S[None]),
        num_bytes=sum(len(t.encode("utf-8", errors="replace")) for t in scored),
    )


def cut(ids_S: Tensor, *, body: int, step: int, front: int | None, first: int) -> list[Tokens]:
    """Every full window of `body` tokens, `step` apart, each with `front` before it if there is one."""
    out = []
    for start in range(0, len(ids_S) - body + 1, step):
        ids_T = ids_S[start : start + body]
        if front is not None:
            ids_T = ids_T.new_tensor([front, *ids_T.tolist()])
        out.append(Tokens(ids_T=ids_T, first=first))
    return out


def bos_id(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """The token to put in front of every window, or None. "auto" asks what the tokenizer puts before a text."""
    own = tokenizer.bos_token_id
    if bos == "never":
        return None
    if bos == "always":
        if own is None:
            raise ConfigError("--bos always: this tokenizer has no begin-of-text token; pass --bos never")
        return int(own)
    before = list(tokenizer("a", add_special_tokens=True).input_ids)
    return int(own) if own is not None and before[:1] == [own] else None
