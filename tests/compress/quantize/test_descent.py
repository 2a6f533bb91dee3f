"""Descent on the noise model: its gradient, and that what it learns holds of tokens that it has not seen."""

import pytest
import torch
from torch import Tensor

from compress import activations
from compress.plan import ActivationScheme
from compress.quantize.descent import Noise, _pooling, _turn, descended

SCHEMES = [
    ActivationScheme(),
    ActivationScheme(symmetric=False),
    ActivationScheme(dynamic=False),
    ActivationScheme(symmetric=False, dynamic=False),
]


def heavy_tails(tokens: int, size: int, seed: int) -> Tensor:
    """Products of normal values with a size by channel: what reaches `down_proj`, every token's largest elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator) * torch.randn(tokens, size, generator=generator)
    return x * torch.exp(0.7 * torch.randn(size, generator=torch.Generator().manual_seed(99)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=ActivationScheme.label)
def test_the_gradient_is_that_of_the_error_it_returns(scheme: ActivationScheme) -> None:
    """Central differences in float64; a channel that sets a step is as good a place as any, but no two do at once."""
    x_SI = heavy_tails(600, 96, 0).double()
    x_SI[:, ::13] *= 20
    x_SI[5, 7] *= 500
    w_OI = torch.randn(48, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.1
    noise = Noise(norm_I=w_OI.square().sum(0), power_I=x_SI.square().mean(0), num_rows=96, weight_share=0.3)

    def error_and_gradient(log_s: Tensor) -> tuple[Tensor, Tensor]:
        return noise.error_and_gradient(log_s.exp(), w_OI, x_SI, scheme)

    log_s = torch.randn(96, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.1
    _, gradient_I = error_and_gradient(log_s)
    for channel in (0, 7, 13, 50, 95):
        step_I = torch.zeros(96, dtype=torch.float64)
        step_I[channel] = 1e-6
        above, below = error_and_gradient(log_s + step_I)[0], error_and_gradient(log_s - step_I)[0]
        expected = float(above.log() - below.log()) / 2e-6
        # The minimum in E has kinks: a value that is about to be lost jumps from one side to the other.
        assert abs(float(gradient_I[channel]) - expected) < 1e-4 + 0.02 * abs(expected)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=ActivationScheme.label)
def test_what_is_learnt_on_many_tokens_holds_on_others(scheme: ActivationScheme) -> None:
    size = 256
    w_OI = torch.randn(64, size, generator=torch.Generator().manual_seed(3)) * 0.1
    seen_SI, unseen_SI = heavy_tails(8192, size, 4), heavy_tails(2048, size, 5)

    def true_error(s_I: Tensor) -> float:
        rows_SI = unseen_SI / s_I
        change_SI = activations.fake_quantize(rows_SI, scheme) - rows_SI
        return float((change_SI @ (w_OI * s_I).t()).square().sum(1).mean())

    power_I = seen_SI.square().mean(0)
    many, few = (descended(torch.ones(size), w_OI, power_I, rows, scheme) for rows in (seen_SI, seen_SI[:64]))
    assert true_error(many) < 0.5 * true_error(torch.ones(size))
    assert true_error(many) < 0.98 * true_error(few)


def test_every_token_has_its_turn_as_often_as_any_other() -> None:
    rows = torch.arange(1000)
    turns = [_turn(rows, 256, step) for step in range(1, 9)]
    assert [len(turn) for turn in turns] == [250] * 8
    assert torch.bincount(torch.cat(turns), minlength=1000).tolist() == [2] * 1000
    assert torch.equal(_turn(rows[:7], 256, 3), rows[:7])


@pytest.mark.parametrize("shared", [[0, 1, 2, 3], [2, 0, 1, 3], [0, 0, 1, 1, 0, 1], [0, 0, 1, 0]])
def test_channels_of_one_scale_are_added_up(shared: list[int]) -> None:
    index, pooled = _pooling(torch.tensor(shared), torch.device("cpu"))
    values = torch.arange(1.0, len(shared) + 1)
    expected = [sum(float(v) for v, s in zip(values, shared, strict=True) if s == k) for k in range(max(shared) + 1)]
    assert index.tolist() == shared and pooled(values).tolist() == expected
