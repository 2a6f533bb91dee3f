"""Where a GPU's time goes, of spans that may cover each other."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from busy import shares, union  # noqa: E402


def test_union_counts_what_is_covered_once() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (1, 2), (6, 8)]) == 6
    assert union([]) == 0


def test_messages_under_kernels_cost_nothing_alone() -> None:
    spans = [(0.0, 4000.0, "gemm"), (3000.0, 6000.0, "ncclDevKernel"), (8000.0, 10000.0, "gemm")]
    found = shares(spans, steps=2)
    assert {k: found[k] for k in ("whole", "kernels", "messages", "messages_alone", "idle")} == {
        "whole": 5.0, "kernels": 3.0, "messages": 1.5, "messages_alone": 1.0, "idle": 1.0,
    }  # fmt: skip
    assert list(found["top"].items()) == [("gemm", pytest.approx(3.0)), ("ncclDevKernel", pytest.approx(1.5))]
