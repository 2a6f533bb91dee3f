"""Which rows are fitted on and which judge: each row once, nothing fitted to the watched text."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.prune.kinds import Kind, Kinds, parts_of

KINDS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=3).map(
    lambda counts: Kinds(
        tuple(
            Kind(name=name, fitted=fitted, held=held)
            for name, (fitted, held) in zip(("text", "own", "watched"), counts, strict=False)
            if fitted + held
        )
    )
)


@given(KINDS, st.integers(1, 9))
def test_every_row_is_fitted_on_or_judges(kinds: Kinds, batch: int) -> None:
    count = sum(part.count for part in kinds.parts)
    ranges = [*kinds.fitted, *kinds.held.values()]
    assert sorted(row for some in ranges for row in some) == list(range(count))
    if count:
        ids = torch.arange(count)
        batches = list(ids.split(batch))
        for some in ranges:
            assert torch.equal(torch.cat([batches[i][part] for i, part in parts_of(batches, some)]), ids[some])
    assert Kinds.from_json(kinds.to_json()) == kinds


@given(KINDS, st.integers(1, 40), st.integers(1, 9))
def test_fewer_rows_keep_their_part(kinds: Kinds, fitted: int, held: int) -> None:
    """Those that were fitted on are, those that judged do, of every kind that there was."""
    chosen, few = kinds.some(fitted, held)
    for before, after in zip(kinds.fitted, few.fitted, strict=True):
        assert {chosen[row] for row in after} <= set(before)
    assert kinds.held.keys() == few.held.keys()
    for name, rows in few.held.items():
        assert [chosen[row] for row in rows] == list(kinds.held[name][:held])
    assert sum(map(len, few.fitted)) <= max(fitted + 2, len(kinds.fitted))


@given(KINDS.filter(lambda kinds: bool(kinds.parts)), st.integers(1, 40))
def test_the_first_rows_are_of_all_kinds(kinds: Kinds, most: int) -> None:
    found = kinds.first(most)
    assert len(set(found)) == len(found) <= max(most, len(kinds.parts))
    start = 0
    for part in kinds.parts:
        assert any(start <= row < start + part.count for row in found)
        start += part.count
