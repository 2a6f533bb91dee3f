"""Layers in stacks: all of them, in their order, and no stack above the bound unless one layer is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.quantize import stacks


@given(st.lists(st.integers(1, 60), max_size=12))
def test_stacks_are_runs_and_as_long_as_they_may_be(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "STACKED_WEIGHTS", 50)
        named = {f"layer{i}": size for i, size in enumerate(sizes)}
        runs = stacks.stacks(named)
        assert [name for run in runs for name in run] == list(named)
        for run, following in zip(runs, [*runs[1:], None], strict=False):
            total = sum(named[name] for name in run)
            assert run and (total <= 50 or len(run) == 1)
            assert following is None or total + named[following[0]] > 50
