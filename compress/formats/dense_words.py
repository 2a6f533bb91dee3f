"""Codes of any width in int32 words without a gap: how compressed-tensors 0.20 packs them.

A row is one run of bits, the lowest first: value i takes bits `i * num_bits` and on, across the border of two words
where it falls so, and 32 values fill `num_bits` words. Source: compressed-tensors 0.20, `compressors/pack_quantized`.

Shapes: R rows, C columns, W words a row
"""

from __future__ import annotations

import torch
from torch import Tensor

# Codes packed at once: int64 copies of them are alive.
_CHUNK = 1 << 24


def num_words(num_columns: int, num_bits: int) -> int:
    """Words that a row of codes takes: `ceil(C * num_bits / 32)`."""
    return -(-num_columns * num_bits // 32)


def pack(codes_RC: Tensor, num_bits: int) -> Tensor:
    """Unsigned codes, uint8 `[R, C]`, into int32 `[R, W]`; the last word is filled with zeros."""
    num_columns = codes_RC.shape[1]
    if 8 % num_bits == 0:
        return _pack_bytes(codes_RC, num_bits)
    step = max(1, _CHUNK // max(1, num_columns))
    return torch.cat([_pack_words(part, num_bits) for part in codes_RC.split(step)])[
        :, : num_words(num_columns, num_bits)
    ]


def unpack(words_RW: Tensor, num_bits: int, num_columns: int) -> Tensor:
    """int32 `[R, W]` into unsigned codes, uint8 `[R, C]`; the inverse of `pack`."""
    if 8 % num_bits == 0:
        return _unpack_bytes(words_RW, num_bits, num_columns)
    step = max(1, _CHUNK // max(1, num_columns))
    return torch.cat([_unpack_words(part, num_bits) for part in words_RW.split(step)])[:, :num_columns].contiguous()


def _pack_bytes(codes_RC: Tensor, num_bits: int) -> Tensor:
    """Codes that never cross a byte: bytes are put together, and four of them are a word."""
    per_byte = 8 // num_bits
    padded = _padded(codes_RC, 4 * per_byte).reshape(codes_RC.shape[0], -1, per_byte)
    out = padded[:, :, 0].clone()
    for i in range(1, per_byte):
        out |= padded[:, :, i] << (i * num_bits)
    return out.view(torch.int32)


def _unpack_bytes(words_RW: Tensor, num_bits: int, num_columns: int) -> Tensor:
    data = words_RW.contiguous().view(torch.uint8)
    if num_bits == 8:
        return data[:, :num_columns].contiguous()
    per_byte, mask = 8 // num_bits, (1 << num_bits) - 1
    parts = [(data >> (i * num_bits)) & mask for i in range(per_byte)]
    return torch.stack(parts, dim=-1).reshape(len(data), -1)[:, :num_columns].contiguous()


def _pack_words(codes_RC: Tensor, num_bits: int) -> Tensor:
    runs = _padded(codes_RC, 32).reshape(codes_RC.shape[0], -1, 32)
    words = torch.zeros(*runs.shape[:2], num_bits + 1, dtype=torch.int64, device=runs.device)
    for i in range(32):
        word, shift = divmod(i * num_bits, 32)
        value = runs[:, :, i].to(torch.int64) << shift
        words[:, :, word] |= value & 0xFFFFFFFF
        words[:, :, word + 1] |= value >> 32
    unsigned = words[:, :, :num_bits].reshape(len(runs), -1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def _unpack_words(words_RW: Tensor, num_bits: int) -> Tensor:
    unsigned = _padded(words_RW, num_bits).to(torch.int64) & 0xFFFFFFFF
    runs = torch.nn.functional.pad(unsigned.reshape(words_RW.shape[0], -1, num_bits), (0, 1))
    out = torch.empty(*runs.shape[:2], 32, dtype=torch.uint8, device=runs.device)
    for i in range(32):
        word, shift = divmod(i * num_bits, 32)
        value = (runs[:, :, word] | (runs[:, :, word + 1] << 32)) >> shift
        out[:, :, i] = (value & ((1 << num_bits) - 1)).to(torch.uint8)
    return out.reshape(words_RW.shape[0], -1)


def _padded(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, (-values.shape[1]) % multiple))
