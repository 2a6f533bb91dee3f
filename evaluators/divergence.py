"""How far one model's next-token distributions lie from another's, token by token and in sum.

Definitions follow llama.cpp's `llama-perplexity --kl-divergence`, so that figures compare: the divergence is
`KL(reference || candidate) = sum_v p_ref(v) (ln p_ref(v) - ln p_cand(v))` in nats, `delta_p` is the change of the
probability given to the token that really came, and top-1 agreement is the share of tokens for which both models'
likeliest next token is the same. (llama.cpp stores the reference in 16 bits and leaves out its tokens below -16 nats,
which moves its mean by less than a thousandth; its intervals take tokens as independent.) Intervals treat windows, not
tokens, as independent.

Shapes: N windows, P scored positions of a window, V vocabulary, S scored tokens of all windows
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.runtime.runner import Reading
from evaluators.results import Histogram, Metric
from evaluators.windows import Windows

Array = npt.NDArray[np.float64]
Interval = tuple[float, float | None, float | None]

CHUNK = 256
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


@torch.no_grad()
def compare(
    reference: Reading, candidate: Reading, windows: Windows, on_window: Callable[[int], None] = lambda i: None
) -> TokenScores:
    """Score every window with both models, `CHUNK` positions at a time. The readings begin with the windows."""
    parts: list[tuple[Tensor, ...]] = []
    for index, sequence in enumerate(windows.sequences):
        end = len(sequence.ids_T) - 1
        for start in range(windows.min_context - 1, end, CHUNK):
            stop = min(start + CHUNK, end)
            target_P = sequence.ids_T[start + 1 : stop + 1]
            part = _chunk(reference.logits(index, start, stop), candidate.logits(index, start, stop), target_P)
            for value, what in zip(part[:3], ("reference", "candidate", "candidate"), strict=True):
                if not bool(torch.isfinite(value).all()):
                    raise ArtifactError(
                        f"the {what}'s logits after token {start} of window {index} are not finite; the model is "
                        "damaged, or overflows in this dtype"
                    )
            parts.append((torch.full((stop - start,), index), *part))
        on_window(index)
    window, nll_r, nll_c, kl, same, mse = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return TokenScores(
        window_S=window, nll_reference_S=nll_r, nll_candidate_S=nll_c, kl_S=kl, same_top_S=same, mse_S=mse
    )


def _chunk(
    reference_PV: Tensor, candidate_PV: Tensor, target_P: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if reference_PV.shape != candidate_PV.shape:
        raise ArtifactError(
            f"the candidate's vocabulary has {candidate_PV.shape[-1]} entries and the reference's "
            f"{reference_PV.shape[-1]}; they cannot be compared token by token, pass the candidate's own original"
        )
    candidate_PV = candidate_PV.to(reference_PV.device)
    mse_P = (candidate_PV - reference_PV).square().mean(-1, dtype=torch.float64)
    same_P = reference_PV.argmax(-1) == candidate_PV.argmax(-1)
    log_r_PV, log_c_PV = reference_PV.log_softmax(-1), candidate_PV.log_softmax(-1)
    column = target_P.to(reference_PV.device)[:, None]
    nll_r_P, nll_c_P = (-log.gather(-1, column)[:, 0].double() for log in (log_r_PV, log_c_PV))
    # the difference of two nearly equal logs is summed in float64: KL is far smaller than either
    kl_P = (log_r_PV.exp() * (log_r_PV - log_c_PV)).sum(-1, dtype=torch.float64)
    return nll_r_P.cpu(), nll_c_P.cpu(), kl_P.cpu(), same_P.cpu(), mse_P.cpu()


def metrics(scores: TokenScores, num_bytes: int) -> list[Metric]:
    """Every number that follows from the token scores. `num_bytes`: UTF-8 bytes of the scored tokens."""
    n = len(scores.kl_S)
    per_byte = n / max(1, num_bytes) / math.log(2)
    kl = scores.kl_S

    def lower(name: str, unit: str, interval: Interval, reference: float | None = None) -> Metric:
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

    reference = mean_interval(scores, scores.nll_reference_S)[0]
    nll = mean_interval(scores, scores.nll_candidate_S)
    square = mean_interval(scores, scores.delta_p_S**2)
    same, same_low, same_high = mean_interval(scores, scores.same_top_S)
    return [
        lower("perplexity", "1", _through(math.exp, nll), math.exp(reference)),
        lower("nll", "nats/token", nll, reference),
        lower("bits_per_byte", "bits/byte", _through(lambda x: x * per_byte, nll), reference * per_byte),
        lower("logits_mse", "1", mean_interval(scores, scores.mse_S)),
        lower("kl_mean", "nats/token", mean_interval(scores, kl)),
        *(lower(f"kl_{name}", "nats/token", (float(np.quantile(kl, q)), None, None)) for name, q in KL_QUANTILES),
        lower("kl_max", "nats/token", (float(kl.max()), None, None)),
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
        lower("rms_delta_p", "share", _through(lambda x: math.sqrt(max(0.0, x)), square)),
    ]


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
