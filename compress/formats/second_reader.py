"""Packed tensors read by code that shares nothing with what wrote them.

Written in numpy from the formats' descriptions, on purpose: a mistake in the packing code cannot also be here.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from compress.errors import ArtifactError

Array = np.ndarray
# torch's name of a dtype, and the numbers; 16-bit floats as the integers of their bits.
Again = tuple[str, Array]

# AutoAWQ gemm: column j of each run of eight lies in this nibble of its word.
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
# Words unpacked at once: intermediate arrays that stay in a core's cache.
_CACHED_WORDS = 1 << 16


def unpack_awq(words: Array) -> Array:
    """AutoAWQ gemm words int32 `[K, N / 8]` into codes uint8 `[K, N]`, a view that is contiguous as `[N, K]`."""
    unsigned = np.ascontiguousarray(words.view(np.uint32).T)
    out = np.empty((unsigned.shape[0], 8, unsigned.shape[1]), dtype=np.uint8)
    step = max(1, _CACHED_WORDS // max(1, unsigned.shape[1]))
    for start in range(0, len(unsigned), step):
        part = unsigned[start : start + step]
        for column, nibble in enumerate(_NIBBLE_OF_COLUMN):
            out[start : start + step, column] = (part >> np.uint32(4 * nibble)) & np.uint32(15)
    return out.reshape(-1, unsigned.shape[1]).T


def unpack_dense(words: Array, num_bits: int, num_columns: int) -> Array:
    """compressed-tensors words int32 `[R, W]` into unsigned codes, uint8 `[R, num_columns]`.

    A row is one run of bits, the lowest of a word first; value i is bits `i * num_bits` and on. ArtifactError when the
    bits behind the last value are not zero.
    """
    rows = np.ascontiguousarray(words).astype("<i4", copy=False)
    out = np.zeros((len(rows), num_columns), dtype=np.uint8)
    step = max(1, _CACHED_WORDS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        bits = np.unpackbits(rows[start : start + step].view(np.uint8), axis=1, bitorder="little")
        if bits[:, num_columns * num_bits :].any():
            raise ArtifactError("a packed tensor differs from what was computed: its padding is not zero")
        for bit in range(num_bits):
            out[start : start + step] |= bits[:, bit : num_columns * num_bits : num_bits] << np.uint8(bit)
    return out


def shifted(values: Array, offset: int) -> Array:
    """Signed codes, int8, as unsigned ones."""
    return (values.astype(np.int16) + np.int16(offset)).astype(np.uint8)


def digest(again: Again) -> str:
    """The hash of an array's bytes as `shards.tensor_sha256` takes it of a tensor."""
    kind, value = again
    found = hashlib.sha256(f"{kind}{tuple(value.shape)}".encode())
    found.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def raw(tensor: Tensor) -> Again:
    """A tensor as it is."""
    value = tensor.contiguous()
    bits = value.view(torch.int16) if value.dtype in (torch.float16, torch.bfloat16) else value
    return str(value.dtype), bits.numpy()


def as_float32(again: Again) -> Array:
    """The numbers of an array of floats, float32."""
    kind, value = again
    if kind == "torch.bfloat16":
        return (value.astype(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return value.view(np.float16).astype(np.float32) if kind == "torch.float16" else value.astype(np.float32)
