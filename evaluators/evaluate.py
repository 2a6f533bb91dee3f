"""One evaluation from end to end: text and tasks in, both models read them once, metrics, verdicts, a report out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from compress.errors import ArtifactError, ConfigError
from compress.positions import positions_of, refuse_longer
from compress.runtime.streamed import TorchRunner
from compress.tell import SILENT, Tell
from evaluators import divergence, gate, harness, passes, tasks, verdicts
from evaluators.overlap import refuse_calibration_text
from evaluators.passes import Question
from evaluators.request import EvaluationRequest
from evaluators.results import Report, Subject
from evaluators.subject import hold_cache, one_tokenizer, open_runner, subject, whose_weights
from evaluators.windows import Windows, load_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two models, opened, and what they have in common."""

    subjects: Mapping[str, Subject]
    runners: Mapping[str, passes.Runner]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    positions: tuple[str, int] | None
    """Of the model that has fewer: what config.json calls them, and how many."""
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """What both models are asked. front: the begin-of-text token, where windows have one."""

    windows: Windows
    front: int | None
    tasks: Mapping[str, tuple[tasks.Task, list[tasks.Continuation]]]
    notes: list[str]

    def questions(self) -> list[Question]:
        """The windows, and behind them the tasks' continuations."""
        w = self.windows
        out = [Question(tokens=s, target=w.targets(i)) for i, s in enumerate(w.sequences)]
        return out + [Question(tokens=c.tokens, target=c.target) for _, asked in self.tasks.values() for c in asked]


def evaluate(request: EvaluationRequest, tell: Tell = SILENT) -> Report:
    """Judge `request.candidate` against its reference. Raises CompressError for whatever makes a verdict worthless."""
    pair = _open(request)
    exam = _exam(request, pair, tell)
    keep = None
    if request.cache_folder is not None:
        keep = passes.Keep(folder=request.cache_folder, model_sha256=pair.subjects["reference"].sha256)
    passed = passes.run(
        pair.runners,
        exam.questions(),
        num_windows=len(exam.windows.sequences),
        weight_bytes=max(s.weight_bytes for s in pair.subjects.values()),
        keep=keep,
        tell=tell,
    )
    num_windows = len(exam.windows.sequences)
    found = verdicts.Found(
        scores=divergence.token_scores(
            passed.answers[:num_windows], [len(exam.windows.targets(i)) for i in range(num_windows)]
        ),
        num_bytes=exam.windows.num_bytes,
        tasks=_answered(exam, passed),
        harness=_harness(request, pair, exam.front, tell),
        identical=_computed(pair.subjects["candidate"]) == _computed(pair.subjects["reference"]),
    )
    return _report(request, pair, exam, passed, found)


def _computed(subject: Subject) -> tuple[str, str | None]:
    """What decides a model's answers."""
    return subject.sha256, subject.kv_cache


# ---- what is asked -------------------------------------------------------------------------------------


def _open(request: EvaluationRequest) -> _Pair:
    notes: list[str] = []

    def note(text: str | None) -> None:
        if text:
            notes.append(text)

    subjects = {role: subject(getattr(request, role), note) for role in ("candidate", "reference")}
    tokenizer = one_tokenizer(request)
    runners = {role: open_runner(getattr(request, role), request) for role in ("reference", "candidate")}
    for role, asked in (("reference", None), ("candidate", request.kv_cache)):
        held = hold_cache(runners[role], getattr(request, role), asked)
        subjects[role] = replace(subjects[role], kv_cache=held)
        note(held and f"keys and values of the {role} were rounded to INT8, a scale a token and head ({held})")
    vocab_size = runners["reference"].vocab_size
    if runners["candidate"].vocab_size != vocab_size:
        raise ConfigError(
            f"{request.candidate} has a vocabulary of {runners['candidate'].vocab_size} and {request.reference} one of "
            f"{vocab_size}; they cannot be compared token by token, pass the candidate's own original with --reference"
        )
    refuse_longer(request.candidate, request.context, "--context")
    limits = [p for p in map(positions_of, (request.candidate, request.reference)) if p is not None]
    return _Pair(
        subjects=subjects,
        runners=runners,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        positions=min(limits, key=lambda p: p[1], default=None),
        notes=notes,
    )


