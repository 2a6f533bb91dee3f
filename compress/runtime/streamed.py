"""A model folder read with torch, one decoder block in memory at a time, however long the text is.

What is kept of a sequence is its last hidden state at the positions that will be asked for; logits exist for the
positions and ids that are asked for, and of a large output matrix only the rows of these ids are in memory.

Shapes: B batch, T tokens, H hidden size, P positions kept of all sequences, V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.model import StreamedModel
from compress.runtime.runner import Span, Tokens
from compress.runtime.watch import Observed, Watch

BATCH_TOKENS = 2048
HIDDEN_BYTES = 2 << 30
# Bytes of logits that are worth having at once, for `POSITIONS` positions: the rest of the vocabulary comes after.
LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
POSITIONS = 512
_BUCKET = 16
_PADDING = torch.zeros(1, dtype=torch.int64)


class TorchRunner:
    """A Hugging Face folder: plain, AutoAWQ or compressed-tensors. See `compress.runtime.runner.Runner`."""

    runtime = "torch"

    def __init__(self, model: StreamedModel, on_block: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.model = model
        self.on_block = on_block

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        on_block: Callable[[int, int], None] = lambda done, total: None,
    ) -> TorchRunner:
        """on_block(done, total) is called after each block."""
        return cls(StreamedModel.open(path, device=device, dtype=dtype), on_block)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @torch.no_grad()
    def read(self, sequences: Sequence[Tokens], *, observe: int = 0) -> TorchReading:
        """Run every sequence through every block. The first `observe` sequences, which must be of one length, are
        watched: see `internals`."""
        kept = Kept.empty(sequences, self.model)
        watch = Watch()
        rounds = rounds_of(sequences, observe, self.hidden_size, HIDDEN_BYTES)
        total = len(rounds) * self.model.num_blocks
        for number, batches in enumerate(rounds):
            self._round(batches, sequences, observe if number == 0 else 0, kept, watch, number, total)
        return TorchReading(self.model, kept, watch.observed())

    def _round(
        self,
        batches: list[list[int]],
        sequences: Sequence[Tokens],
        observe: int,
        kept: Kept,
        watch: Watch,
        number: int,
        total: int,
    ) -> None:
        model = self.model
        with model.embedding_kept(torch.cat([sequences[i].ids_T for batch in batches for i in batch] + [_PADDING])):
            hidden = [model.embed(_padded([sequences[i].ids_T for i in batch])) for batch in batches]
        for index in range(model.num_blocks):
            block = model.load_block(index)
            name = model.block_prefix(index).rstrip(".")
            for i, h in enumerate(hidden):
                watched = batches[i][0] < observe
                with watch.block(block) if watched else contextlib.nullcontext():
                    hidden[i] = model.run_block(index, h)
                if watched:
                    watch.hidden(hidden[i])
                if not bool(torch.isfinite(hidden[i]).all()):
                    raise ArtifactError(
                        f"{model.checkpoint.path}: {name} is the first block whose output is not finite; the artifact "
                        "is damaged or overflows in this dtype"
                    )
            if observe:
                watch.next_block(name)
            model.release_block(index)
            self.on_block(number * model.num_blocks + index + 1, total)
        for batch, h in zip(batches, hidden, strict=True):
            for row, i in enumerate(batch):
                start, stop = kept.span(i)
                kept.hidden_PH[start:stop] = h[row, sequences[i].first : len(sequences[i].ids_T)]

    @property
    def hidden_size(self) -> int:
        return _width(self.model)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Hidden states that left the last block, of all sequences one after the other. offsets[i]: where i begins."""

    hidden_PH: Tensor
    offsets: list[int]
    first: list[int]

    @classmethod
    def empty(cls, sequences: Sequence[Tokens], model: StreamedModel) -> Kept:
        offsets = [0]
        for s in sequences:
            offsets.append(offsets[-1] + len(s.ids_T) - s.first)
        return cls(
            hidden_PH=torch.empty(offsets[-1], _width(model), dtype=model.dtype, device=model.device),
            offsets=offsets,
            first=[s.first for s in sequences],
        )

    def span(self, index: int) -> tuple[int, int]:
        return self.offsets[index], self.offsets[index + 1]


