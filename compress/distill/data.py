"""What a student reads: texts cut into rows, several sources in given shares, some of it written by the teacher itself.

Documents are joined and cut; a row may hold the end of one and the beginning of the next. For a distillation that is no
fault: teacher and student read the same row, so the teacher's distribution is the right target whatever stands before.
Where documents begin is recorded all the same, and `isolate` reads each as a text of its own (positions and attention
start anew), at the price of attention kernels that need an explicit mask.

Shapes: N rows, T tokens in a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compress.chat import Rendered, render
from compress.distill.rows import ROWS, Rows, RowsWriter, shares
from compress.errors import ConfigError
from compress.long_text import WINDOW, ids_of, token_ids
from compress.passages import passages
from compress.texts import Purpose, Tally, documents, source_sha256
from compress.tokens import begin_id, ids_sha256, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SELF = "self"
TRAINING = Purpose(
    "training", "pass --data FILE.txt (or .jsonl, .parquet), --data hf:DATASET:SPLIT:COLUMN or --data self"
)
# Tokens of a source whose passages are kept in the manifest.
SKETCHED_TOKENS = 4_000_000
# Texts handed to the tokenizer together.
TOKENIZED_AT_ONCE = 256
# (number of rows) -> int64 `[N, T]` on the CPU, sampled from the teacher
Sample = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Sources (text files, hf:... or `self`) and their weights, one each, any positive sum."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, sources: Sequence[str], weights: str | None) -> Mix:
        """weights: as typed, `3,1`; None for equal shares. ConfigError when they do not fit the sources."""
        if weights is None:
            return cls(sources=tuple(sources), weights=(1.0,) * len(sources))
        try:
            values = tuple(float(w) for w in weights.split(","))
        except ValueError:
            raise ConfigError(f"--mix {weights} is not a list of numbers; write it as --mix 3,1") from None
        if len(values) != len(sources) or not all(0 < w < float("inf") for w in values):
            raise ConfigError(
                f"--mix {weights} gives {len(values)} shares for {len(sources)} sources, and all must be positive; "
                "give one for each --data, in their order"
            )
        return cls(sources=tuple(sources), weights=values)


def build(
    mix: Mix,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    num_rows: int | None,
    seq_len: int,
    vocab_size: int,
    sample: Sample | None = None,
    fewer: bool = False,
) -> Rows:
    """Write the rows of a mix into `folder`: `num_rows` of them, or, with None, all that one source gives.

    Raises ConfigError when a source gives fewer rows than its share (unless `fewer` will do), naming how many tokens
    there are.
    """
    refuse_endless(mix, num_rows)
    wanted = [None] if num_rows is None else shares(num_rows, mix.weights)
    writer = RowsWriter(folder, seq_len, begin_id(tokenizer))
    facts = []
    for source, weight, count in zip(mix.sources, mix.weights, wanted, strict=True):
        before = writer.num_rows
        if source == SELF:
            assert sample is not None and count is not None
            found = _sampled(writer, sample(count), tokenizer)
        else:
            found = _read(writer, source, tokenizer, None if count is None else before + count, vocab_size)
        rows = writer.num_rows - before
        if rows == 0 or (count is not None and rows < count and not fewer):
            _refuse_short(source, rows, count, seq_len, found["num_tokens_total"], len(mix.sources))
        facts.append({**found, "weight": weight, "num_rows": rows})
    return writer.finish([_with_passages(folder, fact, seq_len, tokenizer) for fact in facts])


def refuse_endless(mix: Mix, num_tokens: int | None) -> None:
    """ConfigError for sources that do not end of themselves, or are to be mixed, when nothing says how much of them."""
    if num_tokens is None and (len(mix.sources) > 1 or mix.sources[0] == SELF or mix.sources[0].startswith("hf:")):
        raise ConfigError("--tokens is needed with several sources, with hf:... and with self; pass --tokens 1000000")


def _with_passages(
    folder: Path, fact: dict[str, Any], seq_len: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a manifest keeps of a text, so that nothing is judged on it later; see `passages`."""
    first = fact.pop("first_row")
    ids = np.fromfile(
        folder / ROWS, dtype="<i4", offset=4 * first * seq_len, count=min(fact["num_rows"] * seq_len, SKETCHED_TOKENS)
    )
    text = text_of(tokenizer, torch.from_numpy(ids.astype(np.int64)))
    return {**fact, "passages": passages(text).to_json()}


