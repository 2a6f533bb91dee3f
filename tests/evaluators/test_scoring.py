"""Scores from running sums over slices of the vocabulary, against softmax in float64 over all of it."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ArtifactError
from compress.runtime.runner import Span
from evaluators.scoring import RunningSoftmax, batches, compare_at, score_all


class Table:
    """Logits that are there already, `[T, V]` a sequence; counts how often it was asked."""

    def __init__(self, logits: list[torch.Tensor], ids_at_once: int) -> None:
        self.table, self.ids_at_once, self.asked = logits, ids_at_once, 0
        self.vocab_size = logits[0].shape[-1]

    def at(self, spans: Sequence[Span], ids: range) -> torch.Tensor:
        self.asked += 1
        assert len(ids) <= self.ids_at_once
        return torch.cat([self.table[s.sequence][s.start : s.stop, ids.start : ids.stop] for s in spans])

    def logits(self, index: int, start: int, stop: int) -> torch.Tensor:
        return self.table[index][start:stop]

    def close(self) -> None: ...


def tables(seed: int, spread: float, vocab_size: int = 50) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.randn(n, vocab_size, generator=generator) * spread for n in (7, 1, 4)]
    return ours, [t + 0.1 * torch.randn(t.shape, generator=generator) + 3 for t in ours]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.sampled_from([0.1, 3.0, 60.0]), st.integers(1, 60), st.integers(1, 60))
def test_slices_leave_no_trace(seed: int, spread: float, ours: int, theirs: int) -> None:
    r, c = tables(seed, spread)
    spans = [Span(0, 2, 7), Span(2, 0, 3), Span(1, 0, 1)]
    target_P = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(seed))
    found = compare_at(Table(r, ours), Table(c, theirs), spans, target_P)
    r_PV, c_PV = (torch.cat([t[s.sequence][s.start : s.stop] for s in spans]).double() for t in (r, c))
    log_r_PV, log_c_PV = r_PV.log_softmax(-1), c_PV.log_softmax(-1)
    pick = (torch.arange(9), target_P)
    torch.testing.assert_close(found.nll_reference_P, -log_r_PV[pick], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nll_candidate_P, -log_c_PV[pick], rtol=1e-5, atol=1e-5)
    kl_P = (log_r_PV.exp() * (log_r_PV - log_c_PV)).sum(-1)
    torch.testing.assert_close(found.kl_P, kl_P, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.mse_P, (r_PV - c_PV).square().mean(-1), rtol=1e-5, atol=1e-5)
    assert found.same_top_P.tolist() == (r_PV.argmax(-1) == c_PV.argmax(-1)).tolist()
    assert found.right_reference_P.tolist() == (r_PV.argmax(-1) == target_P).tolist()
    assert found.right_candidate_P.tolist() == (c_PV.argmax(-1) == target_P).tolist()
    assert (found.nll_reference_P - score_all(Table(r, ours), [(s, target_P[a:b]) for s, a, b in
            ((spans[0], 0, 5), (spans[1], 5, 8))])[1][0].sum()).isfinite().all()  # fmt: skip


def test_a_model_against_itself_differs_by_exactly_nothing() -> None:
    r, _ = tables(0, 60.0)
    found = compare_at(Table(r, 7), Table(r, 7), [Span(0, 0, 7)], torch.arange(7))
    assert not found.kl_P.any() and not found.mse_P.any() and found.same_top_P.all()
    assert torch.equal(found.nll_reference_P, found.nll_candidate_P)


def test_losses_beyond_what_exp_can_hold_are_numbers() -> None:
    running = RunningSoftmax(torch.tensor([0]))
    running.add(torch.tensor([[0.0, 2000.0]]), 0)
    assert running.nll_P().tolist() == [2000.0] and not running.is_top_P().any()


@pytest.mark.parametrize("which", ["reference", "candidate"])
def test_what_is_not_finite_is_named(which: str) -> None:
    r, c = tables(0, 1.0)
    (r if which == "reference" else c)[2][1, 40] = torch.nan
    with pytest.raises(ArtifactError, match=f"the {which}'s logits after token 1 of sequence two are not finite"):
        compare_at(
            Table(r, 9), Table(c, 9), [Span(0, 0, 7), Span(2, 0, 4)], torch.zeros(11, dtype=torch.int64),
            ["zero", "one", "sequence two"].__getitem__,
        )  # fmt: skip


def test_other_vocabularies_are_refused() -> None:
    r, _ = tables(0, 1.0)
    with pytest.raises(ArtifactError, match="has 49 entries and the reference's 50"):
        compare_at(Table(r, 50), Table([t[:, :49] for t in r], 50), [Span(0, 0, 1)], torch.tensor([0]))


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 9))
def test_batches_hold_everything_in_order(lengths: list[int], most: int) -> None:
    wanted = [(Span(i, 3, 3 + n), torch.arange(n) + 100 * i) for i, n in enumerate(lengths)]
    found = list(batches(wanted, most))
    assert all(sum(s.stop - s.start for s in spans) == len(target) <= most for spans, target in found)
    targets = torch.cat([t for _, t in found]).tolist() if found else []
    assert targets == [100 * i + k for i, n in enumerate(lengths) for k in range(n)]
    places = [(s.sequence, p) for spans, _ in found for s in spans for p in range(s.start, s.stop)]
    assert places == [(i, 3 + k) for i, n in enumerate(lengths) for k in range(n)]
    assert len(found) <= 1 + 2 * sum(lengths) / most, "batches are filled"