class TorchReading:
    """See `compress.runtime.runner.Reading`.

    A small output matrix is held from the first call of `at` until `close`; of a large one, the rows asked for are read
    each time.
    """

    def __init__(self, model: StreamedModel, kept: Kept, observed: Observed | None) -> None:
        self.model = model
        self.kept = kept
        self.observed = observed
        self._stack = contextlib.ExitStack()
        self._open = False
        self._hidden: tuple[Sequence[Span], Tensor] | None = None
        self._ids_at_once = 0

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def ids_at_once(self) -> int:
        if not self._ids_at_once:
            most = LOGIT_BYTES.get(self.model.device.type, 16 << 20) // (4 * POSITIONS)
            sliced = most < self.vocab_size and _slices_agree(self.model, self.kept.hidden_PH[:1])
            self._ids_at_once = most if sliced else self.vocab_size
        return self._ids_at_once

    @torch.no_grad()
    def at(self, spans: Sequence[Span], ids: range) -> Tensor:
        if self._hidden is None or self._hidden[0] != spans:
            self._hidden = (list(spans), torch.cat([self._kept(span) for span in spans]))
        hidden_P1H = self._hidden[1][:, None]
        whole = self.ids_at_once >= self.vocab_size
        if not self._open:
            self._stack.enter_context(self.model.head_loaded(matrix=whole))
            self._open = True
        if whole:
            return self.model.head(hidden_P1H)[:, 0, ids.start : ids.stop].float()
        return self.model.head(hidden_P1H, ids)[:, 0].float()

    def logits(self, index: int, start: int, stop: int) -> Tensor:
        spans, step = [Span(index, start, stop)], self.ids_at_once
        parts = [self.at(spans, ids) for ids in slices(self.vocab_size, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _kept(self, span: Span) -> Tensor:
        begin, end = self.kept.span(span.sequence)
        low, high = (begin + position - self.kept.first[span.sequence] for position in (span.start, span.stop))
        if not begin <= low <= high <= end:
            raise IndexError(f"positions {span.start}..{span.stop} of sequence {span.sequence} were not kept")
        return self.kept.hidden_PH[low:high]

    def close(self) -> None:
        """Release the output matrix."""
        self._stack.close()
        self._open = False
        self._hidden = None


def slices(vocab_size: int, step: int) -> list[range]:
    """The ids of a vocabulary, `step` at a time."""
    return [range(first, min(first + step, vocab_size)) for first in range(0, vocab_size, step)]


@torch.no_grad()
def _slices_agree(model: StreamedModel, hidden_1H: Tensor) -> bool:
    """Whether the logits of some ids can be had alone: the output matrix is plain, and what follows it (a scale, a soft
    cap) treats each logit by itself, as two slices that overlap show."""
    if not model.has_plain_head() or not len(hidden_1H):
        return False
    with model.head_loaded(matrix=False):
        one, two = (model.head(hidden_1H[:, None], ids)[0, 0].float() for ids in (range(0, 64), range(32, 96)))
    return len(one) == len(two) == 64 and torch.allclose(one[32:], two[:32], rtol=1e-3, atol=1e-3)


def _width(model: StreamedModel) -> int:
    config = model.model.config
    size = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None)
    return int(size) if size else int(model.base.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def rounds_of(sequences: Sequence[Tokens], observe: int, width: int, most_bytes: int) -> list[list[list[int]]]:
    """Batches of indices, in rounds whose float32 hidden states stay below `most_bytes`; watched sequences come first.

    Sequences of nearly the same length share a batch, padded at the end: attention is causal, so padding behind a
    token cannot change it.
    """

    def bucket(i: int) -> tuple[bool, int]:
        return i >= observe, -(-len(sequences[i].ids_T) // _BUCKET)

    batches: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: (bucket(i), i)):
        full = not batches or (len(batches[-1]) + 1) * bucket(i)[1] * _BUCKET > BATCH_TOKENS
        if full or bucket(batches[-1][0]) != bucket(i):
            batches.append([])
        batches[-1].append(i)
    rounds: list[list[list[int]]] = []
    held = 0
    for batch in batches:
        cost = len(batch) * max(len(sequences[i].ids_T) for i in batch) * width * 4
        if not rounds or held + cost > most_bytes:
            rounds.append([])
            held = 0
        rounds[-1].append(batch)
        held += cost
    return rounds


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
