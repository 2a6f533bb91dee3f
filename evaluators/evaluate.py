"""One evaluation from end to end: text and tasks in, both models read them once, metrics, verdicts, a report out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compress.errors import ArtifactError, ConfigError
from compress.positions import positions_of, refuse_longer
from compress.runtime import watch
from compress.runtime.ort import OnnxRunner
from compress.runtime.runner import Tokens
from compress.runtime.streamed import TorchReading, TorchRunner
from compress.runtime.watch import Observed
from evaluators import cache, divergence, gate, harness, internals, tasks
from evaluators.overlap import refuse_calibration_text
from evaluators.request import DEFAULT_THRESHOLD, Progress, Request
from evaluators.results import BlockError, BlockInternals, Metric, Report, Subject, Verdict
from evaluators.subject import _one_tokenizer, open_runner, subject
from evaluators.windows import Windows, load_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.runtime.ort import OnnxReading

_VERSIONS = (
    "compress-toolkit",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "onnxruntime",
    "lm_eval",
)


@dataclass(kw_only=True)
class _Notes:
    lines: list[str] = field(default_factory=list)

    def add(self, line: str | None) -> None:
        if line:
            self.lines.append(line)


def evaluate(request: Request, progress: Progress) -> Report:
    """Judge `request.candidate` against its reference. Raises CompressError for whatever makes a verdict worthless."""
    import torch

    notes = _Notes()
    subjects = {
        "candidate": subject(request.candidate, notes.add),
        "reference": subject(request.reference, notes.add),
    }
    tokenizer = _one_tokenizer(request)
    runners = {
        "reference": open_runner(request.reference, request, progress),
        "candidate": open_runner(request.candidate, request, progress),
    }
    vocab_size = runners["reference"].vocab_size
    if runners["candidate"].vocab_size != vocab_size:
        raise ConfigError(
            f"{request.candidate} has a vocabulary of {runners['candidate'].vocab_size} and {request.reference} one of "
            f"{vocab_size}; they cannot be compared token by token, pass the candidate's own original with --reference"
        )
    refuse_longer(request.candidate, request.context, "--context")
    windows = load_windows(
        request.data,
        tokenizer,
        context=request.context,
        stride=request.stride,
        min_context=request.min_context,
        bos=request.bos,
        max_tokens=request.max_tokens,
        model=request.reference,
        vocab_size=vocab_size,
        device=request.device,
    )
    notes.lines += refuse_calibration_text(request.candidate, windows, tokenizer)
    front = int(windows.sequences[0].ids_T[0]) if windows.bos else None
    found = [p for p in map(positions_of, (request.candidate, request.reference)) if p is not None]
    positions = min(found, key=lambda p: p[1], default=None)
    asked: dict[str, tuple[tasks.Task, list[tasks.Request]]] = {}
    sequences = list(windows.sequences)
    offsets = {}
    for spec in request.tasks:
        task = tasks.load_task(spec, request.limit)
        if task.name in {t.name for t, _ in asked.values()}:
            raise ConfigError(f"two tasks are called {task.name}; tell them apart with --tasks NAME={spec}")
        wanted = tasks.requests(task, tokenizer, front=front, max_length=max(request.context, 512), positions=positions)
        offsets[task.name] = len(sequences)
        asked[task.name] = (task, wanted)
        sequences += [w.tokens for w in wanted]
        if len(task.items) < task.num_available:
            notes.add(f"{task.name}: the first {len(task.items)} of {task.num_available} items (--limit)")
    observe = _how_many_to_watch(runners, windows)
    readings = {}
    for role, runner in runners.items():
        progress.stage(role)
        readings[role] = _read(runner, sequences, observe, subjects[role], role == "reference", request, notes)
    progress.stage("comparing")
    with torch.no_grad():
        scores = divergence.compare(readings["reference"], readings["candidate"], windows)
        answers = {
            name: {role: tasks.score(task, wanted, reading, offsets[name]) for role, reading in readings.items()}
            for name, (task, wanted) in asked.items()
        }
    for reading in readings.values():
        reading.close()
    harness_pairs = _harness(request, runners, tokenizer, front, progress)
    identical = subjects["candidate"].sha256 == subjects["reference"].sha256
    verdicts = _verdicts(request, scores, asked, answers, identical)
    verdicts += [_harness_verdict(request, reference, candidate, identical) for reference, candidate in harness_pairs]
    metrics = [
        *divergence.metrics(scores, windows.num_bytes),
        *_task_metrics(asked, answers),
        *(_accuracy(f"{r.name}_acc", r.correct_N, c.correct_N) for r, c in harness_pairs),
        *_recoveries(verdicts),
    ]
    blocks, inside = _inside(readings["reference"].observed, readings["candidate"].observed, notes)
    gated = request.threshold is not None
    return Report(
        candidate=subjects["candidate"],
        reference=subjects["reference"],
        text=_text(windows, asked),
        metrics=metrics,
        verdicts=verdicts if gated else [],
        gate={
            "threshold": request.threshold,
            "confidence": request.confidence,
            "rule": request.rule,
            "metrics": [v.metric for v in verdicts],
        }
        if gated
        else None,
        outcome=gate.overall(verdicts) if gated else None,
        blocks=blocks,
        internals=inside,
        kl_histogram=divergence.kl_histogram(scores.kl_S),
        notes=notes.lines,
        versions=versions(),
    )


# ---- models ------------------------------------------------------------------------------------------


def _how_many_to_watch(runners: Mapping[str, TorchRunner | OnnxRunner], windows: Windows) -> int:
    depths = {r.model.num_blocks for r in runners.values() if isinstance(r, TorchRunner)}
    both = [r for r in runners.values() if isinstance(r, TorchRunner)]
    if len(both) < 2 or len(depths) != 1:
        return 0
    width = max(r.hidden_size for r in both)
    return watch.watchable(depths.pop(), width, [len(s.ids_T) for s in windows.sequences])


def _read(
    runner: TorchRunner | OnnxRunner,
    sequences: Sequence[Tokens],
    observe: int,
    who: Subject,
    is_reference: bool,
    request: Request,
    notes: _Notes,
) -> TorchReading | OnnxReading:
    if isinstance(runner, OnnxRunner):
        return runner.read(sequences)
    if not is_reference or request.cache_folder is None:
        return runner.read(sequences, observe=observe)
    name = cache.key(runner, sequences, observe, who.sha256)
    kept = cache.load(request.cache_folder, name, runner, sequences)
    if kept is not None:
        runner.on_block(runner.model.num_blocks, runner.model.num_blocks)
        return kept
    reading = runner.read(sequences, observe=observe)
    notes.add(cache.save(request.cache_folder, name, reading))
    return reading


def _inside(
    reference: Observed | None, candidate: Observed | None, notes: _Notes
) -> tuple[list[BlockError], list[BlockInternals]]:
    if reference is None or candidate is None:
        notes.add("error by depth is not available: one of the models shows no hidden states, or has another depth")
        return [], []
    if not any(candidate.entropy):
        notes.add("attention entropy is not available: this architecture's attention is not seen")
    same_width = reference.hidden[0].shape == candidate.hidden[0].shape
    if not same_width:
        notes.add("error by depth is not available: the models' hidden sizes differ")
    errors = internals.block_errors(reference, candidate) if same_width else []
    return errors, internals.block_internals(reference, candidate)


# ---- text --------------------------------------------------------------------------------------------


def _text(windows: Windows, asked: Mapping[str, tuple[tasks.Task, list[tasks.Request]]]) -> dict[str, Any]:
    return {
        "source": windows.source,
        "text_sha256": windows.text_sha256,
        "ids_sha256": windows.ids_sha256,
        "context": windows.context,
        "stride": windows.stride,
        "min_context": windows.min_context,
        "bos": windows.bos,
        "num_windows": len(windows.sequences),
        "num_tokens": windows.num_scored,
        "num_bytes": windows.num_bytes,
        "tasks": {n: {"kind": t.kind, "items": len(t.items), "sha256": t.sha256} for n, (t, _) in asked.items()},
    }


# ---- numbers -----------------------------------------------------------------------------------------


def _verdicts(
    request: Request,
    scores: divergence.TokenScores,
    asked: Mapping[str, tuple[tasks.Task, list[tasks.Request]]],
    answers: Mapping[str, Mapping[str, tasks.Answers]],
    identical: bool,
) -> list[Verdict]:
    threshold = DEFAULT_THRESHOLD if request.threshold is None else request.threshold
    out = [
        gate.judge_perplexity(
            scores.by_window(scores.nll_reference_S),
            scores.by_window(scores.nll_candidate_S),
            scores.by_window(np.ones(len(scores.kl_S))),
            threshold=threshold,
            confidence=request.confidence,
            rule=request.rule,
            identical=identical,
        )
    ]
    for name, (task, _) in asked.items():
        out.append(
            gate.judge_accuracy(
                name,
                answers[name]["reference"].correct_N,
                answers[name]["candidate"].correct_N,
                chance=task.chance,
                threshold=threshold,
                confidence=request.confidence,
                rule=request.rule,
                identical=identical,
            )
        )
    return out


def _recoveries(verdicts: Sequence[Verdict]) -> list[Metric]:
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
        for v in verdicts
        if np.isfinite(v.recovery.value)
    ]


def _task_metrics(
    asked: Mapping[str, tuple[tasks.Task, list[tasks.Request]]],
    answers: Mapping[str, Mapping[str, tasks.Answers]],
) -> list[Metric]:
    out = []
    for name, (task, _) in asked.items():
        n = len(task.items)
        for suffix in ("acc", "acc_norm"):
            pair = [
                a.correct_N if suffix == "acc" else a.correct_norm_N
                for a in (answers[name]["reference"], answers[name]["candidate"])
            ]
            if pair[0] is None or pair[1] is None:
                continue
            out.append(_accuracy(f"{name}_{suffix}", pair[0], pair[1]))
        gold_r, gold_c = (-answers[name][role].gold_N for role in ("reference", "candidate"))
        out.append(
            Metric(
                name=f"{name}_gold_nll",
                unit="nats/item",
                better="lower",
                value=float(gold_c.mean()),
                reference=float(gold_r.mean()),
                n=n,
                counted="items",
            )
        )
    return out


def _accuracy(name: str, reference_N: npt.NDArray[np.bool_], candidate_N: npt.NDArray[np.bool_]) -> Metric:
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


def _harness(
    request: Request,
    runners: Mapping[str, TorchRunner | OnnxRunner],
    tokenizer: PreTrainedTokenizerBase,
    front: int | None,
    progress: Progress,
) -> list[tuple[harness.HarnessTask, harness.HarnessTask]]:
    """Each lm_eval task's answers of both models, paired by document."""
    if not request.lm_eval:
        return []
    found = []
    for role, runner in runners.items():
        progress.stage(f"{role}, lm_eval")
        limits = [p[1] for p in map(positions_of, (request.candidate, request.reference)) if p is not None]
        longest = min([max(request.context, 512), *limits])
        answers = harness.run(runner, tokenizer, request.lm_eval, front=front, limit=request.limit, max_length=longest)
        found.append(answers)
    for r, c in zip(*found, strict=True):
        if (r.name, r.documents) != (c.name, c.documents):
            raise ArtifactError(f"lm_eval gave the two models different documents of {r.name}; they cannot be paired")
    return list(zip(*found, strict=True))


def _harness_verdict(
    request: Request, reference: harness.HarnessTask, candidate: harness.HarnessTask, identical: bool
) -> Verdict:
    return gate.judge_accuracy(
        reference.name,
        reference.correct_N,
        candidate.correct_N,
        chance=reference.chance,
        threshold=DEFAULT_THRESHOLD if request.threshold is None else request.threshold,
        confidence=request.confidence,
        rule=request.rule,
        identical=identical,
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# ---- memory of earlier reports -------------------------------------------------------------------------
