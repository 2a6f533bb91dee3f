"""The accuracy gate: one pure function that says PASS, FAIL or INCONCLUSIVE.

Recovery for perplexity is `reference / candidate`: `exp(mean(nll_reference - nll_candidate))`. Its interval comes from
a paired bootstrap over windows: the two models' scores on a window rise and fall together, so their difference is known
far better than either score. With L and U the one-sided lower and upper bounds at the asked confidence,

    PASS          when L >= threshold
    FAIL          when U <  threshold
    INCONCLUSIVE  otherwise

so that a model whose true recovery is below the threshold passes in at most `1 - confidence` of cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
EXIT_CODES = {PASS: 0, FAIL: 3, INCONCLUSIVE: 4}
DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Recovery with its one-sided bounds, the windows it rests on, and how many would settle it (None if settled)."""

    outcome: str
    recovery: float
    lower: float
    upper: float
    threshold: float
    confidence: float
    num_windows: int
    windows_needed: int | None


def judge(
    nll_reference_N: npt.NDArray[np.float64],
    nll_candidate_N: npt.NDArray[np.float64],
    *,
    threshold: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """The verdict on paired window scores (nats per token), `[N]` each; see the module's formula.

    `windows_needed` scales the present interval: the distance from the point to the threshold needs
    `(half_width / distance)**2` times as many windows.
    """
    gain_N = nll_reference_N - nll_candidate_N
    recovery = math.exp(float(gain_N.mean()))
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(DRAWS)
    for start in range(0, DRAWS, 500):  # in parts: windows x draws indices at once would be gigabytes
        picks = generator.integers(0, len(gain_N), size=(min(500, DRAWS - start), len(gain_N)))
        means[start : start + len(picks)] = gain_N[picks].mean(axis=1)
    lower, upper = (math.exp(float(np.quantile(means, q))) for q in (1 - confidence, confidence))
    if lower >= threshold:
        outcome = PASS
    elif upper < threshold:
        outcome = FAIL
    else:
        outcome = INCONCLUSIVE
    needed = None
    if outcome == INCONCLUSIVE:
        distance = abs(math.log(recovery / threshold))
        half_width = (math.log(upper) - math.log(lower)) / 2
        needed = math.ceil(len(gain_N) * (half_width / distance) ** 2) if distance > 1e-9 else None
    return Verdict(
        outcome=outcome,
        recovery=recovery,
        lower=lower,
        upper=upper,
        threshold=threshold,
        confidence=confidence,
        num_windows=len(gain_N),
        windows_needed=needed,
    )
