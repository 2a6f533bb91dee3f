"""Which passages of a text another text holds as well, from a few kilobytes that are kept of the first.

Every run of `LENGTH` tokens is hashed, and of the distinct hashes the `KEPT` smallest are kept (a bottom-k sketch:
Broder 1997, "On the resemblance and containment of documents"). Which these are depends on the passages alone, not on
where they stand, how rows were cut or how much was read: of another text's passages, those whose hash is below the
largest kept are known, hit or miss, and they are a fair sample of all. Two texts by different hands share hardly a run
of 32 tokens.

Shapes: S tokens
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

LENGTH = 32
KEPT = 2048
_WHOLE = (1 << 64) - 1
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Passages:
    """A sketch of a text: of its passages' hashes up to `limit`, the low 32 bits, sorted."""

    limit: int
    low: npt.NDArray[np.uint32]

    def to_json(self) -> dict[str, Any]:
        """`tokens`: the length of a passage; `limit` in hexadecimal; `hashes`: little-endian uint32 in base 64."""
        hashes = base64.b64encode(self.low.astype("<u4").tobytes()).decode("ascii")
        return {"tokens": LENGTH, "limit": f"{self.limit:x}", "hashes": hashes}

    @classmethod
    def from_json(cls, value: Any) -> Passages | None:
        """None for what is no sketch of ours, such as the record of an earlier version."""
        if not isinstance(value, Mapping) or value.get("tokens") != LENGTH:
            return None
        try:
            raw = base64.b64decode(value["hashes"], validate=True)
            return cls(limit=int(value["limit"], 16), low=np.frombuffer(raw, dtype="<u4").astype(np.uint32))
        except (KeyError, TypeError, ValueError):
            return None

    def found_in(self, ids_S: Tensor, special: Collection[int] = ()) -> tuple[int, int]:
        """How many of another text's passages are among these, and of how many that can be told."""
        hashes = np.unique(_hashes(ids_S, special))
        told = hashes[hashes <= np.uint64(self.limit)].astype(np.uint32)
        return int(np.isin(told, self.low).sum()), len(told)


def passages(ids_S: Tensor, special: Collection[int] = ()) -> Passages:
    """The sketch of a text's tokens (int64, of any shape, in order). `special`: ids that do not count as text."""
    hashes = np.unique(_hashes(ids_S, special))
    limit = _WHOLE if len(hashes) <= KEPT else int(hashes[KEPT - 1])
    return Passages(limit=limit, low=np.sort(hashes[:KEPT].astype(np.uint32)))


def _hashes(ids_S: Tensor, special: Collection[int]) -> Hashes:
    """A 64-bit hash of every run of `LENGTH` tokens: a polynomial modulo 2**64, its bits mixed (splitmix64)."""
    ids = ids_S.reshape(-1).numpy().astype(np.uint64)
    if special:
        ids = ids[~np.isin(ids, np.fromiter(special, dtype=np.uint64))]
    count = len(ids) - LENGTH + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    out = np.zeros(count, dtype=np.uint64)
    for offset in range(LENGTH):
        out = out * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count] + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        out = (out ^ (out >> np.uint64(shift))) * np.uint64(factor)
    return out ^ (out >> np.uint64(31))
