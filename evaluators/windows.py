"""Text as windows of tokens to be scored: how long, how far apart, what stands in front, and from where on they count.

A window holds `context` tokens and starts `stride` tokens after the one before. Its tokens from position `min_context`
on are scored, those before are context only. So context=512, stride=512, min_context=1 scores nearly everything once,
context=2048, stride=512, min_context=1536 is the sliding window of many papers, and context=512, stride=512,
min_context=257 is what llama.cpp scores.

Shapes: S tokens of the text, T tokens of a window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from compress import tokens
from compress.calibration import read_stream
from compress.errors import ConfigError
from compress.positions import refuse_longer
from compress.runtime.runner import Tokens
from compress.sampling import sample_from_folder
from compress.tell import SILENT, Tell
from compress.texts import EVALUATION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
SAMPLING_SEED = 20251125


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
    source_sha256: str | None
    """Of the bytes of the file; None where there is no file."""
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
    device: str = "cpu",
    tell: Tell = SILENT,
) -> Windows:
    """The windows of a text (a file or `hf:` data set, as for calibration), from at most `max_tokens` tokens of it.

    spec may also be `self`: each window is then sampled from the original in the folder `model` (see `_sampled`), the
    only use of `device`. stride defaults to context, min_context to `context - stride` but at least 1, so that no
    token is scored twice. bos="auto" does what the tokenizer does in front of a text; begin-of-text before the first
    document is left out, since each window has its own or is to have none. Raises ConfigError for sizes that do not
    fit together or do not fit the model's positions, and when not one window fills.
    """
    stride, min_context = _sizes(context, stride, min_context)
    refuse_longer(model, context, "--context")
    if max_tokens < context - 1:
        raise ConfigError(f"--max-tokens {max_tokens} does not fill one window of {context} tokens; lower --context")
    if spec == "self":
        if stride != context or bos != "auto":
            raise ConfigError("--data self samples each window from its beginning; leave out --stride and --bos")
        return _sampled(model, tokenizer, context, min_context, max_tokens, device, tell)
    front = bos_id(tokenizer, bos)
    body = context - (front is not None)
    text = read_stream(spec, tokenizer, max_tokens=max_tokens + 1, vocab_size=vocab_size, purpose=EVALUATION)
    ids_S = text.ids_S
    begins = len(ids_S) and int(ids_S[0]) == tokens.begin_id(tokenizer)
    ids_S = ids_S[1:] if begins else ids_S[:max_tokens]
    sequences = cut(ids_S, body=body, step=min(stride, body), front=front, first=min_context - 1)
    if not sequences:
        shorter = f", or --context {1 << (len(ids_S).bit_length() - 1)}" if len(ids_S) > 1 else ""
        raise ConfigError(f"{text.source} gives {len(ids_S)} tokens, one window needs {body}; pass more text{shorter}")
    return Windows(
        sequences=sequences,
        context=context,
        stride=stride,
        min_context=min_context,
        bos=front is not None,
        source=text.source,
        text_sha256=text.text_sha256,
        source_sha256=text.source_sha256,
        ids_sha256=tokens.ids_sha256(ids_S[None]),
        num_bytes=_scored_bytes(tokenizer, sequences, min_context),
    )


def _sizes(context: int, stride: int | None, min_context: int | None) -> tuple[int, int]:
    """stride and min_context with their defaults filled in; ConfigError when they do not fit together."""
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
    return stride, min_context


def _sampled(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    min_context: int,
    max_tokens: int,
    device: str,
    tell: Tell,
) -> Windows:
    """Windows that the original wrote itself, from a seed that calibration does not use unless told to."""
    rows_NT = sample_from_folder(
        model,
        tokenizer,
        num_samples=max(1, max_tokens // context),
        seq_len=context,
        seed=SAMPLING_SEED,
        device=device,
        tell=tell,
    )
    sequences = [Tokens(ids_T=row_T, first=min_context - 1) for row_T in rows_NT]
    own = tokens.ids_sha256(rows_NT)
    return Windows(
        sequences=sequences,
        context=context,
        stride=context,
        min_context=min_context,
        bos=tokens.begin_id(tokenizer) is not None,
        source="self",
        text_sha256=own,
        source_sha256=None,
        ids_sha256=own,
        num_bytes=_scored_bytes(tokenizer, sequences, min_context),
    )


def _scored_bytes(tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Tokens], min_context: int) -> int:
    texts = [tokenizer.decode(s.ids_T[min_context:].tolist()) for s in sequences]
    return sum(len(text.encode("utf-8", errors="replace")) for text in texts)


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
    if bos == "never":
        return None
    if bos == "auto":
        return tokens.begin_id(tokenizer)
    if tokenizer.bos_token_id is None:
        raise ConfigError("--bos always: this tokenizer has no begin-of-text token; pass --bos never")
    return int(tokenizer.bos_token_id)
