"""A model folder read with torch, one decoder block in memory at a time, however long the text is.

What is kept of a sequence is its last hidden state at the positions that will be asked for; logits exist for
`CHUNK` positions at a time, so a vocabulary of 128k never becomes a `[B, T, V]` tensor.

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
from compress.runtime.runner import Tokens
from compress.runtime.watch import Observed, Watch

BATCH_TOKENS = 2048
CHUNK = 256
HIDDEN_BYTES = 2 << 30
_BUCKET = 16


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
        rounds = _rounds(sequences, observe, self.hidden_size)
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
    """See `compress.runtime.runner.Reading`. Holds the output matrix from the first call of `logits` until `close`."""

    def __init__(self, model: StreamedModel, kept: Kept, observed: Observed | None) -> None:
        self.model = model
        self.kept = kept
        self.observed = observed
        self._stack = contextlib.ExitStack()
        self._chunk: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def logits(self, index: int, start: int, stop: int) -> Tensor:
        begin, end = self.kept.span(index)
        low = begin + start - self.kept.first[index]
        high = begin + stop - self.kept.first[index]
        if not begin <= low <= high <= end:
            raise IndexError(f"positions {start}..{stop} of sequence {index} were not kept")
        parts = [
            self._chunk_logits(chunk)[max(0, low - chunk * CHUNK) : high - chunk * CHUNK]
            for chunk in range(low // CHUNK, (high - 1) // CHUNK + 1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk_logits(self, chunk: int) -> Tensor:
        """Asked for in order, each chunk is computed once."""
        if self._chunk is None or self._chunk[0] != chunk:
            if self._chunk is None:
                self._stack.enter_context(self.model.head_loaded())
            part_PH = self.kept.hidden_PH[chunk * CHUNK : (chunk + 1) * CHUNK]
            self._chunk = (chunk, self.model.head(part_PH[None])[0].float())
        return self._chunk[1]

    def close(self) -> None:
        """Release the output matrix."""
        self._stack.close()
        self._chunk = None


def _width(model: StreamedModel) -> int:
    config = model.model.config
    size = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None)
    return int(size) if size else int(model.base.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def _rounds(sequences: Sequence[Tokens], observe: int, width: int) -> list[list[list[int]]]:
    """Batches of indices, in rounds whose hidden states stay below `HIDDEN_BYTES`; watched sequences come first.

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
        if not rounds or held + cost > HIDDEN_BYTES:
            rounds.append([])
            held = 0
        rounds[-1].append(batch)
        held += cost
    return rounds


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
