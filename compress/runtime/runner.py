"""How a model of any runtime is read: sequences of token ids in, logits out. Metrics know nothing else of a model.

Shapes: T tokens of one sequence, P positions asked for, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Token ids `[T]` (int64, CPU) and the first position whose logits will be asked for."""

    ids_T: Tensor
    first: int = 0


class Reading(Protocol):
    """A model that has read some sequences."""

    def logits(self, index: int, start: int, stop: int) -> Tensor:
        """Float32 `[stop - start, V]`: the predictions made AFTER reading tokens start .. stop - 1 of a sequence.

        `start` must not lie before the sequence's `first`.
        """
        ...

    def close(self) -> None:
        """Release what `logits` holds."""
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
