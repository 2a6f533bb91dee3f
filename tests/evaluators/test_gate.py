"""The gate on simulated pairs whose true recovery is known."""

import math

import numpy as np
import pytest

from evaluators.gate import FAIL, INCONCLUSIVE, PASS, judge


def pairs(recovery: float, windows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Window scores as language models have them: widely spread, with a small, noisy difference."""
    generator = np.random.default_rng(seed)
    reference = 3.0 + 0.4 * generator.standard_normal(windows)
    loss = -math.log(recovery) + 0.02 * generator.standard_normal(windows)
    return reference, reference + loss


def test_itself_recovers_exactly_one() -> None:
    reference, _ = pairs(1.0, 50, 0)
    verdict = judge(reference, reference, threshold=0.98)
    assert (verdict.outcome, verdict.recovery, verdict.lower, verdict.upper) == (PASS, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("recovery", "outcome"), [(0.94, FAIL), (0.96, FAIL), (0.995, PASS)])
def test_clear_cases(recovery: float, outcome: str) -> None:
    verdict = judge(*pairs(recovery, 100, 1), threshold=0.98)
    assert verdict.outcome == outcome
    assert verdict.lower < verdict.recovery < verdict.upper
    assert verdict.windows_needed is None


def test_undecided_says_how_much_more() -> None:
    reference, candidate = pairs(0.982, 30, 6)
    verdict = judge(reference, candidate, threshold=0.98)
    assert verdict.outcome == INCONCLUSIVE
    assert verdict.windows_needed is not None and verdict.windows_needed > 30


def test_interval_is_that_of_the_mean_difference() -> None:
    """For many windows the bootstrap agrees with the normal interval of the paired mean."""
    reference, candidate = pairs(0.97, 400, 3)
    gain = reference - candidate
    half = 1.645 * gain.std(ddof=1) / math.sqrt(len(gain))
    verdict = judge(reference, candidate, threshold=0.9)
    assert verdict.lower == pytest.approx(math.exp(gain.mean() - half), abs=3e-4)
    assert verdict.upper == pytest.approx(math.exp(gain.mean() + half), abs=3e-4)


def test_false_passes_are_rare() -> None:
    """At a true recovery just at the threshold a PASS is an error; at most 5 % plus what 200 trials scatter."""
    passes = sum(judge(*pairs(0.98, 60, seed), threshold=0.98).outcome == PASS for seed in range(200))
    assert passes <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)


def test_same_seed_same_bounds() -> None:
    data = pairs(0.98, 60, 9)
    assert judge(*data, threshold=0.98) == judge(*data, threshold=0.98)
