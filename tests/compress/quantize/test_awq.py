"""The Gram-matrix algorithms against the activations they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import numerics
from compress.quantize import awq
from compress.scheme import Scheme
from compress.statistics import InputStatistics

SCHEME = Scheme(group_size=32)


def inputs(seed: int = 0, tokens: int = 400, size: int = 64) -> torch.Tensor:
    """Activations with a few outlier channels, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator)
    x[:, ::13] *= 30
    return x


def statistics_of(*batches: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(batches[0].shape[1], torch.device("cpu"))
    for batch in batches:
        statistics.add(batch)
    statistics.finish()
    return statistics


def test_statistics_are_the_mean_outer_product_and_add_up() -> None:
    x = inputs(size=1100)  # more than one tile
    together, parts = statistics_of(x), statistics_of(x[:100], x[100:])
    expected = x.double().t() @ x.double() / len(x)
    torch.testing.assert_close(together.gram_II.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.gram_II, together.gram_II, rtol=1e-4, atol=1e-3)
    assert torch.equal(together.gram_II, together.gram_II.t())
    torch.testing.assert_close(together.magnitude_I, x.abs().mean(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_output_error_is_the_error_of_the_outputs(seed: int) -> None:
    x = inputs(seed)
    delta = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed + 1)) * 0.01
    direct = float((x.double() @ delta.double().t()).square().sum(1).mean())
    assert abs(awq.output_error(delta, statistics_of(x).gram_II) - direct) < 1e-3 * direct


def test_smoothed_gram_is_the_gram_of_smoothed_inputs() -> None:
    x = inputs()
    s_I = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.5
    expected = statistics_of(x / s_I).gram_II
    statistics = statistics_of(x)
    statistics.smooth_(s_I)
    torch.testing.assert_close(statistics.gram_II, expected, rtol=1e-4, atol=1e-4)


def test_search_beats_round_to_nearest_on_outlier_channels() -> None:
    """Outlier channels are what AWQ is for: its output error must be clearly below the identity's."""
    x, w_OI = inputs(), torch.randn(48, 64, generator=torch.Generator().manual_seed(5))
    statistics = statistics_of(x)
    choice = awq.search_scale([w_OI], statistics.gram_II, statistics.magnitude_I, SCHEME)
    s_I = choice.s_I
    quantized = numerics.round_to_nearest(w_OI * s_I, SCHEME) / s_I
    plain = numerics.round_to_nearest(w_OI, SCHEME)
    error = float((x @ (quantized - w_OI).t()).square().mean())
    assert error < 0.5 * float((x @ (plain - w_OI).t()).square().mean())
    assert choice.error < choice.identity_error
    torch.testing.assert_close(s_I.max() * s_I.min(), torch.tensor(1.0), rtol=1e-3, atol=1e-3)


def test_search_finds_the_best_of_its_grid() -> None:
    """Every ratio of the fine grid around the winner, tried one by one, is no better."""
    x, w_OI = inputs(1), torch.randn(16, 64, generator=torch.Generator().manual_seed(6))
    statistics = statistics_of(x)
    choice = awq.search_scale([w_OI], statistics.gram_II, statistics.magnitude_I, SCHEME)
    weight_I = (w_OI.reshape(16, 2, 32).abs() / w_OI.reshape(16, 2, 32).abs().amax(-1, keepdim=True)).mean(0).flatten()
    for ratio in (0.2, 0.4, 0.6, 0.8, 1.0):
        for s_I in awq.scales_of(statistics.magnitude_I, weight_I, [(ratio, False), (ratio, True)]):
            delta = numerics.round_to_nearest(w_OI * s_I, SCHEME) / s_I - w_OI
            assert choice.error <= awq.output_error(delta, statistics.gram_II) * (1 + 1e-6)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_candidates_tried_at_once_lose_what_they_lose_one_by_one(at_once: int) -> None:
    """At Gemma-3-270M's width, whose groups of 64 are ten."""
    generator = torch.Generator().manual_seed(11)
    w_OI, scheme = torch.randn(96, 640, generator=generator) * 0.02, Scheme(group_size=64)
    x = torch.randn(2000, 640, generator=generator) * torch.rand(640, generator=generator).mul(3).exp()
    gram_II = statistics_of(x).gram_II
    scales_SI = awq.scales_of(x.abs().mean(0), w_OI.abs().mean(0), [(r / 6, bool(r % 2)) for r in range(7)])
    found = awq.rounding_errors(w_OI, scales_SI, gram_II, scheme, at_once=at_once)
    for s_I, error in zip(scales_SI, found, strict=True):
        delta = (numerics.round_to_nearest(w_OI * s_I, scheme) / s_I - w_OI).double()
        expected = float(((delta @ gram_II.double()) * delta).sum())
        assert abs(error - expected) < 1e-5 * expected


def test_channels_of_one_row_share_a_scale() -> None:
    x, w_OI = inputs(2), torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    shared = torch.arange(64) % 16
    statistics = statistics_of(x)
    choice = awq.search_scale([w_OI], statistics.gram_II, statistics.magnitude_I, SCHEME, shared)
    assert choice.ratio > 0
    assert torch.equal(choice.s_I, choice.s_I[:16].repeat(4))


def test_dead_channels_give_finite_scales() -> None:
    x = inputs(3)
    x[:, 5] = 0
    w_OI = torch.randn(16, 64, generator=torch.Generator().manual_seed(8))
    w_OI[:, 9] = 0
    statistics = statistics_of(x)
    choice = awq.search_scale([w_OI], statistics.gram_II, statistics.magnitude_I, SCHEME)
    assert bool(torch.isfinite(choice.s_I).all()) and bool((choice.s_I > 0).all())
