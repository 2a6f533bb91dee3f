"""How far one model's next-token distributions lie from another's, token by token and in sum.

Definitions follow llama.cpp's `llama-perplexity --kl-divergence`, so that figures compare: the divergence is
`KL(reference || candidate) = sum_v p_ref(v) (ln p_ref(v) - ln p_cand(v))` in nats, `delta_p` is the change of the
probability given to the token that really came, and top-1 agreement is the share of tokens for which both models'
likeliest next token is the same. (llama.cpp stores the reference in 16 bits and leaves out its tokens below -16 nats,
which moves its mean by less than a thousandth; its intervals take tokens as independent.) Intervals treat windows, not
tokens, as independent.

Shapes: N windows, S scored tokens of all windows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.runtime.runner import Reading, Span
from evaluators.gate import exp
from evaluators.results import Histogram, Metric
from evaluators.scoring import Compared, batches, compare_at
from evaluators.windows import Windows

Array = npt.NDArray[np.float64]
Interval = tuple[float, float | None, float | None]

Z95 = 1.959963984540054
KL_QUANTILES = (("median", 0.5), ("95", 0.95), ("99", 0.99), ("99.9", 0.999))


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Per scored token `[S]`, in order; `window_S` says which window a token is of. nll in nats."""

    window_S: npt.NDArray[np.int64]
    nll_reference_S: Array
    nll_candidate_S: Array
    kl_S: Array
    same_top_S: npt.NDArray[np.bool_]
    mse_S: Array
    """Mean over the vocabulary of the squared difference of the logits."""

    @property
    def delta_p_S(self) -> Array:
        """Change of the true token's probability, candidate minus reference, -1 .. 1."""
        return np.asarray(np.exp(-self.nll_candidate_S) - np.exp(-self.nll_reference_S))

    def by_window(self, values_S: npt.NDArray[np.generic]) -> Array:
        """Sums over the tokens of each window, `[N]`."""
        sums: Array = np.bincount(self.window_S, weights=values_S.astype(np.float64))  # type: ignore[assignment]
        return sums


def compare(reference: Reading, candidate: Reading, windows: Windows) -> TokenScores:
    """Score every window with both models. The readings begin with the windows."""
    wanted = [
        (Span(i, windows.min_context - 1, len(s.ids_T) - 1), windows.targets(i))
        for i, s in enumerate(windows.sequences)
    ]
    parts = [compare_at(reference, candidate, spans, target_P) for spans, target_P in batches(wanted)]
    return token_scores(parts, [len(target) for _, target in wanted])


def token_scores(compared: Sequence[Compared], sizes: Sequence[int]) -> TokenScores:
    """The scores of consecutive tokens, of which each window has as many as `sizes` says."""

    def column(name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = torch.cat([getattr(c, name) for c in compared]).numpy()
        return values

    return TokenScores(
        window_S=np.repeat(np.arange(len(sizes)), sizes),
        nll_reference_S=column("nll_reference_P"),
        nll_candidate_S=column("nll_candidate_P"),
        kl_S=column("kl_P"),
        same_top_S=column("same_top_P"),
        mse_S=column("mse_P"),
    )


def metrics(scores: TokenScores, num_bytes: int) -> list[Metric]:
    """Every number that follows from the token scores. `num_bytes`: UTF-8 bytes of the scored tokens."""
    n = len(scores.kl_S)
    per_byte = n / max(1, num_bytes) / math.log(2)
    kl = scores.kl_S
    reference = mean_interval(scores, scores.nll_reference_S)[0]
    nll = mean_interval(scores, scores.nll_candidate_S)
    square = mean_interval(scores, scores.delta_p_S**2)
    same, same_low, same_high = mean_interval(scores, scores.same_top_S)
    return [
        _lower("perplexity", "1", _through(exp, nll), n, exp(reference)),
        _lower("nll", "nats/token", nll, n, reference),
        _lower("bits_per_byte", "bits/byte", _through(lambda x: x * per_byte, nll), n, reference * per_byte),
        _lower("logits_mse", "1", mean_interval(scores, scores.mse_S), n),
        _lower("kl_mean", "nats/token", mean_interval(scores, kl), n),
        *(_lower(f"kl_{name}", "nats/token", (float(np.quantile(kl, q)), None, None), n) for name, q in KL_QUANTILES),
        _lower("kl_max", "nats/token", (float(kl.max()), None, None), n),
        Metric(
            name="top1_agreement",
            unit="share",
            better="higher",
            value=same,
            lower=same_low,
            upper=None if same_high is None else min(1.0, same_high),
            n=n,
            counted="tokens",
        ),
        _lower("rms_delta_p", "share", _through(lambda x: math.sqrt(max(0.0, x)), square), n),
    ]


def _lower(name: str, unit: str, interval: Interval, n: int, reference: float | None = None) -> Metric:
    """A metric on tokens of which less is better."""
    value, low, high = interval
    return Metric(
        name=name,
        unit=unit,
        better="lower",
        value=value,
        reference=reference,
        lower=low,
        upper=high,
        n=n,
        counted="tokens",
    )


def _through(change: Callable[[float], float], interval: Interval) -> Interval:
    """An interval on another scale; `change` must rise."""
    value, low, high = interval
    return change(value), None if low is None else change(low), None if high is None else change(high)


def mean_interval(scores: TokenScores, values_S: npt.NDArray[np.generic]) -> Interval:
    """Mean over tokens and its two-sided 95 % interval, from how it varies between windows (ratio estimator).

    With one window there is nothing to vary, and no bound is given.
    """
    sum_N = scores.by_window(values_S)
    count_N = scores.by_window(np.ones(len(values_S)))
    mean = float(sum_N.sum() / count_N.sum())
    windows = len(sum_N)
    if windows < 2:
        return mean, None, None
    residual_N = sum_N - mean * count_N
    error = math.sqrt(float(residual_N @ residual_N) * windows / (windows - 1)) / float(count_N.sum())
    return mean, mean - Z95 * error, mean + Z95 * error


def kl_histogram(kl_S: Array, bins: int = 60) -> Histogram | None:
    """Counts over logarithmic bins of the positive divergences; None when all are zero (a model against itself)."""
    positive = kl_S[kl_S > 0]
    if not len(positive):
        return None
    low, high = max(1e-9, float(positive.min())), float(positive.max())
    edges = np.geomspace(low, max(high, low * 1.01), bins + 1)
    edges[-1] = max(edges[-1], high)
    counts, _ = np.histogram(np.clip(positive, low, None), bins=edges)
    return Histogram(unit="nats/token", edges=edges.tolist(), counts=counts.tolist())
