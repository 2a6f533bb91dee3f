"""The layout that the kernel reads, taken apart word by word as the kernel does; the kernel's own tests: tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.runtime.kernels import weight_only


def unpacked(packed: Tensor, num_bits: int, rows: int, columns: int) -> Tensor:
    """What lane, step and register of `weight_only.cu` make of the words, put where m16n8k16 takes them to be."""
    words = packed.numpy().view(np.uint32)
    out = torch.zeros(words.shape[0] * 16, words.shape[1] * 64, dtype=torch.float64)
    for block, tile, lane, step in np.ndindex(words.shape[0], words.shape[1], 32, 4):
        own = [int(w) for w in words[block, tile, :, lane].reshape(-1)]
        row, column = lane >> 2, tile * 64 + step // 2 * 32 + (lane & 3) * 8 + step % 2 * 4
        for register, value in enumerate(_registers(own, num_bits, step)):
            for element in range(2):
                out[block * 16 + row + 8 * (register % 2), column + 2 * (register // 2) + element] = value[element]
    return out[:rows, :columns]


def _registers(own: list[int], num_bits: int, step: int) -> list[tuple[float, float]]:
    """Pairs in the order of the instruction's registers: row, row + 8, row, row + 8."""
    if num_bits == 4:
        word = own[step]
        return [((word >> s) & 15, (word >> (s + 16)) & 15) for s in (0, 4, 8, 12)]
    if num_bits == 8:
        low, high = own[2 * step], own[2 * step + 1]
        return [((w >> s) & 255, (w >> (s + 8)) & 255) for w, s in ((low, 0), (high, 0), (low, 16), (high, 16))]
    pairs = np.array(own[4 * step : 4 * step + 4], dtype=np.uint32).view(np.float16)
    return [(float(pairs[2 * i]), float(pairs[2 * i + 1])) for i in range(4)]


@settings(max_examples=12, deadline=None)
@given(
    num_bits=st.sampled_from([4, 8, 16]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 18).map(lambda n: 8 * n),
    seed=st.integers(0, 2**31),
)
def test_every_code_lies_where_the_kernel_looks(num_bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if num_bits == 16:
        codes = torch.randn(rows, columns, generator=generator).half()
    else:
        codes = torch.randint(0, 2**num_bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = weight_only.pack_codes(codes, num_bits)
    assert packed.shape == (-(-rows // 16), -(-columns // 64), num_bits // 4, 32, 4)
    assert torch.equal(unpacked(packed, num_bits, rows, columns), codes.double())


def test_scales_and_zero_points_lie_by_rows() -> None:
    codes = torch.randint(0, 16, (24, 128), dtype=torch.uint8)
    scale, zero = torch.rand(24, 2), torch.randint(0, 16, (24, 2))
    packed = weight_only.pack(codes, scale, zero, 4)
    assert packed.scales is not None and packed.zeros is not None
    for row, group in np.ndindex(24, 2):
        assert packed.scales[row // 16, group, row % 16] == scale[row, group].half()
        assert packed.zeros[row // 16, group, row % 16] == zero[row, group]
    assert packed.group_size == 64 and packed.num_bytes() == 2 * 2 * 512 + 2 * 2 * 16 * 3


def test_gate_and_values_in_turn() -> None:
    gate, value = torch.arange(16.0)[:, None], 100 + torch.arange(16.0)[:, None]
    both = weight_only.interleaved(gate, value)[:, 0].tolist()
    assert both == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]


def test_groups_of_odd_size_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        weight_only.pack(torch.zeros(16, 96, dtype=torch.uint8), torch.ones(16, 2), torch.zeros(16, 2), 4)
