"""Refitted scales against a plain least-squares solver, and the promise that no row gets worse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import numerics
from compress.quantize import awq
from compress.quantize.feedback import Rounded, prepare, round_with_feedback
from compress.quantize.refit import RIDGE, refit_scales
from compress.scheme import Scheme

SCHEME = Scheme(group_size=16)


def problem(seed: int) -> tuple[Rounded, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 48, generator=generator) @ (torch.randn(48, 48, generator=generator) / 7 + torch.eye(48))
    w_OI, gram_II = torch.randn(20, 48, generator=generator) * 0.1, x.t() @ x / 200
    return round_with_feedback(w_OI, prepare(gram_II, SCHEME), SCHEME), w_OI, gram_II


@pytest.mark.parametrize("off_diagonal", [1.0, 0.7])
def test_solves_the_ridge_regression_of_each_row(off_diagonal: float) -> None:
    rounded, w_OI, gram_II = problem(0)
    new_OG = refit_scales(rounded, w_OI, gram_II, SCHEME, off_diagonal)
    gram_II = gram_II * off_diagonal + torch.diag(gram_II.diagonal()) * (1 - off_diagonal)
    root = torch.linalg.cholesky(gram_II.double() + 1e-9 * torch.eye(48)).t()  # G = R^T R, so errors are |R d|
    changed = 0
    for row in range(len(w_OI)):
        steps = (rounded.codes_OI[row].double() - rounded.zero_point_OG[row].double().repeat_interleave(16)).reshape(
            3, 16
        )
        design = torch.block_diag(*steps)  # [3, 48]: one group a row
        design = root @ design.t()
        ridge = RIDGE * float((design.t() @ design).diagonal().mean())
        stacked = torch.cat([design, ridge**0.5 * torch.eye(3)])
        target = torch.cat([root @ w_OI[row].double(), ridge**0.5 * rounded.scale_OG[row].double()])
        slow = numerics.round_scale(torch.linalg.lstsq(stacked, target).solution.float())
        if not torch.equal(new_OG[row], rounded.scale_OG[row]):
            changed += 1
            torch.testing.assert_close(new_OG[row], slow, rtol=2e-3, atol=0)
    assert changed > len(w_OI) / 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_no_row_gets_worse(seed: int) -> None:
    rounded, w_OI, gram_II = problem(seed)
    new_OG = refit_scales(rounded, w_OI, gram_II, SCHEME)
    assert torch.equal(new_OG, numerics.round_scale(new_OG)) and bool((new_OG > 0).all())

    def errors(scale_OG: torch.Tensor) -> torch.Tensor:
        steps = numerics.to_groups(rounded.codes_OI, SCHEME).float() - rounded.zero_point_OG.unsqueeze(-1)
        return awq.row_errors((steps * scale_OG.unsqueeze(-1)).reshape(w_OI.shape) - w_OI, gram_II)

    assert bool((errors(new_OG) <= errors(rounded.scale_OG) * (1 + 1e-5)).all())


def test_a_row_of_zeros_keeps_its_scales() -> None:
    rounded, w_OI, gram_II = problem(1)
    w_OI[3] = 0
    rounded = round_with_feedback(w_OI, prepare(gram_II, SCHEME), SCHEME)
    assert torch.equal(refit_scales(rounded, w_OI, gram_II, SCHEME)[3], rounded.scale_OG[3])
