"""Rotary tables against the formulas, one value at a time in Python's floats, and against transformers' frequencies."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.trt.graph.architecture import Rope
from exporters.trt.graph.rope import frequencies, tables


def slow(rope: Rope, index: int) -> float:
    plain = rope.theta ** (-2.0 * index / rope.dims)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / plain
        if wavelength < rope.original_context / rope.high_freq_factor:
            return plain
        if wavelength > rope.original_context / rope.low_freq_factor:
            return plain / rope.factor
        smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        return (1 - smooth) * plain / rope.factor + smooth * plain
    return plain


@given(
    st.sampled_from(["default", "linear", "llama3"]),
    st.integers(1, 64),
    st.floats(1e3, 1e6),
    st.floats(1, 32),
    st.integers(64, 8192),
)
def test_frequencies(kind: str, pairs: int, theta: float, factor: float, original: int) -> None:
    rope = Rope(theta=theta, dims=2 * pairs, kind=kind, factor=factor, original_context=original)  # type: ignore[arg-type]
    wanted = [slow(rope, i) for i in range(pairs)]
    assert frequencies(rope) == pytest.approx(wanted, rel=2e-5)


def test_llama3_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=128, rope_parameters=parameters)
    wanted, scaling = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    rope = Rope(theta=500000.0, dims=128, kind="llama3", factor=8.0)
    assert scaling == 1.0 and np.allclose(frequencies(rope), wanted.numpy(), rtol=1e-5, atol=0)


def test_tables_are_cosine_and_sine_of_position_times_frequency() -> None:
    rope = Rope(theta=1e4, dims=8)
    cos, sin = tables(rope, 5)
    for position in range(5):
        for index in range(4):
            angle = position * slow(rope, index)
            assert cos[position, index] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[position, index] == pytest.approx(math.sin(angle), abs=1e-6)