def _read(
    writer: RowsWriter, source: str, tokenizer: PreTrainedTokenizerBase, most: int | None, vocab_size: int
) -> dict[str, Any]:
    ahead = _Ahead(documents(source, purpose=TRAINING, render=partial(render, tokenizer)), tokenizer)
    tally = Tally(ahead)
    total, first_row = 0, writer.num_rows
    for ids, begins in _pieces(tally, ahead):
        if begins:
            writer.begin()
        total += len(ids)
        if ids and max(ids) >= vocab_size:
            raise ConfigError(
                f"the tokenizer gives id {max(ids)}, the models' common vocabulary has {vocab_size} entries; use the "
                "tokenizer that belongs to them"
            )
        writer.take(ids, most=most)
        if most is not None and writer.num_rows >= most:
            break
    return {
        "source": source if source.startswith("hf:") else f"file:{source}",
        "text_sha256": tally.sha256(),
        "source_sha256": source_sha256(source),
        "num_documents": tally.count,
        "num_tokens_total": total,
        "num_tokens_unused": writer.end_source(),
        "first_row": first_row,
    }


class _Ahead:
    """Texts one by one, tokenized some at a time, as a tokenizer with threads does quickest; `ids` is of the last."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.marks_documents = bool(token_ids(tokenizer, "", special=True))
        self.ids: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[str]:
        texts = iter(self.texts)
        while some := list(islice(texts, TOKENIZED_AT_ONCE)):
            short = {kind: [t for t in some if self._is_short(t) and self._marked(t) == kind] for kind in (True, False)}
            found = {kind: iter(self._all(of_kind, kind)) for kind, of_kind in short.items()}
            for text in some:
                marked = self._marked(text)
                if self._is_short(text):
                    self.ids = [next(found[marked])]
                else:
                    self.ids = ids_of(self.tokenizer, text, special=marked)
                yield text

    def _marked(self, text: str) -> bool:
        """Whether the tokenizer's special tokens are put around a text: not around a chat, which has its own."""
        return self.marks_documents and not isinstance(text, Rendered)

    def _is_short(self, text: str) -> bool:
        return len(text) <= WINDOW

    def _all(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special, verbose=False).input_ids
        return ids


def _pieces(texts: Iterable[str], ahead: _Ahead) -> Iterator[tuple[list[int], bool]]:
    """The documents' ids in pieces, and whether a document begins with each; special tokens as in `tokens.pack`.

    texts: those of `ahead`, counted by whoever asks.
    """
    end_of_text = ahead.tokenizer.eos_token_id
    separator = [] if ahead.marks_documents or end_of_text is None else [int(end_of_text)]
    first = True
    for text in texts:
        if not text:
            continue
        if not first and not isinstance(text, Rendered):
            yield separator, False
        begins = True
        for piece in ahead.ids:
            if piece:
                yield piece, begins
                begins = False
        first = False


def _sampled(writer: RowsWriter, ids_NT: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Rows that the teacher wrote; a new text begins behind each end-of-text token."""
    end_of_text, first_row = tokenizer.eos_token_id, writer.num_rows
    for row in ids_NT.tolist():
        ends = [i + 1 for i, token in enumerate(row[:-1]) if token == end_of_text and i]
        for start, stop in zip([0, *ends], [*ends, len(row)], strict=True):
            writer.begin()
            writer.take(row[start:stop])
    writer.end_source()
    return {
        "source": SELF,
        "text_sha256": ids_sha256(ids_NT),
        "source_sha256": None,
        "num_documents": len(ids_NT),
        "num_tokens_total": ids_NT.numel(),
        "num_tokens_unused": 0,
        "first_row": first_row,
    }


def _refuse_short(source: str, rows: int, asked: int | None, seq_len: int, tokens: int, sources: int) -> None:
    if rows == 0:
        shorter = f"--seq-len {1 << (tokens.bit_length() - 1)}, or more text" if tokens else "more text"
        raise ConfigError(f"{source} gives {tokens} tokens, and one row needs {seq_len}; pass {shorter}")
    assert asked is not None
    fewer = f"--tokens {rows * seq_len}" if sources == 1 else "fewer --tokens, or a smaller share in --mix"
    raise ConfigError(
        f"{source} gives {rows * seq_len} tokens in rows of {seq_len}, and {asked * seq_len} of it are asked for; pass "
        f"{fewer}, more text, or --epochs {-(-asked // rows)} to read it more than once"
    )