def _exam(request: EvaluationRequest, pair: _Pair, tell: Tell) -> _Exam:
    windows = load_windows(
        request.data,
        pair.tokenizer,
        context=request.context,
        stride=request.stride,
        min_context=request.min_context,
        bos=request.bos,
        max_tokens=request.max_tokens,
        model=request.reference,
        vocab_size=pair.vocab_size,
        device=request.device,
        tell=tell,
    )
    notes = refuse_calibration_text(request.candidate, windows, pair.tokenizer)
    front = int(windows.sequences[0].ids_T[0]) if windows.bos else None
    asked: dict[str, tuple[tasks.Task, list[tasks.Continuation]]] = {}
    for spec in request.tasks:
        task = tasks.load_task(spec, request.limit)
        if task.name in asked:
            raise ConfigError(f"two tasks are called {task.name}; tell them apart with --tasks NAME={spec}")
        longest = max(request.context, 512)
        wanted = tasks.requests(task, pair.tokenizer, front=front, max_length=longest, positions=pair.positions)
        asked[task.name] = (task, wanted)
        if len(task.items) < task.num_available:
            notes.append(f"{task.name}: the first {len(task.items)} of {task.num_available} items (--limit)")
    return _Exam(windows=windows, front=front, tasks=asked, notes=notes)


# ---- what is answered ----------------------------------------------------------------------------------


def _answered(exam: _Exam, passed: passes.Passed) -> list[verdicts.Asked]:
    out = []
    start = len(exam.windows.sequences)
    for task, asked in exam.tasks.values():
        mine = passed.answers[start : start + len(asked)]
        start += len(asked)
        reference = tasks.answers(task, asked, [(c.nll_reference_P, c.right_reference_P) for c in mine])
        candidate = tasks.answers(task, asked, [(c.nll_candidate_P, c.right_candidate_P) for c in mine])
        out.append(verdicts.Asked(task=task, reference=reference, candidate=candidate))
    return out


def _harness(
    request: EvaluationRequest, pair: _Pair, front: int | None, tell: Tell
) -> list[tuple[harness.HarnessTask, harness.HarnessTask]]:
    """Each lm_eval task's answers of both models, paired by document."""
    if not request.lm_eval:
        return []
    longest = max(request.context, 512)
    longest = longest if pair.positions is None else min(longest, pair.positions[1])
    found = []
    for role, runner in pair.runners.items():
        if isinstance(runner, TorchRunner):
            runner.on_block = _told(tell, f"block of the {role} in lm_eval")
        found.append(
            harness.run(runner, pair.tokenizer, request.lm_eval, front=front, limit=request.limit, max_length=longest)
        )
    for r, c in zip(*found, strict=True):
        if (r.name, r.documents) != (c.name, c.documents):
            raise ArtifactError(f"lm_eval gave the two models different documents of {r.name}; they cannot be paired")
    return list(zip(*found, strict=True))


def _told(tell: Tell, what: str) -> Any:
    def on_block(done: int, total: int) -> None:
        if done == 1:
            tell.start(what, total)
        tell.step(done)

    return on_block


# ---- what is reported ----------------------------------------------------------------------------------


def _report(
    request: EvaluationRequest, pair: _Pair, exam: _Exam, passed: passes.Passed, found: verdicts.Found
) -> Report:
    judged = verdicts.verdicts(request, found)
    gated = request.threshold is not None
    rule = {
        "threshold": request.threshold,
        "confidence": request.confidence,
        "rule": request.rule,
        "metrics": [v.metric for v in judged],
    }
    return Report(
        candidate=pair.subjects["candidate"],
        reference=pair.subjects["reference"],
        text=_text(exam),
        metrics=verdicts.metrics(found, judged),
        verdicts=judged if gated else [],
        gate=rule if gated else None,
        outcome=gate.overall(judged) if gated else None,
        blocks=passed.inside.errors,
        internals=passed.inside.internals,
        kl_histogram=divergence.kl_histogram(found.scores.kl_S),
        notes=[*pair.notes, *exam.notes, *passed.notes, *passed.inside.notes],
        versions=versions(),
        judged=whose_weights(request.candidate, request.asked),
    )


def _text(exam: _Exam) -> dict[str, Any]:
    windows = exam.windows
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
        "tasks": {n: {"kind": t.kind, "items": len(t.items), "sha256": t.sha256} for n, (t, _) in exam.tasks.items()},
    }


def versions(packages: Sequence[str] = _VERSIONS) -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
