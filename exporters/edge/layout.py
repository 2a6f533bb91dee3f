"""Where the INT4 codes lie in the weights of Edge-LLM's Int4GroupwiseGemmPluginV2, read back by code of our own.

The plugin's weight is int8 `[ceil(N / 128) * ceil(K / 64) * 8, 512]`: one row is 128 little-endian 32-bit words, a word
holds eight codes, a code is biased by 8. In the order of memory the indices are

    N tile (128) | K tile (64) | K block (4) | N half (2) | lane (32) | lane (4) | byte (2, 2) | nibble (2)

and code (n, k) has n = tile, half, second byte bit, first lane index, and k = tile, block, nibble, second lane index,
first byte bit, each from the most to the least significant. Codes beyond N and K are 8, that is zero. Source: NVIDIA's
description of Int4GroupwiseGemmPluginV2 in the Edge-LLM 0.11 C++ reference for the shapes, and
tensorrt_edgellm 0.11.0, checkpoint/repacking.py, for the order.

Shapes: N out_features, K in_features
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import ArtifactError

TILE_N = 128
TILE_K = 64
ROW_BYTES = 512


def unpack_fragments(packed: Tensor, n: int, k: int) -> Tensor:
    """Codes uint8 `[N, K]` of int8 fragments `[rows, 512]`. Raises ArtifactError when the shape or padding is wrong."""
    tiles_n, tiles_k = -(-n // TILE_N), -(-k // TILE_K)
    if tuple(packed.shape) != (tiles_n * tiles_k * 8, ROW_BYTES) or packed.dtype != torch.int8:
        raise ArtifactError(
            f"INT4 weight of {n} x {k}: fragments are {packed.dtype} {tuple(packed.shape)}, but "
            f"({tiles_n * tiles_k * 8}, {ROW_BYTES}) int8 was expected"
        )
    byte = packed.view(torch.uint8)
    nibbles = torch.stack([byte & 15, byte >> 4], dim=-1)
    indexed = nibbles.reshape(tiles_n, tiles_k, 4, 2, 32, 4, 2, 2, 2)
    codes = indexed.permute(0, 3, 7, 4, 1, 2, 8, 5, 6).reshape(tiles_n * TILE_N, tiles_k * TILE_K)
    if bool((codes[n:] != 8).any()) or bool((codes[:, k:] != 8).any()):
        raise ArtifactError(f"INT4 weight of {n} x {k}: its padding holds codes other than 8; the layout is another")
    return codes[:n, :k].contiguous()
