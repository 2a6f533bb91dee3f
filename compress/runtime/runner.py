"""How a model of any runtime is read: sequences of token ids in, logits out. Metrics know nothing else of a model.

Shapes: T tokens of one sequence, P positions asked for, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Token ids `[T]` (int64, CPU) and the first position whose logits will be asked for."""

    ids_T: Tensor
    first: int = 0


class Span(NamedTuple):
    """Positions `start` to `stop` of one sequence."""

    sequence: int
    start: int
    stop: int


class Reading(Protocol):
    """A model that has read some sequences."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def ids_at_once(self) -> int:
        """Of how many ids the logits are best asked for at once: all, or as many as keep the memory bounded."""
        ...

    def at(self, spans: Sequence[Span], ids: range) -> Tensor:
        """Float32 `[P, len(ids)]`: logits of consecutive `ids` in the predictions made AFTER reading each position.

        Positions come span by span. None may lie before its sequence's `first`. Asking for the same spans with other
        ids, one after the other, costs no more than asking for all at once.
        """
        ...

    def logits(self, index: int, start: int, stop: int) -> Tensor:
        """Float32 `[stop - start, V]`: `at` of one span and the whole vocabulary."""
        ...

    def close(self) -> None:
        """Release what `at` holds."""
        ...


class Runner(Protocol):
    """A model in some runtime."""

    @property
    def runtime(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def read(self, sequences: Sequence[Tokens]) -> Reading:
        """Run the model over the sequences, of any lengths. Raises ArtifactError naming where NaN first appears."""
        ...


class Decoder(Protocol):
    """A model that makes text: a prompt at once, then one token a step, with a cache of keys and values.

    Sequences of a batch have prompts of one length. Logits are floating, `[B, V]`, on the decoder's own device, and
    valid until the next call.
    """

    @property
    def runtime(self) -> str:
        """What computes, as reports call it: `torch`, `torch-cuda`, `onnxruntime`, `tensorrt`, `tensorrt-rtx`."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have, prompt and answer."""
        ...

    @property
    def batch(self) -> int: ...

    @property
    def bytes_a_token(self) -> int:
        """Bytes of weights that one step reads, whatever the batch."""
        ...

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Start anew with these prompts (int64, CPU); the logits after them."""
        ...

    def step(self, ids_B: Tensor) -> Tensor:
        """The logits after one more token each."""
        ...

    def advance(self) -> Tensor:
        """One greedy step: the likeliest tokens after the last call go in; the likeliest `[B]` after them come out."""
        ...
