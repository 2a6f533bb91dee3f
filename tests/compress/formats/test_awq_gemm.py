"""The AutoAWQ layout: golden words, inverse, an independent unpacker, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ConfigError, UnsupportedError
from compress.formats import awq_gemm
from compress.formats.format import parts_of
from compress.formats.second_reader import digest, unpack_awq
from compress.plan import DENSE, ActivationScheme, LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme
from compress.shards import tensor_sha256


@pytest.mark.parametrize(
    ("codes", "word"),
    [(range(8), 0x75316420), (range(8, 16), 0xFDB9ECA8), ([8] * 8, 0x88888888)],
    ids=["0..7", "8..15", "all 8"],
)
def test_golden_words(codes: list[int], word: int) -> None:
    assert int(awq_gemm.pack_columns(torch.tensor([list(codes)]))[0, 0]) & 0xFFFFFFFF == word


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_unpack_is_the_inverse_by_both_unpackers(rows: int, words: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, words * 8), generator=torch.Generator().manual_seed(seed))
    packed = awq_gemm.pack_columns(codes)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words)
    assert torch.equal(awq_gemm.unpack_columns(packed), codes.to(torch.uint8))
    assert np.array_equal(unpack_awq(packed.numpy()), codes.numpy())


def test_tensors_and_read() -> None:
    scheme = Scheme(group_size=16)
    generator = torch.Generator().manual_seed(0)
    q = QuantizedWeight(
        codes_OI=torch.randint(0, 16, (24, 32), dtype=torch.uint8, generator=generator),
        scale_OG=torch.rand(24, 2, generator=generator).half() + 0.1,
        zero_point_OG=torch.randint(0, 16, (24, 2), dtype=torch.uint8, generator=generator),
        scheme=scheme,
    )
    layer = LayerScheme(weight=scheme)
    parts = awq_gemm.tensors(q)
    assert {k: tuple(v.shape) for k, v in parts.items()} == {"qweight": (32, 3), "qzeros": (2, 3), "scales": (2, 24)}
    back = awq_gemm.read(parts, layer, "layer")
    assert torch.equal(back.codes_OI, q.codes_OI) and torch.equal(back.zero_point_OG, q.zero_point_OG)
    assert torch.equal(back.dequantize(), q.dequantize())
    again = awq_gemm.read_again(parts, layer)
    assert {key: digest(value) for key, value in again.items()} == {k: tensor_sha256(v) for k, v in parts_of(q).items()}


def check(scheme: Scheme, out_features: int, in_features: int, inputs: ActivationScheme | None = None) -> None:
    awq_gemm.check(LayerPlan({"l": LayerScheme(weight=scheme, input=inputs)}), {"l": (out_features, in_features)})


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="--bits 8"):
        check(Scheme(num_bits=8), 8, 128)
    with pytest.raises(UnsupportedError, match="out_features=12 is not a multiple of 8"):
        check(Scheme(), 12, 128)
    with pytest.raises(ConfigError, match="128 does not divide the 64 .*-size 64 or --group-size 32"):
        check(Scheme(), 8, 64)
    with pytest.raises(UnsupportedError, match="group-size -1"):
        check(Scheme(group_size=-1), 8, 64)
    with pytest.raises(UnsupportedError, match="holds no quantized inputs; .* for w4g128-a8"):
        check(Scheme(), 8, 128, ActivationScheme())


def test_config_is_what_readers_expect_and_reads_back() -> None:
    config = awq_gemm.config(LayerPlan({"lm_head": DENSE, "l": LayerScheme(weight=Scheme(symmetric=True))}))
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    assert awq_gemm.scheme_of(config) == Scheme()
    assert awq_gemm.scheme_of({"w_bit": 4, "q_group_size": 64}) == Scheme(group_size=64)
    with pytest.raises(UnsupportedError, match="marlin"):
        awq_gemm.scheme_of({"bits": 4, "group_size": 128, "version": "marlin"})
