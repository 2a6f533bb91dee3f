"""From what two models answered to metrics and to the gate's verdicts: on perplexity, on tasks, on lm_eval's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluators import divergence, gate
from evaluators.harness import HarnessTask
from evaluators.request import DEFAULT_THRESHOLD, EvaluationRequest
from evaluators.results import Metric, Verdict
from evaluators.tasks import Answers, Task

Right = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task and both models' answers."""

    task: Task
    reference: Answers
    candidate: Answers


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured. harness: each task's answers of the reference and of the candidate."""

    scores: divergence.TokenScores
    num_bytes: int
    tasks: Sequence[Asked]
    harness: Sequence[tuple[HarnessTask, HarnessTask]]
    identical: bool


def verdicts(request: EvaluationRequest, found: Found) -> list[Verdict]:
    """One for perplexity and one for each task. `identical` models may be judged without uncertainty."""
    rule: dict[str, Any] = {
        "threshold": DEFAULT_THRESHOLD if request.threshold is None else request.threshold,
        "confidence": request.confidence,
        "rule": request.rule,
        "identical": found.identical,
    }
    scores = found.scores
    nll_reference_N, nll_candidate_N, tokens_N = (
        scores.by_window(v) for v in (scores.nll_reference_S, scores.nll_candidate_S, np.ones(len(scores.kl_S)))
    )
    out = [gate.judge_perplexity(nll_reference_N, nll_candidate_N, tokens_N, **rule)]
    for a in found.tasks:
        pair = a.reference.correct_N, a.candidate.correct_N
        out.append(gate.judge_accuracy(a.task.name, *pair, chance=a.task.chance, **rule))
    for r, c in found.harness:
        out.append(gate.judge_accuracy(r.name, r.correct_N, c.correct_N, chance=r.chance, **rule))
    return out


def metrics(found: Found, judged: Sequence[Verdict]) -> list[Metric]:
    """Every number, the verdicts' recoveries included."""
    return [
        *divergence.metrics(found.scores, found.num_bytes),
        *(metric for asked in found.tasks for metric in _of_task(asked)),
        *(_accuracy(f"{r.name}_acc", r.correct_N, c.correct_N) for r, c in found.harness),
        *_recoveries(judged),
    ]


def _recoveries(judged: Sequence[Verdict]) -> list[Metric]:
    """Recoveries as metrics, with the gate's one-sided bounds: they are shown without a gate too."""
    return [
        Metric(
            name=f"{v.metric}_recovery",
            unit="share",
            better="higher",
            value=v.recovery.value,
            lower=v.recovery.lower,
            upper=v.recovery.upper,
            n=v.n,
            counted=v.counted,
        )
        for v in judged
        if np.isfinite(v.recovery.value)
    ]


def _of_task(asked: Asked) -> list[Metric]:
    name, reference, candidate = asked.task.name, asked.reference, asked.candidate
    out = [_accuracy(f"{name}_acc", reference.correct_N, candidate.correct_N)]
    if reference.correct_norm_N is not None and candidate.correct_norm_N is not None:
        out.append(_accuracy(f"{name}_acc_norm", reference.correct_norm_N, candidate.correct_norm_N))
    gold = Metric(
        name=f"{name}_gold_nll",
        unit="nats/item",
        better="lower",
        value=float(-candidate.gold_N.mean()),
        reference=float(-reference.gold_N.mean()),
        n=len(asked.task.items),
        counted="items",
    )
    return [*out, gold]


def _accuracy(name: str, reference_N: Right, candidate_N: Right) -> Metric:
    value, n = float(candidate_N.mean()), len(candidate_N)
    error = divergence.Z95 * float(np.sqrt(value * (1 - value) / n))
    return Metric(
        name=name,
        unit="share",
        better="higher",
        value=value,
        reference=float(reference_N.mean()),
        lower=max(0.0, value - error),
        upper=min(1.0, value + error),
        n=n,
        counted="items",
    )
