"""The verdict's rule, its intervals against known distributions, and its guards."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ArtifactError
from evaluators.gate import (
    EXIT_CODES,
    LEAST_WINDOWS,
    block_bounds,
    judge_accuracy,
    judge_perplexity,
    mcnemar,
    overall,
    t_quantile,
    wilson_lower,
)


def perplexity(loss: float, n: int = 200, spread: float = 0.01, **options: Any) -> Any:
    rng = np.random.default_rng(1)
    tokens = rng.integers(300, 512, n).astype(float)
    reference = rng.normal(3, 0.3, n) * tokens
    candidate = reference + (loss + rng.normal(0, spread, n)) * tokens
    return judge_perplexity(reference, candidate, tokens, **{"threshold": 0.98, **options})


def items(both: int, lost: int, won: int, none: int) -> tuple[np.ndarray, np.ndarray]:
    reference = np.repeat([True, True, False, False], [both, lost, won, none])
    candidate = np.repeat([True, False, True, False], [both, lost, won, none])
    return reference, candidate


def test_three_states_of_perplexity() -> None:
    assert perplexity(0.005).outcome == "PASS"
    assert perplexity(0.05).outcome == "FAIL"
    unsure = perplexity(-math.log(0.98) + 0.002, n=20, spread=0.05)
    assert unsure.outcome == "INCONCLUSIVE" and unsure.recovery.lower < 0.98 < unsure.recovery.upper
    assert unsure.needed is not None and unsure.needed > 20
    assert perplexity(-math.log(0.98) + 0.002, n=20, spread=0.05, rule="point").outcome in ("PASS", "FAIL")


def test_recovery_is_the_ratio_of_perplexities() -> None:
    rng = np.random.default_rng(0)
    tokens = np.array([10.0, 500.0, 90.0] * 5)
    reference, candidate = rng.random(15) * tokens, rng.random(15) * tokens
    found = judge_perplexity(reference, candidate, tokens, threshold=0.98).recovery.value
    expected = math.exp(reference.sum() / tokens.sum()) / math.exp(candidate.sum() / tokens.sum())
    assert found == pytest.approx(expected, rel=1e-12)


def test_itself_is_exactly_one_and_only_if_said_to_be() -> None:
    nll, tokens = np.random.default_rng(0).random(3), np.full(3, 511.0)
    same = judge_perplexity(nll, nll, tokens, threshold=1.0, identical=True)
    assert (same.outcome, same.recovery.lower, same.recovery.value) == ("PASS", 1.0, 1.0)
    assert judge_perplexity(nll, nll, tokens, threshold=0.98).outcome == "INCONCLUSIVE"  # too few windows


def test_few_windows_are_no_evidence() -> None:
    few = perplexity(0.0001, n=LEAST_WINDOWS - 1)
    assert few.outcome == "INCONCLUSIVE" and "too few" in few.reason
    assert perplexity(0.0001, n=LEAST_WINDOWS).outcome == "PASS"


def test_non_finite_scores_name_the_window() -> None:
    nll = np.ones(10)
    bad = nll.copy()
    bad[4] = np.nan
    with pytest.raises(ArtifactError, match="candidate's score of window 4"):
        judge_perplexity(nll, bad, np.full(10, 5.0), threshold=0.98)


def test_interval_agrees_with_students_t_on_independent_windows() -> None:
    """Averaged over samples, the bounds lie where t puts them, or a little outside, never inside."""
    rng = np.random.default_rng(3)
    widths = []
    for _ in range(40):
        gain = rng.normal(0, 1, 64)
        low, high = block_bounds(gain, np.ones(64), confidence=0.95, draws=2000)
        widths.append((high - low) / (2 * 1.669 * gain.std(ddof=1) / 8))
    assert 0.95 < np.mean(widths) < 1.3


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.95, 4, 2.1318), (0.95, 10, 1.8125), (0.99, 6, 3.1427), (0.975, 30, 2.0423), (0.95, 3, 2.3534)],
)
def test_t_quantile_against_the_tables(probability: float, degrees: int, expected: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=5e-3)


def test_three_states_of_accuracy() -> None:
    assert judge_accuracy("t", *items(3000, 5, 5, 990), chance=0.25, threshold=0.98).outcome == "PASS"
    assert judge_accuracy("t", *items(2000, 300, 50, 650), chance=0.25, threshold=0.98).outcome == "FAIL"
    unsure = judge_accuracy("t", *items(60, 3, 2, 35), chance=0.25, threshold=0.98)
    assert unsure.outcome == "INCONCLUSIVE" and unsure.needed is not None and unsure.needed > 100
    assert unsure.recovery.value == pytest.approx(62 / 63)
    assert unsure.corrected is not None and unsure.corrected.value == pytest.approx((0.62 - 0.25) / (0.63 - 0.25))
    assert unsure.mcnemar_p == pytest.approx(1.0)


def test_no_difference_in_a_sample_is_no_certainty() -> None:
    """100 items without one difference: up to 3 % of items may differ (rule of three), of 50 right ones 6 %."""
    verdict = judge_accuracy("t", *items(50, 0, 0, 50), chance=None, threshold=0.98)
    assert verdict.outcome == "INCONCLUSIVE" and 0.92 < verdict.recovery.lower < 0.97
    assert judge_accuracy("t", *items(50, 0, 0, 50), chance=None, threshold=0.98, identical=True).outcome == "PASS"


@pytest.mark.parametrize("rule", ["bounds", "point"])
def test_a_task_at_chance_is_refused(rule: Any) -> None:
    verdict = judge_accuracy("arc", *items(250, 10, 10, 730), chance=0.25, threshold=0.5, rule=rule)
    assert verdict.outcome == "INCONCLUSIVE" and "not above chance (25.0%)" in verdict.reason
    nothing = judge_accuracy("lambada", *items(0, 0, 5, 95), chance=None, threshold=0.98, rule=rule)
    assert nothing.outcome == "INCONCLUSIVE" and math.isnan(nothing.recovery.value)


@given(lost=st.integers(0, 40), won=st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    n, k = lost + won, min(lost, won)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands() -> None:
    assert 0 < mcnemar(5000, 5200) < 0.1


def test_wilson_lower_is_where_the_normal_test_turns() -> None:
    p = wilson_lower(60, 100, 0.95)
    assert (0.6 - p) / math.sqrt(p * (1 - p) / 100) == pytest.approx(1.6449, abs=1e-3)


def test_the_worst_verdict_counts() -> None:
    good, bad, unsure = perplexity(0.001), perplexity(0.1), perplexity(0.02, n=20, spread=0.1)
    assert overall([good]) == "PASS"
    assert overall([good, unsure]) == "INCONCLUSIVE"
    assert overall([unsure, bad, good]) == "FAIL"
    assert EXIT_CODES == {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}


def test_same_seed_same_verdict() -> None:
    assert perplexity(0.02, seed=5) == perplexity(0.02, seed=5)


def test_losses_beyond_what_floats_can_hold_are_judged() -> None:
    """Case: a mean loss above 709 nats was an OverflowError."""
    reference, tokens = np.full(30, 64 * 3.0), np.full(30, 64.0)
    bad = judge_perplexity(reference, np.linspace(64 * 800.0, 64 * 900.0, 30), tokens, threshold=0.98)
    assert bad.outcome == "FAIL" and bad.recovery.upper == 0.0
    good = judge_perplexity(np.linspace(64 * 800.0, 64 * 900.0, 30), reference, tokens, threshold=0.98)
    assert good.outcome == "PASS" and math.isinf(good.recovery.value)
    torn = judge_perplexity(reference + np.linspace(-1, 1, 30) * 1e6, reference, tokens, threshold=0.98)
    assert torn.outcome == "INCONCLUSIVE"
