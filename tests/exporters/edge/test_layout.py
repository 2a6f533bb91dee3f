"""Reading back the INT4 fragments: against a packer that places one code at a time, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ArtifactError
from exporters.edge.layout import unpack_fragments


def pack_slowly(codes: np.ndarray) -> torch.Tensor:
    """One code at a time: where column k of row n lies, from the plugin's tiling of 128 x 64."""
    n, k = codes.shape
    tiles_n, tiles_k = -(-n // 128), -(-k // 64)
    words = np.zeros((tiles_n * tiles_k * 8, 128), dtype=np.uint32)
    for row in range(tiles_n * 128):
        for column in range(tiles_k * 64):
            code = int(codes[row, column]) if row < n and column < k else 8
            half, upper, lane = row % 128 // 64, row % 64 // 32, row % 32
            block, inner = column % 64 // 16, column % 16
            word = ((row // 128) * tiles_k + column // 64) * 8 + block * 2 + half
            thread = lane * 4 + inner % 8 // 2
            nibble = (inner % 2) * 4 + upper * 2 + inner // 8
            words[word, thread] |= np.uint32(code << (4 * nibble))
    return torch.from_numpy(words.view(np.int8))


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_reads_what_was_placed(half_tiles: int, tiles: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (half_tiles * 64, tiles * 64), dtype=np.uint8)
    found = unpack_fragments(pack_slowly(codes), *codes.shape)
    assert np.array_equal(found.numpy(), codes)


def test_refuses_another_shape_and_a_wrong_padding() -> None:
    packed = pack_slowly(np.full((64, 64), 3, dtype=np.uint8))
    with pytest.raises(ArtifactError, match=r"256 x 64: fragments are torch.int8 \(8, 512\), but \(16, 512\)"):
        unpack_fragments(packed, 256, 64)
    with pytest.raises(ArtifactError, match="padding holds codes other than 8"):
        unpack_fragments(torch.zeros_like(packed), 64, 64)
