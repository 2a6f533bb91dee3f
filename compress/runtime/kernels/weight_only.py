"""Linears whose weight stays in 4, 8 or 16 bits on the GPU: read once a step, decoded in registers (`weight_only.cu`).

Few rows of x (a decode step, small batches) go through the kernel; many (a prompt) through a dense product with the
weight decoded first, which costs its bytes once and then runs at the speed of float16.

Shapes: N out_features, K in_features, G groups along K, M rows of x
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.runtime.kernels import nvrtc

SOURCE = Path(__file__).with_name("weight_only.cu")
TILE_N, TILE_K = 16, 64
# Rows of x above which the weight is decoded to float16 and multiplied by the library; see tests/bench/decode.py.
MOST_ROWS = 64
_PACKED_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A weight in the kernel's layout. group_size 0: one scale a row. scales, zeros: None with 16 bits."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    num_bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def column_tiles(self) -> int:
        return -(-self.shape[1] // TILE_K)

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size) if self.group_size else 1

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros) if t is not None)


def pack_codes(codes_NK: Tensor, num_bits: int) -> Tensor:
    """Codes (uint8, or float16 with 16 bits) in tiles of 16 x 64, padded: int32 `[N / 16, K / 64, bits / 4, 32, 4]`."""
    n, k = codes_NK.shape
    rows, columns = -(-n // TILE_N), -(-k // TILE_K)
    out = torch.empty(rows, columns, num_bits // 4, 32, 4, dtype=torch.int32, device=codes_NK.device)
    step = max(1, _PACKED_AT_ONCE // (TILE_N * columns * TILE_K))
    for start in range(0, rows, step):
        part = codes_NK[start * TILE_N : (start + step) * TILE_N]
        part = nn.functional.pad(part, (0, columns * TILE_K - k, 0, -len(part) % TILE_N))
        out[start : start + step] = _tiles(part, num_bits)
    return out


def _tiles(codes_NK: Tensor, num_bits: int) -> Tensor:
    n, k = codes_NK.shape
    # row = 8 * high + g; column = 32 * half + 8 * quad + 4 * step + 2 * pair + element
    parts = codes_NK.reshape(n // TILE_N, 2, 8, k // TILE_K, 2, 4, 2, 2, 2)
    #                         0          1  2  3           4  5  6  7  8
    high, g, tile, half, quad, step, pair, element = range(1, 9)
    lane = (g, quad)
    if num_bits == 16:
        whole = parts.permute(0, tile, half, step, *lane, pair, high, element).contiguous()
        return whole.view(torch.int32).reshape(n // TILE_N, k // TILE_K, 4, 32, 4)
    if num_bits == 8:
        shifts = torch.tensor([[0, 8], [16, 24]], device=codes_NK.device)
        bytes_ = parts.permute(0, tile, half, *lane, step, high, pair, element).to(torch.int64)
        words = (bytes_ << shifts).sum((-2, -1)).reshape(n // TILE_N, k // TILE_K, 2, 32, 4)
        return _as_int32(words)
    shifts = torch.tensor([[[0, 16], [8, 24]], [[4, 20], [12, 28]]], device=codes_NK.device)  # [high, pair, element]
    nibbles = parts.permute(0, tile, *lane, half, step, high, pair, element).to(torch.int64)
    words = (nibbles << shifts).sum((-3, -2, -1)).reshape(n // TILE_N, k // TILE_K, 1, 32, 4)
    return _as_int32(words)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, num_bits: int) -> Packed:
    """A quantized weight: codes uint8 `[N, K]`, `w = (codes - zero) * scale`; scales become float16."""
    n, k = codes_NK.shape
    groups = scale_NG.shape[1]
    if groups > 1 and k // groups % 32:
        raise ValueError(f"group_size {k // groups} is not a multiple of 32")
    return Packed(
        codes=pack_codes(codes_NK, num_bits),
        scales=_by_rows(scale_NG.to(torch.float16)),
        zeros=_by_rows(zero_NG.to(torch.uint8)),
        num_bits=num_bits,
        group_size=0 if groups == 1 else k // groups,
        shape=(n, k),
    )


def pack_dense(w_NK: Tensor) -> Packed:
    """A float16 weight, for the same kernel."""
    codes = pack_codes(w_NK.to(torch.float16), 16)
    return Packed(codes=codes, scales=None, zeros=None, num_bits=16, group_size=0, shape=(w_NK.shape[0], w_NK.shape[1]))


def _by_rows(value_NG: Tensor) -> Tensor:
    """`[N / 16, G, 16]`, rows padded with zeros."""
    n, g = value_NG.shape
    padded = nn.functional.pad(value_NG, (0, 0, 0, -n % TILE_N))
    return padded.reshape(-1, TILE_N, g).transpose(1, 2).contiguous()


def stack(parts: list[Packed]) -> Packed:
    """Several weights of one input, one below the other; all but the last of a multiple of 16 rows."""
    first = parts[0]
    return Packed(
        codes=torch.cat([p.codes for p in parts]),
        scales=None if first.scales is None else torch.cat([p.scales for p in parts if p.scales is not None]),
        zeros=None if first.zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None]),
        num_bits=first.num_bits,
        group_size=first.group_size,
        shape=(sum(p.shape[0] for p in parts), first.shape[1]),
    )


# ---- launches ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut up; see `weight_only.cu`."""

    run: int
    tiles: int
    warps: int
    rows: int


