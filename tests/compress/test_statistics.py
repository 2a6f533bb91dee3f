"""What a method is told of a linear's inputs, against all the inputs at once."""

import pytest
import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.statistics import InputStatistics, Wanted, collecting

TOKENS, SIZE = 300, 12


def inputs() -> Tensor:
    x_TI = torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(0))
    x_TI[:, 3] = x_TI[:, 3].abs() + 1  # a channel that is never zero
    return x_TI


def collected(batch: int, wanted: Wanted) -> InputStatistics:
    block = nn.Sequential(nn.Linear(SIZE, 4, bias=False))
    group = Group(layers=("0",), in_features=SIZE, fold=None, reason="")
    with collecting(block, [group], torch.device("cpu"), wanted, wanted.positions(TOKENS)) as collector:
        for part in inputs().split(batch):
            block(part.unsqueeze(0))
    return collector.statistics[0]


@pytest.mark.parametrize("batch", [TOKENS, 70, 1])
def test_ranges_and_rows_do_not_depend_on_the_batches(batch: int) -> None:
    wanted = Wanted(ranges=True, rows=40)
    found, x_TI = collected(batch, wanted), inputs()
    assert found.low_I is not None and found.high_I is not None and found.rows_SI is not None
    assert torch.equal(found.low_I, x_TI.amin(0)) and torch.equal(found.high_I, x_TI.amax(0))
    assert torch.equal(found.amax_I, x_TI.abs().amax(0))
    assert torch.equal(found.rows_SI, x_TI[wanted.positions(TOKENS)])
    torch.testing.assert_close(found.gram_II, x_TI.t() @ x_TI / TOKENS)


def test_positions_are_fixed_sorted_and_as_many_as_there_are() -> None:
    wanted = Wanted(rows=50)
    positions = wanted.positions(1000)
    assert torch.equal(positions, wanted.positions(1000)) and len(positions.unique()) == 50
    assert torch.equal(positions, positions.sort().values) and int(positions.max()) < 1000
    assert wanted.positions(7).tolist() == list(range(7))


def test_what_is_not_wanted_is_not_held() -> None:
    found = collected(70, Wanted(gram=False, ranges=True))
    assert found.gram_II.numel() == 0 and found.rows_SI is None
    assert found.num_tokens == TOKENS
    assert collected(70, Wanted()).low_I is None


def test_smoothing_is_that_of_the_inputs_divided() -> None:
    found, s_I = collected(70, Wanted(ranges=True, rows=40)), torch.rand(SIZE) + 0.5
    found.smooth_(s_I)
    x_TI = inputs() / s_I
    assert found.low_I is not None and found.high_I is not None and found.rows_SI is not None
    torch.testing.assert_close(found.low_I, x_TI.amin(0))
    torch.testing.assert_close(found.high_I, x_TI.amax(0))
    torch.testing.assert_close(found.rows_SI, x_TI[Wanted(rows=40).positions(TOKENS)])
    torch.testing.assert_close(found.gram_II, x_TI.t() @ x_TI / TOKENS)
