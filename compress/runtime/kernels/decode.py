"""Launches of `decode.cu`: what a decode step does between its linears.

Shapes: B sequences, H hidden size, A query heads, C key heads, D size of a head, S capacity of the cache
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.plan import ActivationScheme
from compress.runtime.kernels import nvrtc

SOURCE = Path(__file__).with_name("decode.cu")
# Positions that a block attends to: few, so that one short context still fills the GPU; more where there are enough
# of them.
CHUNKS = (32, 128)
ENOUGH_BLOCKS = 1024


@dataclass(frozen=True, kw_only=True)
class Heads:
    """query and key heads, their size, and the factor of the scores."""

    query: int
    key: int
    size: int
    scale: float

    @property
    def together(self) -> int:
        """Query heads of one key head that a block attends with: bounded by its registers."""
        most = 2 if self.size > 128 else 4
        return max(n for n in range(1, most + 1) if self.query // self.key % n == 0)


def _chunk(batch: int, capacity: int, heads: Heads) -> int:
    return CHUNKS[batch * (heads.query // heads.together) * -(-capacity // CHUNKS[1]) >= ENOUGH_BLOCKS]


def _kernel(name: str, device: torch.device, size: int = 64, together: int = 1, chunk: int = 32) -> nvrtc.Kernel:
    return nvrtc.compiled(SOURCE, (("SIZE", size), ("HEADS", together), ("CHUNK", chunk)), name, device.index)


def add_norm(
    hidden_BH: Tensor,
    added_BH: Tensor | None,
    weight_H: Tensor,
    eps: float,
    out_BH: Tensor,
    factor_B: Tensor | None = None,
) -> None:
    """hidden (float32) += added (float16, or None); out (float16) = RMS norm of hidden times weight (float32).

    factor (float32): where one over the root mean square goes, if anywhere.
    """
    rows, size = hidden_BH.shape
    threads = min(1024, max(32, -(-size // 4 // 32) * 32))
    kernel = _kernel("add_norm", hidden_BH.device)
    kernel.launch(rows, threads, (hidden_BH, added_BH, weight_H, out_BH, factor_B, size, nvrtc.bits(eps)))


def round_rows(x_BK: Tensor, scheme: ActivationScheme) -> None:
    """x (float16, contiguous) to INT8 by rows and back, in place: `compress.activations`, by token."""
    assert scheme.dynamic
    rows, size = x_BK.shape
    threads = min(1024, max(32, -(-size // 8 // 32) * 32))
    name = "round_rows" if scheme.symmetric else "round_rows_with_zeros"
    _kernel(name, x_BK.device).launch(rows, threads, (x_BK, size))


def embed(embedding_VH: Tensor, ids_B: Tensor, hidden_BH: Tensor) -> None:
    """hidden (float32) = rows `ids_B` (int64) of the embedding (float16)."""
    _kernel("embed", ids_B.device).launch(len(ids_B), 256, (embedding_VH, ids_B, hidden_BH, hidden_BH.shape[1]))


def advance_greedily(logits_BV: Tensor, best_B: Tensor, ids_B: Tensor, position_B: Tensor) -> None:
    """ids become the largest logits' (the first of equal ones), positions move on. best_B: int64 scratch of zeros."""
    batch, vocabulary = logits_BV.shape
    blocks = min(128, -(-vocabulary // 256))
    _kernel("largest", ids_B.device).launch(blocks, 256, (logits_BV, best_B, vocabulary), blocks_y=batch)
    _kernel("advance", ids_B.device).launch(1, 64, (best_B, ids_B, position_B, batch))


def rotate(
    qkv: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    position_B: Tensor,
    heads: Heads,
    eps: float,
) -> None:
    """Queries rotated into q `[B, A, D]`; keys (rotated) and values put into caches `[B, C, S, D]` at `position_B`."""
    kernel = _kernel("rotate", q.device, heads.size)
    args = (qkv, q, keys, values, *tables, *norms, position_B, heads.query, heads.key, keys.shape[2], nvrtc.bits(eps))
    kernel.launch(len(q) * (heads.query + 2 * heads.key), heads.size // 2, args)


def num_chunks(batch: int, capacity: int, heads: Heads) -> int:
    """Parts that `attend` cuts the cache of each sequence into."""
    return -(-capacity // _chunk(batch, capacity, heads))


def attend(
    q: Tensor, keys: Tensor, values: Tensor, position_B: Tensor, partial: Tensor, out: Tensor, heads: Heads
) -> None:
    """out `[B, A * D]`: attention of one query a head over cache positions 0 .. position. partial: float32 scratch
    `[B, A, chunks, D + 2]`."""
    capacity = keys.shape[2]
    chunk = _chunk(len(q), capacity, heads)
    chunks = -(-capacity // chunk)
    kernel = _kernel("attend", q.device, heads.size, heads.together, chunk)
    args = (q, keys, values, position_B, partial, heads.query, heads.key, capacity, chunks, nvrtc.bits(heads.scale))
    kernel.launch(len(q) * (heads.query // heads.together) * chunks, 128, args)
    join = _kernel("join", q.device, heads.size, heads.together, chunk)
    join.launch(len(q) * heads.query, heads.size, (partial, position_B, out, heads.query, chunks))


def attend_at_once(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    position_B: Tensor,
    partial: Tensor,
    arrived: Tensor,
    out: Tensor,
    heads: Heads,
    eps: float,
) -> None:
    """`rotate` and `attend` in one kernel; the last block of a head joins the chunks. arrived: int32 zeros `[B, A]`."""
    batch, capacity = len(position_B), keys.shape[2]
    chunk = _chunk(batch, capacity, heads)
    chunks = -(-capacity // chunk)
    kernel = _kernel("attend_at_once", qkv.device, heads.size, heads.together, chunk)
    sizes = (heads.query, heads.key, capacity, chunks, nvrtc.bits(heads.scale), nvrtc.bits(eps))
    args = (qkv, keys, values, *tables, *norms, position_B, partial, arrived, out, *sizes)
    kernel.launch(batch * (heads.query // heads.together) * chunks, 128, args)
