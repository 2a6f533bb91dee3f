"""Which passages of a text another text holds as well, from a few kilobytes that are kept of the first.

Every run of `LENGTH` characters is hashed (white space left out, in lower case: so neither lines, nor rows, nor tokens
matter), and of the distinct hashes the `KEPT` smallest are kept, a bottom-k sketch (Broder 1997, "On the resemblance
and containment of documents"). Which these are depends on the passages alone, not on where they stand or how much was
read: of another text's passages, those whose hash is not above the largest kept are known, hit or miss, and they are a
fair sample of all. Two texts by different hands share hardly a run of 80 characters.

Shapes: C characters
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTH = 80
KEPT = 2048
_WHOLE = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15
_AT_ONCE = 1 << 20
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Passages:
    """A sketch of a text: of its passages' hashes up to `limit`, the low 32 bits, sorted."""

    limit: int
    low: npt.NDArray[np.uint32]

    def to_json(self) -> dict[str, Any]:
        """`characters`: the length of a passage; `limit` in hexadecimal; `hashes`: little-endian uint32 in base 64."""
        hashes = base64.b64encode(self.low.astype("<u4").tobytes()).decode("ascii")
        return {"characters": LENGTH, "limit": f"{self.limit:x}", "hashes": hashes}

    @classmethod
    def from_json(cls, value: Any) -> Passages | None:
        """None for what is no sketch of ours, such as the record of an earlier version."""
        if not isinstance(value, Mapping) or value.get("characters") != LENGTH:
            return None
        try:
            raw = base64.b64decode(value["hashes"], validate=True)
            return cls(limit=int(value["limit"], 16), low=np.frombuffer(raw, dtype="<u4").astype(np.uint32))
        except (KeyError, TypeError, ValueError):
            return None

    def found_in(self, text: str) -> tuple[int, int]:
        """How many of another text's passages are among these, and of how many that can be told."""
        told = np.unique(np.concatenate([h[h <= np.uint64(self.limit)] for h in _hashes(text)])).astype(np.uint32)
        return int(np.isin(told, self.low).sum()), len(told)


def passages(text: str) -> Passages:
    """The sketch of a text."""
    smallest = np.empty(0, dtype=np.uint64)
    num_left_out = 0
    for hashes in _hashes(text):
        if len(smallest) == KEPT:  # what is not below the largest kept is left out in any case
            small = hashes[hashes < smallest[-1]]
            num_left_out += int((hashes > smallest[-1]).sum())
            hashes = small
        smallest = np.unique(np.concatenate([smallest, hashes]))
        num_left_out += len(smallest[KEPT:])
        smallest = smallest[:KEPT]
    limit = int(smallest[-1]) if num_left_out else _WHOLE
    return Passages(limit=limit, low=np.sort(smallest.astype(np.uint32)))


def _hashes(text: str) -> Iterator[Hashes]:
    """A 64-bit hash of every run of `LENGTH` characters, a part of the text at a time.

    A polynomial of the code points modulo 2**64, its bits mixed (splitmix64).
    """
    bare = "".join(text.lower().split())
    yield np.empty(0, dtype=np.uint64)
    for start in range(0, len(bare) - LENGTH + 1, _AT_ONCE):
        part = bare[start : start + _AT_ONCE + LENGTH - 1]
        points_C = np.frombuffer(part.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(np.uint64)
        out = _polynomials(points_C + np.uint64(1))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            out = (out ^ (out >> np.uint64(shift))) * np.uint64(factor)
        yield out ^ (out >> np.uint64(31))


def _polynomials(values_C: Hashes) -> Hashes:
    """Of every `LENGTH` values, the polynomial whose coefficients they are, at `_BASE`.

    The polynomial of 2n values is that of the first n, times `_BASE**n`, plus that of the others: 80 values take eight
    passes over the text, by the binary digits of 80.
    """
    factor, length, out = _BASE, 1, values_C
    for digit in f"{LENGTH:b}"[1:]:
        out = out[:-length] * np.uint64(factor) + out[length:]
        factor, length = factor * factor & _WHOLE, 2 * length
        if digit == "1":
            out = out[:-1] * np.uint64(_BASE) + values_C[length:]
            factor, length = factor * _BASE & _WHOLE, length + 1
    return out
