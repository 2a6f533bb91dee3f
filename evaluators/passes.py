"""Both models over the same sequences, a part of them at a time, so that memory follows the models and not the text.

For each part the reference is read, then the candidate, then their predictions are compared and let go. What stays of
a token is a handful of numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.runtime import watch
from compress.runtime.ort import OnnxReading, OnnxRunner
from compress.runtime.runner import Span, Tokens
from compress.runtime.streamed import TorchReading, TorchRunner, rounds_of
from compress.tell import SILENT, Tell
from evaluators import cache
from evaluators.internals import Inside, compare_inside
from evaluators.scoring import Compared, batches, compare_at

Runner = TorchRunner | OnnxRunner
Reading = TorchReading | OnnxReading

LEAST_BYTES = 16 << 20
"""Hidden states of one model that are held for a part at least; above that, a thirty-second of what its weights take.
Three such are held at once; reading the weights once more takes far less than computing on as many tokens."""
_ELEMENTWISE = 200
"""Multiply-adds that comparing one logit with another takes as long as, beside those of their own products (measured
on one thread of a CPU; it only decides how the time left is guessed before a part is through)."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sequence, and the tokens that came after each position from its `first` on."""

    tokens: Tokens
    target: Tensor

    @property
    def first(self) -> int:
        return self.tokens.first


@dataclass(frozen=True, kw_only=True)
class Passed:
    """answers: one a question, in order. inside: what was seen inside the models on the first windows."""

    answers: list[Compared]
    inside: Inside
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Where the reference's results are kept, and the hash of its bytes."""

    folder: Path
    model_sha256: str


