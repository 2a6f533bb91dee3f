"""Rows of token ids on disk, in the order in which they were made, with where documents begin.

A folder, read through a memory map, holds `rows.bin` (int32, little-endian, row by row), `starts.bin` (int64, the
places in it at which a document begins) and, written last, `rows.json` with the hashes of both.

Shapes: N rows, T tokens in a row, B rows of a batch
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.files import file_sha256, fsync_path, json_bytes, read_json, write_bytes_atomically
from compress.losses.in_blocks import IGNORED

ROWS, STARTS, FACTS = "rows.bin", "starts.bin", "rows.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """ids_BT, labels_BT: int64. labels: the token that follows, `IGNORED` where none of the same text does.

    positions_BT: int64, counted from each document's beginning; None when a row is read as one text. rows: which rows
    of the data these are.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor | None = None
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """Copied to `device`; to a GPU without waiting for what it does."""
        positions = None if self.positions_BT is None else moved(self.positions_BT, device)
        return Batch(
            ids_BT=moved(self.ids_BT, device),
            labels_BT=moved(self.labels_BT, device),
            positions_BT=positions,
            rows=self.rows,
        )


def moved(value: Tensor, device: torch.device | str) -> Tensor:
    """At `device`; to a GPU without waiting for what it does."""
    if torch.device(device).type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """ids_NT: int32. starts: sorted places in the flattened rows at which a document begins.

    sha256: of ids and starts. sources: what they were made of, as the manifest records it.
    """

    ids_NT: np.ndarray
    starts: np.ndarray
    sha256: str
    sources: list[dict[str, Any]]

    def __len__(self) -> int:
        return int(self.ids_NT.shape[0])

    @property
    def seq_len(self) -> int:
        return int(self.ids_NT.shape[1])

    def positions(self, row: int) -> np.ndarray:
        """Of each token of a row, how far it is from where its document, or else the row, begins: int64 `[T]`."""
        place = np.arange(self.seq_len)
        first, last = np.searchsorted(self.starts, [row * self.seq_len, (row + 1) * self.seq_len])
        begins = np.zeros(self.seq_len, dtype=np.int64)
        begins[self.starts[first:last] - row * self.seq_len] = self.starts[first:last] - row * self.seq_len
        positions: np.ndarray = place - np.maximum.accumulate(begins)
        return positions

    def batch(self, indices: Sequence[int], *, isolate: bool) -> Batch:
        """The rows `indices`. isolate: documents of a row are texts of their own, with positions from 0."""
        ids_BT = torch.from_numpy(np.stack([self.ids_NT[i] for i in indices]).astype(np.int64))
        labels_BT = torch.full_like(ids_BT, IGNORED)
        labels_BT[:, :-1] = ids_BT[:, 1:]
        if not isolate:
            return Batch(ids_BT=ids_BT, labels_BT=labels_BT, rows=tuple(indices))
        positions_BT = torch.from_numpy(np.stack([self.positions(i) for i in indices]))
        labels_BT[:, :-1][positions_BT[:, 1:] == 0] = IGNORED
        return Batch(ids_BT=ids_BT, labels_BT=labels_BT, positions_BT=positions_BT, rows=tuple(indices))


class RowsWriter:
    """Cuts documents, given as token ids one after the other, into rows; what does not fill one is left out.

    front: the token that every row begins with, where the tokenizer begins a text with one: a row from within a
    document gets one of its own.
    """

    def __init__(self, folder: Path, seq_len: int, front: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).unlink(missing_ok=True)
        self.folder = folder
        self.seq_len = seq_len
        self.front = front
        self._file = open(folder / ROWS, "wb")
        self._starts: list[int] = []
        self._pending: list[int] = []
        self._pending_starts: list[int] = []
        self.num_rows = 0

    def begin(self) -> None:
        """A document begins with the next ids."""
        self._pending_starts.append(len(self._pending))

    def take(self, ids: Sequence[int], *, most: int | None = None) -> None:
        """More ids of the document, or of what separates two. most: rows after which the rest is dropped."""
        self._pending += ids
        taken, rows = 0, []
        while most is None or self.num_rows < most:
            added = [] if self.front is None or self._pending[taken : taken + 1] == [self.front] else [self.front]
            stop = taken + self.seq_len - len(added)
            if stop > len(self._pending):
                break
            rows.append([*added, *self._pending[taken:stop]])
            place = self.num_rows * self.seq_len + len(added) - taken
            self._starts += [place + s for s in self._pending_starts if taken <= s < stop]
            self.num_rows += 1
            taken = stop
        if rows:
            self._file.write(np.asarray(rows, dtype="<i4").tobytes())
        del self._pending[:taken]
        self._pending_starts = [s - taken for s in self._pending_starts if s >= taken]

    def end_source(self) -> int:
        """Drop what fills no row, so that no row holds text of two sources; returns how many tokens that were."""
        left, self._pending, self._pending_starts = len(self._pending), [], []
        return left

    def finish(self, sources: list[dict[str, Any]]) -> Rows:
        self._file.flush()
        self._file.close()
        (self.folder / STARTS).write_bytes(np.asarray(self._starts, dtype="<i8").tobytes())
        hashes = {name: file_sha256(self.folder / name) for name in (ROWS, STARTS)}
        facts = {"schema": SCHEMA, "num_rows": self.num_rows, "seq_len": self.seq_len, "files": hashes}
        write_bytes_atomically(self.folder / FACTS, json_bytes({**facts, "sources": sources}))
        fsync_path(self.folder)
        return read_rows(self.folder)


def read_rows(folder: Path, *, check: bool = False) -> Rows:
    """The rows in `folder`. check: compare both files with their hashes. ArtifactError when they are not whole."""
    facts = read_json(folder / FACTS)
    if facts.get("schema") != SCHEMA:
        raise ArtifactError(f"{folder / FACTS}: schema {facts.get('schema')!r} is not {SCHEMA}; make it again")
    shape = (int(facts["num_rows"]), int(facts["seq_len"]))
    size = (folder / ROWS).stat().st_size if (folder / ROWS).is_file() else 0
    if size != 4 * shape[0] * shape[1]:
        raise ArtifactError(
            f"{folder / ROWS}: {size} bytes, and {shape[0]} rows of {shape[1]} need others; make it again"
        )
    for name, expected in facts["files"].items() if check else ():
        if file_sha256(folder / name) != expected:
            raise ArtifactError(f"{folder / name}: its content is not what was written; make it again")
    return Rows(
        ids_NT=np.memmap(folder / ROWS, dtype="<i4", mode="r", shape=shape),
        starts=np.frombuffer((folder / STARTS).read_bytes(), dtype="<i8"),
        sha256=hashlib.sha256("".join(facts["files"][name] for name in (ROWS, STARTS)).encode()).hexdigest(),
        sources=facts["sources"],
    )


def is_finished(folder: Path) -> bool:
    return (folder / FACTS).exists()


def order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """In which order the rows are read in an epoch: int64 `[N]`, a permutation that (seed, epoch) decides."""
    shuffled: np.ndarray = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
    return shuffled


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` split in proportion to `weights`; what rounding leaves goes to those that lost most by it, in order."""
    exact = [total * w / sum(weights) for w in weights]
    out = [int(x) for x in exact]
    by_loss = sorted(range(len(weights)), key=lambda i: (out[i] - exact[i], i))
    for i in by_loss[: total - sum(out)]:
        out[i] += 1
    return out
