"""Codes packed without a gap: against compressed-tensors, against whole numbers, and back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.formats import dense_words
from compress.formats.second_reader import unpack_dense


def codes_of(rows: int, columns: int, num_bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31))
def test_words_are_the_library_s_and_read_back_by_both_readers(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = codes_of(rows, columns, bits, seed)
    half = 2 ** (bits - 1)
    words = dense_words.pack(codes, bits)
    assert words.shape == (rows, dense_words.num_words(columns, bits))
    assert torch.equal(words, pack_to_int32((codes.to(torch.int16) - half).to(torch.int8), bits))
    assert torch.equal(dense_words.unpack(words, bits, columns), codes)
    assert (unpack_dense(words.numpy(), bits, columns) == codes.numpy()).all()
    theirs = unpack_from_int32(words, bits, torch.Size((rows, columns)))
    assert torch.equal(theirs.to(torch.int16) + half, codes.to(torch.int16))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_number_in_base_two(bits: int) -> None:
    codes = codes_of(1, 45, bits)
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes[0]))
    words = dense_words.pack(codes, bits)
    assert sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[0])) == number
