"""Choice of units against refitting by least squares on the inputs themselves, subset by subset."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from compress.prune.importance import kept_channels, kept_neurons, kept_pieces, without


def problem(channels: int, outputs: int = 3, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs `[T, I]` and a weight `[O, I]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix
    return x_TI, torch.randn(outputs, channels, generator=generator, dtype=torch.float64)


def left_over(x_TI: Tensor, w_OI: Tensor, kept: list[int]) -> float:
    """Output error power that is left when only `kept` channels are refitted; by least squares on the inputs."""
    y_TO = x_TI @ w_OI.t()
    if not kept:
        return float(y_TO.square().sum())
    found = torch.linalg.lstsq(x_TI[:, kept], y_TO).solution
    return float((x_TI[:, kept] @ found - y_TO).square().sum())


def inverse(x_TI: Tensor) -> Tensor:
    return torch.linalg.inv(x_TI.t() @ x_TI)


def test_cost_alone_is_the_error_after_refitting() -> None:
    x_TI, w_OI = problem(8)
    _, alone = kept_neurons(w_OI, inverse(x_TI), 7)
    slow = [left_over(x_TI, w_OI, [j for j in range(8) if j != i]) for i in range(8)]
    assert alone.tolist() == pytest.approx(slow, rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_one_at_a_time_is_backward_elimination(seed: int) -> None:
    x_TI, w_OI = problem(9, seed=seed)
    kept, _ = kept_neurons(w_OI, inverse(x_TI), 5, rounds=100)
    slow = list(range(9))
    while len(slow) > 5:
        slow = min((([i for i in slow if i != j]) for j in slow), key=lambda s: left_over(x_TI, w_OI, s))
    assert kept.tolist() == slow


def test_of_two_that_stand_in_for_each_other_one_stays() -> None:
    """Twins are each worth nothing alone; a score that does not follow what went would drop both."""
    x_TI, w_OI = problem(6)
    x_TI = torch.cat([x_TI, x_TI[:, :1] + 1e-4 * torch.randn(200, 1, dtype=torch.float64)], dim=1)
    w_OI = torch.cat([w_OI, w_OI[:, :1]], dim=1) * 1.0
    w_OI[:, [0, 6]] *= 10
    kept, _ = kept_neurons(w_OI, inverse(x_TI), 5, rounds=100)
    assert len({0, 6} & set(kept.tolist())) == 1


def test_pieces_go_evenly_from_groups() -> None:
    x_TI, w_OI = problem(12)
    pieces = list(torch.arange(12).split(2))
    group = [0, 0, 0, 1, 1, 1]
    kept, alone = kept_pieces(w_OI, inverse(x_TI), pieces, 4, group)
    assert [group[u] for u in kept] == [0, 0, 1, 1]
    slow = [left_over(x_TI, w_OI, [c for c in range(12) if c // 2 != u]) for u in range(6)]
    assert alone == pytest.approx(slow, rel=1e-8)
    free, _ = kept_pieces(w_OI, inverse(x_TI), pieces, 5)
    assert free == [u for u in range(6) if u != min(range(6), key=lambda u: slow[u])]


def test_pieces_are_found_as_well_as_any_pair() -> None:
    x_TI, w_OI = problem(8, seed=3)
    pieces = list(torch.arange(8).split(2))
    kept, _ = kept_pieces(w_OI, inverse(x_TI), pieces, 3)
    best = min(combinations(range(4), 3), key=lambda s: left_over(x_TI, w_OI, [c for c in range(8) if c // 2 in s]))
    assert tuple(kept) == best


def test_without_refits_and_inverts() -> None:
    x_TI, w_OI = problem(7)
    gone = torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool()
    w, smaller = without(w_OI, inverse(x_TI), gone)
    found = torch.linalg.lstsq(x_TI[:, ~gone], x_TI @ w_OI.t()).solution.t()
    torch.testing.assert_close(w, found)
    torch.testing.assert_close(smaller, inverse(x_TI[:, ~gone]))


def test_hidden_channels_by_energy() -> None:
    assert kept_channels(torch.tensor([3.0, 1.0, 2.0, 3.0]), 3).tolist() == [0, 2, 3]
