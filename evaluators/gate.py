"""The accuracy gate: pure functions that say PASS, FAIL or INCONCLUSIVE about one metric, and about all of them.

Recovery is what the candidate keeps of the reference:

    perplexity   reference / candidate  =  exp(mean over tokens of (nll_reference - nll_candidate))
    accuracy     candidate / reference

Both models answer the same questions, so their scores rise and fall together, and the difference is known far better
than either score. With L and U the one-sided lower and upper bounds of the recovery at the asked confidence,

    PASS          when L >= threshold
    FAIL          when U <  threshold
    INCONCLUSIVE  otherwise, and whenever the data are no evidence (too few windows, a task at chance)

so that a candidate whose true recovery lies below the threshold passes in at most `1 - confidence` of cases.
`rule="point"` is the naive rule of most tools: PASS when the recovery itself reaches the threshold, whatever its
uncertainty.

Bounds. Perplexity: bootstrap of circular blocks of consecutive windows (Politis and Romano 1992), because windows of
one document resemble each other. Of two intervals from the same draws the outer bound is taken on each side: the
percentile interval moved outwards to what Student's t would have it (Hesterberg 2015, "What teachers should know about
the bootstrap"), since a plain one is too narrow for few blocks, and the studentized one (Efron 1982, "bootstrap-t"),
which follows the skew of losses that come from few windows. Accuracy: bootstrap over items, which is a multinomial draw
of the four outcomes (both right, only the reference, only the candidate, none), with one imagined item in each of the
two outcomes where the models differ, so that a sample without any difference does not claim certainty.
`tests/bench/coverage.py` measures what these promises are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from compress.errors import ArtifactError
from evaluators.results import Outcome, Recovery, Verdict

EXIT_CODES: dict[Outcome, int] = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
DRAWS = 10_000
LEAST_WINDOWS = 20
MOST_NATS = 709.0
Rule = Literal["bounds", "point"]
Array = npt.NDArray[np.float64]


def judge_perplexity(
    nll_reference_N: Array,
    nll_candidate_N: Array,
    tokens_N: Array,
    *,
    threshold: float,
    confidence: float = 0.95,
    rule: Rule = "bounds",
    identical: bool = False,
    seed: int = 0,
    draws: int = DRAWS,
) -> Verdict:
    """The verdict on perplexity from each window's SUM of negative log-likelihoods (nats) and number of scored tokens.

    `identical`: the two models are the same bytes; a difference of exactly zero is then certain, not an estimate.
    Raises ArtifactError naming the first window whose score is not finite.
    """
    for what, values in (("reference", nll_reference_N), ("candidate", nll_candidate_N)):
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ArtifactError(f"the {what}'s score of window {bad} is {values[bad]}; the model is damaged")
    gain_N = nll_reference_N - nll_candidate_N
    windows = len(gain_N)
    mean = float(gain_N.sum() / tokens_N.sum())
    same = identical and not gain_N.any()
    if same:
        recovery = Recovery(value=1.0, lower=1.0, upper=1.0)
    else:
        low, high = block_bounds(gain_N, tokens_N, confidence=confidence, seed=seed, draws=draws)
        recovery = Recovery(value=exp(mean), lower=exp(low), upper=exp(high))
    no_evidence = None
    if windows < LEAST_WINDOWS and not same:
        no_evidence = f"{windows} windows are too few to judge by, {LEAST_WINDOWS} are needed: pass more text"
    return _verdict(
        "perplexity", recovery, threshold, confidence, windows, "windows", rule, no_evidence, scale=math.log
    )


def exp(nats: float) -> float:
    """e to the power of `nats`; infinite where floats end, at 709: a model that bad is judged, and is not an error."""
    return math.exp(nats) if nats < MOST_NATS else math.inf


def block_bounds(
    gain_N: Array, tokens_N: Array, *, confidence: float, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """One-sided bounds of `sum(gain) / sum(tokens)`; see the module docstring. Deterministic for a seed."""
    n = len(gain_N)
    size = block_length(n)
    num_blocks = -(-n // size)
    point = float(gain_N.sum() / tokens_N.sum())
    generator = np.random.Generator(np.random.PCG64(seed))
    # sums over every circular block, so that a draw costs one addition a block
    wrapped = np.arange(n)[:, None] + np.arange(size)[None, :]
    block_gain_N, block_tokens_N = (v[wrapped % n].sum(axis=1) for v in (gain_N, tokens_N))
    means, errors = np.empty(draws), np.empty(draws)
    for start in range(0, draws, 500):  # in parts: draws x blocks at once would be gigabytes for long texts
        picks = generator.integers(0, n, size=(min(500, draws - start), num_blocks))
        part = slice(start, start + len(picks))
        means[part], errors[part] = _ratio_and_error(block_gain_N[picks], block_tokens_N[picks])
    wider = t_quantile(confidence, max(2, num_blocks - 1)) / NormalDist().inv_cdf(confidence)
    wider *= math.sqrt(num_blocks / max(1, num_blocks - 1))
    low, high = (point + wider * (float(np.quantile(means, q)) - point) for q in (1 - confidence, confidence))
    error = float(_ratio_and_error(block_gain_N[None], block_tokens_N[None])[1][0]) * math.sqrt(n / num_blocks)
    # blocks that happen to agree have no spread: a floor keeps such a draw extreme, and finite
    studentized = (means - point) / np.maximum(errors, 0.01 * error + 1e-300)
    low_t, high_t = (point - error * float(np.quantile(studentized, q)) for q in (confidence, 1 - confidence))
    return min(low, low_t), max(high, high_t)


def _ratio_and_error(gain_DK: Array, tokens_DK: Array) -> tuple[Array, Array]:
    """Of D draws of K blocks: the ratio of the sums and its standard error (ratio estimator)."""
    total_D = tokens_DK.sum(axis=1)
    ratio_D = gain_DK.sum(axis=1) / total_D
    residual_DK = gain_DK - ratio_D[:, None] * tokens_DK
    blocks = gain_DK.shape[1]
    spread_D = np.sqrt((residual_DK**2).sum(axis=1) * blocks / max(1, blocks - 1))
    return ratio_D, spread_D / total_D


def block_length(num_windows: int) -> int:
    """Consecutive windows that are drawn together: the cube root of their number, rounded up; the usual rate."""
    return math.ceil(round(math.pow(num_windows, 1 / 3), 9))


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t by the Cornish-Fisher expansion around the normal (Abramowitz and Stegun 26.7.5).

    Within 0.5 % for 4 degrees of freedom or more up to a probability of 0.99; two and three degrees are a little low.
    """
    z, v = NormalDist().inv_cdf(probability), degrees
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def judge_accuracy(
    name: str,
    reference_N: npt.NDArray[np.bool_],
    candidate_N: npt.NDArray[np.bool_],
    *,
    chance: float | None,
    threshold: float,
    confidence: float = 0.95,
    rule: Rule = "bounds",
    identical: bool = False,
    seed: int = 0,
    draws: int = DRAWS,
) -> Verdict:
    """The verdict on a task's accuracy from which items each model got right.

    A task on which the reference is not above chance (Wilson's one-sided lower bound at the same confidence) is refused
    as evidence: a model that guesses loses nothing by being damaged.
    """
    n = len(reference_N)
    both = int((reference_N & candidate_N).sum())
    lost, won = int(reference_N.sum()) - both, int(candidate_N.sum()) - both
    right = both + lost
    no_evidence = None
    floor = chance or 0.0
    if right == 0 or wilson_lower(right, n, confidence) <= floor:
        no_evidence = (
            f"the reference's {right / n:.1%} on {name} is not above chance ({floor:.1%}) on {n} items, so the task is "
            "no evidence; leave it out, or give it more items"
        )
    same = identical and lost == won == 0
    if right == 0:
        nothing = Recovery(value=math.nan, lower=math.nan, upper=math.nan)
        return _verdict(name, nothing, threshold, confidence, n, "items", rule, no_evidence)
    if same:
        draws_4 = np.array([[both, 0, 0, n - both]], dtype=np.float64)
    else:
        generator = np.random.Generator(np.random.PCG64(seed))
        cells = np.array([both, lost + 1, won + 1, n - both - lost - won], dtype=np.float64)
        draws_4 = generator.multinomial(n, cells / cells.sum(), size=draws).astype(np.float64)
    reference = (draws_4[:, 0] + draws_4[:, 1]) / n
    candidate = (draws_4[:, 0] + draws_4[:, 2]) / n
    recovery = _bootstrapped((both + won) / right, candidate, reference, confidence)
    corrected = None
    if chance is not None and no_evidence is None:
        point = ((both + won) / n - chance) / (right / n - chance)
        corrected = _bootstrapped(point, candidate - chance, reference - chance, confidence)
    return _verdict(
        name,
        recovery,
        threshold,
        confidence,
        n,
        "items",
        rule,
        no_evidence,
        corrected=corrected,
        mcnemar_p=mcnemar(lost, won),
        chance=chance,
    )