def tiling(packed: Packed, num_rows: int) -> Tiling:
    """For `num_rows` of x. As measured on an H100 (tests/bench/decode.py tune)."""
    tiles = 1 << max(0, (num_rows - 1) // 8).bit_length()
    run = 2 if packed.group_size == 32 else 1
    wide, tall = packed.shape[0] >= 12288, packed.column_tiles >= 128
    if tiles >= 4:
        return Tiling(run, tiles, 8 if tall or not wide else 4, 2)
    if tiles == 2:
        return Tiling(run, tiles, 16 if tall else 4 if wide else 8, 1 if packed.num_bits == 8 else 2)
    if packed.num_bits == 8 and not packed.group_size:
        return Tiling(2, tiles, 16, 1)
    if packed.num_bits == 16:
        return Tiling(run, tiles, 16 if tall or wide else 8, 2 if tall or wide else 1)
    if wide:
        return Tiling(run, tiles, 4, 1)
    return Tiling(run, tiles, 16 if tall or packed.shape[0] <= 4096 and packed.column_tiles >= 32 else 8, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Normed:
    """x is a residual stream times a norm's weight and `before`: y is of the row over its root mean square.

    squares: float32 `[M, K / 16]`, sums of 16 squares of the stream; before: float32 `[M]`, the factor that x has;
    factor: float32 `[M]`, one over the root mean square, written.
    """

    squares: Tensor
    before: Tensor
    factor: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Added:
    """y is added to `stream` (float32 `[M, N]`); `out` becomes stream * weight * before, the next norm's x.

    squares: float32 `[M, N / 16]`, sums of 16 squares of the stream, written. weight: the next norm's, float32 `[N]`.
    """

    stream: Tensor
    weight: Tensor
    before: Tensor
    squares: Tensor


def matmul(
    x_MK: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
    cut: Tiling | None = None,
    normed: Normed | None = None,
    added: Added | None = None,
) -> Tensor:
    """`x W^T + bias`, float16 `[M, N]`, for at most `MOST_ROWS` rows of contiguous float16 x.

    gated: W was stacked by `interleaved`; gives silu(gate) * value, `[M, N / 2]`, without a bias. normed, added: what
    a norm before and a sum after would do in kernels of their own.
    """
    m, k = x_MK.shape
    n = packed.shape[0]
    cut = cut or tiling(packed, m)
    y = torch.empty(m, n // 2 if gated else n, dtype=torch.float16, device=x_MK.device) if out is None else out
    both = {"NORMED": int(normed is not None), "ADDED": int(added is not None)}
    kernel = nvrtc.compiled(SOURCE, _defines(packed, cut, gated, **both), "linear", x_MK.device.index)
    row_tiles = -(-n // TILE_N)
    args = (
        packed.codes,
        packed.scales,
        packed.zeros,
        x_MK,
        bias,
        y,
        m,
        n,
        k,
        row_tiles,
        packed.column_tiles,
        packed.groups,
        *_beside(normed, added),
    )
    kernel.launch(-(-row_tiles // cut.rows), 32 * cut.warps, args)
    return y


def _beside(normed: Normed | None, added: Added | None) -> tuple[Tensor | int | None, ...]:
    """squares, before, factor, stream, weight and the bits of eps, as the kernel takes them."""
    if normed is not None:
        return normed.squares, normed.before, normed.factor, None, None, nvrtc.bits(normed.eps)
    if added is not None:
        return added.squares, added.before, None, added.stream, added.weight, 0
    return None, None, None, None, None, 0


def compile_one(device: int) -> None:
    """One of the kernels, as a launch would have it, for GPU `device`; UnsupportedError says why it cannot be."""
    packed = Packed(codes=torch.empty(0), scales=None, zeros=None, num_bits=4, group_size=128, shape=(4096, 4096))
    nvrtc.compiled(SOURCE, _defines(packed, tiling(packed, 1), False), "linear", device)


def interleaved(gate_NK: Tensor, value_NK: Tensor) -> Tensor:
    """Rows of a gate and of its values (or their scales, zero points) as `matmul(gated=True)` takes them: eight of each
    in turn. Both of a multiple of 8 rows."""
    parts = [t.reshape(-1, 8, t.shape[1]) for t in (gate_NK, value_NK)]
    return torch.stack(parts, 1).reshape(-1, gate_NK.shape[1])


def dense(packed: Packed) -> Tensor:
    """The weight as float16 `[N, K]`: `(code - zero) * scale`, rounded once."""
    n, k = packed.shape
    w_NK = torch.empty(n, k, dtype=torch.float16, device=packed.codes.device)
    kernel = nvrtc.compiled(SOURCE, _defines(packed, tiling(packed, 1), False), "dequantize", w_NK.device.index)
    tiles = -(-n // TILE_N) * packed.column_tiles
    args = (packed.codes, packed.scales, packed.zeros, w_NK, n, k, packed.column_tiles, packed.groups)
    kernel.launch(-(-tiles // 8), 256, args)
    return w_NK


def _defines(packed: Packed, cut: Tiling, gated: bool, **both: int) -> tuple[tuple[str, int], ...]:
    values = {
        "BITS": packed.num_bits, "GROUP": packed.group_size, "RUN": cut.run, "TILES": cut.tiles, "WARPS": cut.warps,
        "ROWS": cut.rows, "GATED": int(gated), "NORMED": 0, "ADDED": 0, **both,
    }  # fmt: skip
    return tuple(values.items())
