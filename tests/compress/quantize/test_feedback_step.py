"""The in-group step of error feedback against its definition in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.quantize.feedback_step import round_group

MAX_CODE = 15


def problem(num_rows: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, the factor of a correlated inverse Hessian, and a min-max scale and zero point for each row."""
    generator = torch.Generator().manual_seed(seed)
    w_Og = torch.randn(num_rows, size, generator=generator) * 0.05
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x = torch.randn(4 * size, size, generator=generator) @ mixing
    hessian = (x.t() @ x / len(x) + 0.01 * torch.eye(size)).double()
    upper_gg = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()
    lo, hi = w_Og.amin(1).clamp(max=0), w_Og.amax(1).clamp(min=0)
    scale_O = ((hi - lo) / MAX_CODE).clamp(min=1e-4)
    return w_Og, upper_gg, scale_O, (-lo / scale_O).round().clamp(0, MAX_CODE)


def assert_follows_definition(
    w_Og: Tensor, upper_gg: Tensor, scale_O: Tensor, zero_O: Tensor, codes_Og: Tensor, error_Og: Tensor
) -> None:
    """Walk the definition in float64 with the *given* codes: each must be the nearest allowed one (ties up to float32
    noise), and each error the one the definition gives. One code differs from another walk's only at such a tie, so
    this holds every later column to account as well."""
    w, upper, scale, zero = w_Og.double(), upper_gg.double(), scale_O.double(), zero_O.double()
    codes, size = codes_Og.double(), w.shape[1]
    w = w.clone()
    for j in range(size):
        ideal = (w[:, j] / scale).clamp(-zero, MAX_CODE - zero)
        assert ((codes[:, j] - zero) - ideal).abs().max() <= 0.5 + 2e-4, j
        e = (w[:, j] - (codes[:, j] - zero) * scale) / upper[j, j]
        torch.testing.assert_close(error_Og[:, j].double(), e, rtol=1e-3, atol=1e-5)
        w[:, j + 1 :] -= e[:, None] * upper[j, j + 1 :]


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    size=st.sampled_from([8, 32, 64, 96, 128]),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([0, 1, 7, 32, 128]),
)
def test_codes_and_errors_follow_the_definition(num_rows: int, size: int, seed: int, chunk: int) -> None:
    w_Og, upper_gg, scale_O, zero_O = problem(num_rows, size, seed)
    before = w_Og.clone()
    codes_Og, error_Og = round_group(w_Og, upper_gg, scale_O, zero_O, MAX_CODE, chunk=chunk)
    assert codes_Og.dtype == torch.uint8 and int(codes_Og.max()) <= MAX_CODE
    assert torch.equal(w_Og, before), "the caller's weights were changed"
    assert_follows_definition(w_Og, upper_gg, scale_O, zero_O, codes_Og, error_Og)


def test_without_correlation_it_is_round_to_nearest() -> None:
    w_Og, _, scale_O, zero_O = problem(33, 64, 0)
    codes_Og, _ = round_group(w_Og, torch.eye(64), scale_O, zero_O, MAX_CODE)
    nearest = ((w_Og / scale_O[:, None]).round() + zero_O[:, None]).clamp(0, MAX_CODE)
    assert torch.equal(codes_Og.float(), nearest)


def test_halves_round_to_even_and_codes_are_clamped() -> None:
    w_Og = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 99.0, -99.0, 0.0]])
    codes_Og, _ = round_group(w_Og, torch.eye(8), torch.ones(1), torch.full((1,), 8.0), MAX_CODE)
    assert codes_Og.tolist() == [[8, 10, 10, 8, 6, 15, 0, 8]]


def test_feedback_lowers_the_output_error() -> None:
    """Not a theorem for every row, but for the sum over many rows and correlated inputs it must show."""
    w_Og, upper_gg, scale_O, zero_O = problem(256, 128, 3)
    hessian = torch.cholesky_inverse(upper_gg.double(), upper=True)

    def loss(codes_Og: Tensor) -> float:
        delta = ((codes_Og.double() - zero_O[:, None]) * scale_O[:, None]) - w_Og.double()
        return float(((delta @ hessian) * delta).sum())

    fed_back, _ = round_group(w_Og, upper_gg, scale_O, zero_O, MAX_CODE)
    plain, _ = round_group(w_Og, torch.diag(upper_gg.diagonal()), scale_O, zero_O, MAX_CODE)
    assert loss(fed_back) < 0.9 * loss(plain)