def _bootstrapped(point: float, above: Array, below: Array, confidence: float) -> Recovery:
    ratio = above / np.maximum(below, 1e-12)
    low, high = (float(np.quantile(ratio, q)) for q in (1 - confidence, confidence))
    return Recovery(value=point, lower=min(low, point), upper=max(high, point))


def wilson_lower(successes: int, n: int, confidence: float) -> float:
    """Wilson's one-sided lower bound of a proportion (Wilson 1927)."""
    z, p = NormalDist().inv_cdf(confidence), successes / n
    centre = p + z * z / (2 * n)
    return (centre - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: under equal accuracy each differing item is a fair coin."""
    n, k = lost + won, min(lost, won)
    if n == 0:
        return 1.0
    log_half = n * math.log(2)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - log_half) for i in range(k + 1)
    )
    return min(1.0, 2 * tail)


def _verdict(
    metric: str,
    recovery: Recovery,
    threshold: float,
    confidence: float,
    n: int,
    counted: str,
    rule: Rule,
    no_evidence: str | None,
    *,
    scale: Callable[[float], float] = float,
    corrected: Recovery | None = None,
    mcnemar_p: float | None = None,
    chance: float | None = None,
) -> Verdict:
    """Apply the rule. `scale` is where the interval is about symmetric, for the estimate of how much more is needed."""
    needed = None
    outcome: Outcome
    if no_evidence is not None:
        outcome, reason = "INCONCLUSIVE", no_evidence
    elif rule == "point":
        outcome = "PASS" if recovery.value >= threshold else "FAIL"
        reason = f"recovery {recovery.value:.2%} by the point rule, whatever its uncertainty"
    elif recovery.lower >= threshold:
        outcome = "PASS"
        reason = f"recovery is at least {recovery.lower:.2%} with {confidence:.0%} confidence"
    elif recovery.upper < threshold:
        outcome = "FAIL"
        reason = f"recovery is at most {recovery.upper:.2%} with {confidence:.0%} confidence"
    else:
        outcome = "INCONCLUSIVE"
        distance = abs(scale(recovery.value) - scale(threshold)) if recovery.value > 0 else 0.0
        half_width = (scale(recovery.upper) - scale(max(recovery.lower, 1e-12))) / 2
        known = distance > 1e-6 and math.isfinite(distance) and math.isfinite(half_width)
        needed = math.ceil(n * (half_width / distance) ** 2) if known else None
        more = f"about {needed} {counted} would tell" if needed else "it is too near the gate to tell"
        reason = f"recovery may lie on either side of the gate ({recovery.lower:.2%} to {recovery.upper:.2%}); {more}"
    return Verdict(
        metric=metric,
        outcome=outcome,
        recovery=recovery,
        threshold=threshold,
        confidence=confidence,
        n=n,
        counted=counted,
        needed=needed,
        reason=reason,
        corrected=corrected,
        mcnemar_p=mcnemar_p,
        chance=chance,
    )


def overall(verdicts: Sequence[Verdict]) -> Outcome:
    """The worst of the verdicts.

    PASS needs every metric to pass, so a candidate that is truly below on any one of them passes with at most that
    one's error: no correction for several metrics is needed (intersection-union test, Berger 1982). FAIL needs just
    one, and with k metrics right at the threshold its error can reach k times `1 - confidence`.
    """
    outcomes = {v.outcome for v in verdicts}
    return "FAIL" if "FAIL" in outcomes else "INCONCLUSIVE" if "INCONCLUSIVE" in outcomes else "PASS"