def run(
    runners: Mapping[str, Runner],
    questions: Sequence[Question],
    *,
    num_windows: int,
    weight_bytes: int,
    keep: Keep | None = None,
    tell: Tell = SILENT,
) -> Passed:
    """Ask both runners ("reference", "candidate") every question. The first `num_windows`, of one length, may be
    watched inside. `weight_bytes`: of the larger model, by which the parts are sized."""
    observe = _how_many_to_watch(runners, questions[:num_windows], weight_bytes)
    parts = _parts(runners, questions, observe, max(LEAST_BYTES, weight_bytes // 32))
    kept = [_kept(runners["reference"], part, questions, observe, keep) for part in parts]
    work = _Work(tell, runners, [[questions[i] for i in part] for part in parts], kept)
    answers: dict[int, Compared] = {}
    inside = Inside()
    notes: list[str] = []
    for number, part in enumerate(parts):
        mine = [questions[i] for i in part]
        watched = sum(i < observe for i in part)
        work.part = number
        reference, note = _reference(runners["reference"], mine, watched, keep, work)
        candidate = _read(runners["candidate"], mine, watched, work, "candidate")
        if note is not None and note not in notes:
            notes.append(note)
        if number == 0:
            inside = compare_inside(reference.observed, candidate.observed)
        reference.observed = candidate.observed = None
        names = [f"window {i}" if i < num_windows else f"task text {i - num_windows}" for i in part]
        answers.update(zip(part, _compared(reference, candidate, mine, names, work), strict=True))
        reference.close()
        candidate.close()
    return Passed(answers=[answers[i] for i in range(len(questions))], inside=inside, notes=notes)


def _how_many_to_watch(runners: Mapping[str, Runner], windows: Sequence[Question], weight_bytes: int) -> int:
    both = [r for r in runners.values() if isinstance(r, TorchRunner)]
    depths = {r.model.num_blocks for r in both}
    if len(both) < 2 or len(depths) != 1:
        return 0
    width = max(r.hidden_size for r in both)
    return watch.watchable(depths.pop(), width, [len(w.tokens.ids_T) for w in windows], weight_bytes)


def _parts(
    runners: Mapping[str, Runner], questions: Sequence[Question], observe: int, most_bytes: int
) -> list[list[int]]:
    """Indices of questions, part by part: what is watched comes first, and what is of one length together."""
    width = max((r.hidden_size for r in runners.values() if isinstance(r, TorchRunner)), default=1)
    rounds = rounds_of([q.tokens for q in questions], observe, width, most_bytes)
    return [[i for batch in batches for i in batch] for batches in rounds]


def _kept(runner: Runner, part: Sequence[int], questions: Sequence[Question], observe: int, keep: Keep | None) -> bool:
    if keep is None or not isinstance(runner, TorchRunner):
        return False
    sequences = [questions[i].tokens for i in part]
    name = cache.key(runner, sequences, sum(i < observe for i in part), keep.model_sha256)
    return cache.holds(keep.folder, name)


def _reference(
    runner: Runner, mine: Sequence[Question], watched: int, keep: Keep | None, work: _Work
) -> tuple[Reading, str | None]:
    """The reference's reading, from the cache or for it; and why it is not kept, if it is not."""
    if keep is None or not isinstance(runner, TorchRunner):
        return _read(runner, mine, watched, work, "reference"), None
    sequences = [q.tokens for q in mine]
    name = cache.key(runner, sequences, watched, keep.model_sha256)
    found = cache.load(keep.folder, name, runner, sequences)
    if found is not None:
        work.doing("reference, read back")
        return found, None
    reading = _read(runner, mine, watched, work, "reference")
    assert isinstance(reading, TorchReading)
    return reading, cache.save(keep.folder, name, reading)


def _read(runner: Runner, mine: Sequence[Question], watched: int, work: _Work, role: str) -> Reading:
    sequences = [q.tokens for q in mine]
    if isinstance(runner, OnnxRunner):
        return runner.read(sequences)
    runner.on_block = lambda done, total: work.block(role, done, total)
    return runner.read(sequences, observe=watched)


def _compared(
    reference: Reading, candidate: Reading, mine: Sequence[Question], names: Sequence[str], work: _Work
) -> list[Compared]:
    wanted = [(Span(i, q.first, q.first + len(q.target)), q.target) for i, q in enumerate(mine)]
    parts, done = [], 0
    for spans, target_P in batches(wanted):
        parts.append(compare_at(reference, candidate, spans, target_P, names.__getitem__))
        done += len(target_P)
        work.compared(done)
    sizes = [len(q.target) for q in mine]
    fields = [f.name for f in dataclasses.fields(Compared)]
    columns = [torch.cat([getattr(p, name) for p in parts]).split(sizes) for name in fields]
    return [Compared(**dict(zip(fields, row, strict=True))) for row in zip(*columns, strict=True)]


class _Work:
    """Tells how much of the whole is done, in percent of what it is guessed to cost."""

    def __init__(
        self, tell: Tell, runners: Mapping[str, Runner], parts: Sequence[Sequence[Question]], kept: Sequence[bool]
    ) -> None:
        self.tell = tell
        self.part = 0
        self.costs = [_costs(runners, mine, is_kept) for mine, is_kept in zip(parts, kept, strict=True)]
        self.positions = [sum(len(q.target) for q in mine) for mine in parts]
        self.total = sum(sum(cost.values()) for cost in self.costs)
        self.percent = 0
        tell.start("percent of the evaluation", 100)

    def block(self, role: str, done: int, total: int) -> None:
        before = 0.0 if role == "reference" else self.costs[self.part]["reference"]
        share = self.costs[self.part][role] * done / total
        self._done(before + share, f"{role}, block {done} of {total}")

    def compared(self, positions: int) -> None:
        cost, total = self.costs[self.part], self.positions[self.part]
        share = cost["comparing"] * positions / max(1, total)
        self._done(cost["reference"] + cost["candidate"] + share, f"comparing, {positions} of {total} tokens")

    def doing(self, what: str) -> None:
        self.tell.step(doing=what + self._which())

    def _done(self, within: float, doing: str) -> None:
        earlier = sum(sum(cost.values()) for cost in self.costs[: self.part])
        percent = int(100 * (earlier + within) / self.total + 1e-9)
        self.tell.step(percent if percent > self.percent else None, doing + self._which())
        self.percent = max(self.percent, percent)

    def _which(self) -> str:
        return f" (part {self.part + 1} of {len(self.costs)})" if len(self.costs) > 1 else ""


def _costs(runners: Mapping[str, Runner], mine: Sequence[Question], is_kept: bool) -> dict[str, float]:
    """Multiply-adds of each stage of a part, about."""
    tokens = sum(len(q.tokens.ids_T) for q in mine)
    positions = sum(len(q.target) for q in mine)
    out = {"comparing": float(_ELEMENTWISE * positions * runners["reference"].vocab_size)}
    for role, runner in runners.items():
        out[role] = 0.0
        if isinstance(runner, TorchRunner):
            blocks = sum(p.numel() for block in runner.model.blocks for p in block.parameters())
            out["comparing"] += positions * runner.vocab_size * runner.hidden_size
            out[role] = 0.0 if role == "reference" and is_kept else float(tokens * blocks)
    return out
