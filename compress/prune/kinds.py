"""Which rows are fitted on and which judge: of each kind of text some are held out, and one may only judge.

Text of one kind does not tell what a cut costs on another, so there are up to three: the calibration text, what the
model itself writes (all that it knows, as far as it knows it), and a text that the user has watched. The mean of their
divergences is what decides.

Shapes: T tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.calibration_rows import Rows

# One row in so many of a kind is not fitted on, but judged on.
HELD = 8


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Rows of one kind: first those that are fitted on, then those held out. text, own or watched."""

    name: str
    fitted: int
    held: int

    @property
    def count(self) -> int:
        """Rows of this kind."""
        return self.fitted + self.held


@dataclass(frozen=True)
class Kinds:
    """What rows `[N, T]` consist of: one kind behind the other."""

    parts: tuple[Kind, ...]

    @classmethod
    def of(cls, rows: Rows) -> Kinds:
        """The kinds of calibration rows. Nothing is held out of a kind of a single row."""
        parts = []
        for name, count in (("text", len(rows.text.ids_NT)), ("own", rows.num_own)):
            held = max(1, count // HELD) if count > 1 else 0
            parts.append(Kind(name=name, fitted=count - held, held=held))
        parts.append(Kind(name="watched", fitted=0, held=rows.num_watched))
        return cls(tuple(part for part in parts if part.count))

    @classmethod
    def from_json(cls, value: Sequence[Sequence[str | int]]) -> Kinds:
        return cls(tuple(Kind(name=str(name), fitted=int(fitted), held=int(held)) for name, fitted, held in value))

    def to_json(self) -> list[list[str | int]]:
        return [[part.name, part.fitted, part.held] for part in self.parts]

    @property
    def fitted(self) -> list[range]:
        """Numbers of the rows that weights are fitted to, kind by kind."""
        return [fitted for _, fitted, _ in self._placed() if fitted]

    @property
    def held(self) -> dict[str, range]:
        """Numbers of the rows that judge, by kind."""
        return {part.name: held for part, _, held in self._placed() if held}

    def some(self, fitted: int, held: int) -> tuple[list[int], Kinds]:
        """At most so many rows to fit on in all, and of each kind to judge on: their numbers, and what they are."""
        share = -(-fitted // max(1, len(self.fitted)))
        chosen: list[int] = []
        parts = []
        for part, fit, hold in self._placed():
            chosen += [*fit[:share], *hold[:held]]
            parts.append(Kind(name=part.name, fitted=len(fit[:share]), held=len(hold[:held])))
        return chosen, Kinds(tuple(parts))

    def first(self, most: int) -> list[int]:
        """Numbers of at most so many rows, as many of every kind, to measure on where nothing is fitted."""
        share = max(1, most // len(self.parts))
        return [row for _, fit, hold in self._placed() for row in (fit or hold)[:share]]

    def _placed(self) -> Iterator[tuple[Kind, range, range]]:
        """Each kind with the numbers of its rows that are fitted on, and of those held out."""
        start = 0
        for part in self.parts:
            middle, end = start + part.fitted, start + part.count
            yield part, range(start, middle), range(middle, end)
            start = end


def parts_of(batches: Sequence[Tensor], rows: range) -> Iterator[tuple[int, slice]]:
    """Where rows lie in batches of equally many (the last may be shorter): the batch, and which of its rows."""
    size = len(batches[0])
    for i in range(rows.start // size, -(-rows.stop // size)):
        yield i, slice(max(rows.start - i * size, 0), min(rows.stop - i * size, size))


_SAID = {"text": "the text", "own": "its own text", "watched": "the watched text"}


def held_text(divergence: Mapping[str, Any]) -> str:
    """KL on the rows held out, as it is shown; on each kind of text where there are several."""
    if divergence["held_out"] is None:
        return "not measured, there is a single row"
    return f"{divergence['held_out']:.4f}" + by_text(divergence["by_text"])


def by_text(found: Mapping[str, float]) -> str:
    """The KL of each kind of text, where there are several."""
    if len(found) < 2:
        return ""
    return "; mean of " + ", ".join(f"{_SAID[name]} {kl:.4f}" for name, kl in found.items())
