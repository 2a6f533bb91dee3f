"""What an evaluation found: plain values that flow from the metrics to the gate and on to the reports.

Nothing here computes. Every number says its unit, which way is better, how many things it was measured on and between
what bounds it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number.

    value: the candidate's, or the distance between candidate and reference. reference: the reference's own value, None
    for a distance. lower, upper: two-sided 95 % interval of `value`, None where none is stated (a maximum, a quantile).
    n: how many `counted` ("tokens", "windows", "items", "values") it was measured on.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"]
    value: float
    n: int
    counted: str
    reference: float | None = None
    lower: float | None = None
    upper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How much of the reference is left: 1 is all of it. lower, upper: one-sided bounds at the gate's confidence."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's word on one metric. See `evaluators.gate` for the rule.

    corrected: recovery of what lies above chance, for tasks with a chance level; reported, not gated. mcnemar_p: exact
    two-sided p of McNemar's test on the items that one model alone got right; None for perplexity. needed: how many
    `counted` in all would settle an INCONCLUSIVE verdict if the data go on like this; None if settled or unknowable.
    reason: one sentence for a person.
    """

    metric: str
    outcome: Outcome
    recovery: Recovery
    threshold: float
    confidence: float
    n: int
    counted: str
    needed: int | None
    reason: str
    corrected: Recovery | None = None
    mcnemar_p: float | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class BlockError:
    """Distance of the hidden states after one decoder block from the reference's, both run from the token ids.

    mse: mean squared difference. snr_db: `10 log10(mean(reference**2) / mse)`, infinite (None in JSON) when equal.
    """

    index: int
    name: str
    mse: float
    snr_db: float | None


@dataclass(frozen=True, kw_only=True)
class BlockInternals:
    """What goes on inside one block, on the same tokens, in both models.

    entropy_*: attention entropy of each head in nats, mean over queries; empty where the architecture does not show it.
    activations_*: quantiles of |x| entering the widest linear (the MLP's last), at `ACTIVATION_QUANTILES`.
    """

    index: int
    name: str
    entropy_reference: list[float] = field(default_factory=list)
    entropy_candidate: list[float] = field(default_factory=list)
    activations_reference: list[float] = field(default_factory=list)
    activations_candidate: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges; `edges` has one more entry than `counts`."""

    unit: str
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that took part. weight_bytes: its weight files on disk. bits_per_weight: those bytes over parameters.
    kv_cache: as vLLM names it, where keys and values were held as integers."""

    path: str
    sha256: str
    format: str
    runtime: str
    weight_bytes: int
    num_parameters: int
    bits_per_weight: float
    kv_cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything one `compress evaluate` found.

    text: source, text_sha256, context, stride, min_context, bos, num_windows, num_tokens (scored), num_bytes. gate:
    threshold, confidence, rule ("bounds" or "point"), metrics; None without --gate. outcome: the worst verdict; None
    without --gate. judged: whose weights the numbers are of, in words. notes: whatever was left out, skipped or could
    not be shown.
    """

    candidate: Subject
    reference: Subject
    text: Mapping[str, Any]
    metrics: list[Metric]
    verdicts: list[Verdict]
    gate: Mapping[str, Any] | None
    outcome: Outcome | None
    blocks: list[BlockError]
    internals: list[BlockInternals]
    kl_histogram: Histogram | None
    notes: list[str]
    versions: Mapping[str, str]
    judged: str = ""

    def to_json(self) -> dict[str, Any]:
        """The documented JSON: these fields by name, and `schema`."""
        return {"schema": SCHEMA, **asdict(self)}
