"""The smallest artifact that passes the gate: bits where they count, under budgets that are tried until one is right.

What is measured of the model once (`quantize.sensitivity`) predicts the divergence of every choice, and so ranks them;
how much recovery a divergence costs, only an artifact tells that was made and judged. So: make the one that should
just pass, judge it on held-out text, correct the prediction by what came out, and go on between the largest that fails
and the smallest that passes. Everything lies in the scratch folder of one run: a killed search goes on where it was,
with what it measured and the artifacts that it made, and ends with the same bytes. The best one is given its place by
one rename.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from compress import output, stage
from compress.artifact import MANIFEST, read_manifest
from compress.calibration_rows import Rows, weight_bytes
from compress.checkpoint import Checkpoint
from compress.errors import ConfigError
from compress.formats import compressed_tensors
from compress.journal import Facts
from compress.model import StreamedModel
from compress.output import Place, Run
from compress.plan import DENSE, LayerPlan
from compress.quantize.auto_stage import AutoRequest, Made, auto_stage, base_plan
from compress.quantize.choices import Choice, Choices, bytes_outside
from compress.quantize.menu import num_bytes
from compress.quantize.sensitivity import measure
from compress.tell import SILENT, Tell

# Artifacts that a search makes at most.
TRIES = 4
# The share of the loss allowed that the first one is predicted to take: bounds lie below what is measured.
FIRST = 0.8
# How near a passing artifact must come to a failing one, in bytes of the smallest, for the search to end.
NEAR = 0.01
# Aimed at is a little less loss than the gate allows.
AIM = 0.97


@dataclass(frozen=True, kw_only=True)
class Goal:
    """gate: the least recovery, None to make the best within `most`. most: bytes of weights at most. tries: artifacts
    that are made and judged at most. judging: JSON of what decides a verdict, for the run's identity."""

    gate: float | None = 0.98
    most: int | None = None
    tries: int = TRIES
    judging: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gate is None and self.most is None:
            raise ConfigError("nothing is asked for: give a gate, such as 0.98, or bytes")
        if self.gate is not None and not 0 < self.gate < 1:
            raise ConfigError(f"--gate {self.gate} is not between 0 and 1; choose a share to keep, such as 0.98")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What an artifact was found to be. passes: at the goal's gate. recovery, lower, upper: of perplexity. kl: mean."""

    passes: bool
    recovery: float
    lower: float
    upper: float
    kl: float

    @property
    def loss(self) -> float:
        """What the gate's bound loses, in nats a token."""
        return -math.log(max(self.lower, 1e-300))


Judge = Callable[[Path], Judged]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An artifact that was made. num_bytes: of its weights. judged: None where no judge was there."""

    choice: Choice
    budget: int
    num_bytes: int
    folder: Path
    judged: Judged | None = None

    def to_json(self) -> dict[str, Any]:
        judged = self.judged
        return {
            "bytes": self.num_bytes,
            "predicted_kl": self.choice.kl,
            "kl": judged and judged.kl,
            "recovery": judged and judged.recovery,
            "lower": judged and judged.lower,
            "upper": judged and judged.upper,
            "passes": judged and judged.passes,
        }


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search: where the best lies, what was tried in order, and all that could have been chosen.

    best, choices: None where an earlier process had finished and only its scratch was left.
    """

    out: Path
    best: Tried | None
    tried: list[Tried]
    choices: Choices | None
    source_bytes: int
    record: dict[str, Any]
    verified: int
    notes: list[str]


def search(
    request: AutoRequest,
    goal: Goal,
    judge: Judge | None,
    tell: Tell = SILENT,
    *,
    vet: Callable[[Mapping[str, Any]], None] = lambda text: None,
) -> Found:
    """Find the best artifact for a goal and publish it at `request.out`. Raises CompressError subclasses.

    vet: told what a manifest keeps of the calibration text, before anything is measured; raises where the judge's text
    is that text.
    Where nothing passes, the one that misses least is published; the caller says so.
    """
    if goal.gate is not None and judge is None:
        raise ConfigError("a gate needs a text to judge on; pass one, or bytes without a gate")
    job = request.job()
    reads = {"the model": job.source.path, **output.file_read(job.text.calib)}
    with output.reserved(job.out, reads, force=job.force) as place:
        model = StreamedModel.open(
            job.source.path, device=job.device, trust_remote_code=job.trust_remote_code
        )  # in float32: differences of divergences are small
        plan = base_plan(request, model)
        check_budget(request, goal, model, plan)
        rows = stage.rows_of(job, model, tell)
        vet(rows.text.record())
        run = _start(request, goal, model, rows, place)
        if run.is_published():
            run.close()
            return _finished(request, place)
        find = partial(measure, model, rows.ids_NT, plan, request.menu, tell)
        found = Facts(run.folder, run.id).once("sensitivity", find)
        maker = _Maker(request, Choices.of(request.menu, model, plan, found), rows, run, judge, tell, goal.gate)
        tried = maker.try_for(goal)
        if not tried:
            raise ConfigError(
                f"--gate {goal.gate}: nothing but float16 is predicted to keep so much; the model is best left as it is"
            )
        best = best_of(tried)
        return _publish(best, tried, maker, place)


def check_budget(request: AutoRequest, goal: Goal, model: StreamedModel, plan: LayerPlan) -> None:
    """ConfigError, before any work, when not even the smallest choice fits the goal's bytes; and for a full disk."""
    shapes = stage.shapes_of(model, plan)
    outside = bytes_outside(model, set(shapes))
    dense = outside + sum(num_bytes(DENSE, shape) for shape in shapes.values())
    if request.menu.dense and goal.gate is None and goal.most is not None and goal.most >= dense:
        raise ConfigError(
            f"within {goal.most / 1e6:.2f} MB everything may stay in float16 ({dense / 1e6:.2f} MB), so nothing is "
            "to be made; ask for fewer bytes, or leave float16 out of the choice with --no-float16"
        )
    least = outside + sum(num_bytes(request.menu.options(shape[1])[0], shape) for shape in shapes.values())
    if goal.most is not None and goal.most < least:
        raise ConfigError(
            f"{goal.most / 1e6:.2f} MB are too few: the smallest that can be chosen takes {least / 1e6:.2f} MB, of "
            f"which {outside / 1e6:.2f} MB are not quantized; ask for more, or prune first"
        )


def _start(request: AutoRequest, goal: Goal, model: StreamedModel, rows: Rows, place: Place) -> Run:
    """The scratch folder of this search, taken up where a killed one left it."""
    identity = {
        "stage": "auto search",
        **request.options(),
        "goal": {"gate": goal.gate, "most": goal.most, "tries": goal.tries, **goal.judging},
        "calibration": rows.sha256(),
        "model": model.checkpoint.content_sha256(),
        "versions": stage.versions(),
    }
    return place.start(identity, resume=request.resume)


@dataclass
class _Maker:
    """Makes and judges artifacts in the run's scratch folder, each once."""

    request: AutoRequest
    choices: Choices
    rows: Rows
    run: Run
    judge: Judge | None
    tell: Tell
    gate: float | None = None
    verified: int = 0
    notes: list[str] = field(default_factory=list)

    def try_for(self, goal: Goal) -> list[Tried]:
        """Artifacts in the order in which they were made."""
        tried: list[Tried] = []
        while len(tried) < goal.tries:
            choice = next_choice(self.choices, goal, tried)
            if choice is None:
                break
            tried.append(self._make(choice))
            if goal.gate is None:
                break
        return tried

    def _make(self, choice: Choice) -> Tried:
        folder = self.run.folder / f"try-{choice.num_bytes}"
        shown = f"{choice.num_bytes / 1e6:.2f} MB, predicted KL {choice.kl:.4f}"
        if not (folder / MANIFEST).is_file():
            self.tell.say(f"making {shown}")
            made = Made(request=self.request, choice=choice, budget=choice.num_bytes, found=self.choices.found)
            job = replace(
                self.request.job(), out=folder, home=self.request.out, rows=self.rows, resume=True, force=False
            )
            outcome = stage.run(auto_stage(made, self.choices.shapes), job, self.tell)
            self.verified = outcome.verified
            self.notes += [note for note in outcome.notes if note not in self.notes]
        size = weight_bytes(Checkpoint.open(folder))
        one = Tried(choice=choice, budget=choice.num_bytes, num_bytes=size, folder=folder)
        if self.judge is None:
            return one
        self.tell.say(f"judging {size / 1e6:.2f} MB")
        judged = self.judge(folder)
        verdict = "" if self.gate is None else " passes" if judged.passes else " does not pass"
        self.tell.say(
            f"{size / 1e6:.2f} MB{verdict}: recovery {judged.recovery:.2%} (at least {judged.lower:.2%}), KL "
            f"{judged.kl:.4f} (predicted {choice.kl:.4f})"
        )
        return replace(one, judged=judged)


def _reader_note(record: Mapping[str, Any]) -> list[str]:
    """Which loader does not take what was made."""
    with_zero_points = any(
        scheme.weight is not None and not scheme.weight.symmetric
        for scheme in LayerPlan.from_json(record["plan"]).groups()
    )
    notes = []
    if "readers" in record:
        said = "; ".join(f"{reader}: {version}" for reader, version in record["readers"].items())
        notes.append(f"the output matrix is in integers, which needs of a reader: {said}")
    if record["format"] != compressed_tensors.NAME or not with_zero_points:
        return notes
    return [
        *notes,
        "the folder mixes INT4 with zero points, which vLLM reads and transformers 5.23 does not load by itself: from "
        "Python compress.load_model does, and --sym makes one that everything reads, with more loss",
    ]


def _publish(best: Tried, tried: list[Tried], maker: _Maker, place: Place) -> Found:
    """Give the best artifact its place, and remove the others with the scratch folder."""
    source = maker.request.source.path
    run = maker.run
    if run.staged.exists():
        run.new_staged().rmdir()
    os.rename(best.folder, run.staged)
    manifest = read_manifest(run.staged)
    assert manifest is not None
    run.publish()
    return Found(
        out=maker.request.out,
        best=best,
        tried=tried,
        choices=maker.choices,
        source_bytes=weight_bytes(Checkpoint.open(source)),
        record=manifest.record,
        verified=maker.verified,
        notes=[*maker.rows.notes, *maker.notes, *place.notes, *_reader_note(manifest.record)],
    )


def _finished(request: AutoRequest, place: Place) -> Found:
    """The outcome of a search that an earlier process brought to its end."""
    manifest = read_manifest(request.out)
    assert manifest is not None  # it was found published
    return Found(
        out=request.out,
        best=None,
        tried=[],
        choices=None,
        source_bytes=weight_bytes(Checkpoint.open(request.source.path)),
        record=manifest.record,
        verified=0,
        notes=["an earlier run had finished this artifact; nothing was left to do", *place.notes],
    )


# ---- which one next ------------------------------------------------------------------------------------


def best_of(tried: Sequence[Tried]) -> Tried:
    """The smallest that passes; else the one that recovers most; else, unjudged, the last."""
    passing = [one for one in tried if one.judged is not None and one.judged.passes]
    if passing:
        return min(passing, key=lambda one: one.num_bytes)
    return max(tried, key=lambda one: one.judged.lower if one.judged else 0.0)


def next_choice(choices: Choices, goal: Goal, tried: Sequence[Tried]) -> Choice | None:
    """What to make next; None when the search is at its end."""
    cap = choices.most if goal.most is None else min(goal.most, choices.most)
    if goal.gate is None:
        return choices.within(cap)
    allowed = -math.log(goal.gate)
    wanted = choices.smallest_below(aimed(allowed, [(t.choice.kl, t.judged.loss) for t in tried if t.judged]))
    failing = max((t.choice.num_bytes for t in tried if not _passes(t)), default=0)
    passing = min((t.choice.num_bytes for t in tried if _passes(t)), default=None)
    if passing is not None and passing - failing <= NEAR * choices.least:
        return None
    if wanted.num_bytes <= failing:  # what was corrected by noise: half-way instead
        above = cap if passing is None else passing
        wanted = choices.within(max(choices.least, (failing + above) // 2))
    if wanted.num_bytes > cap:
        wanted = choices.within(cap)
    known = {t.choice.num_bytes for t in tried}
    if not wanted.plan.quantized:  # float16 alone is the model as it is
        return None
    return None if wanted.num_bytes in known or (passing is not None and wanted.num_bytes >= passing) else wanted


def _passes(tried: Tried) -> bool:
    return tried.judged is not None and tried.judged.passes


def aimed(allowed: float, seen: Sequence[tuple[float, float]]) -> float:
    """The predicted divergence at which the gate's bound should lose `allowed` nats a token.

    seen: predicted divergence and loss of what was judged. Loss grows like a power of the divergence between the two
    that lie around the gate, and in proportion to it beyond what is known.
    """
    if not seen:
        return FIRST * allowed
    aim = AIM * allowed
    known = sorted((kl, max(loss, 1e-9)) for kl, loss in seen)
    below = [pair for pair in known if pair[1] <= aim]
    above = [pair for pair in known if pair[1] > aim]
    if below and above and below[-1][0] < above[0][0]:
        (x0, y0), (x1, y1) = below[-1], above[0]
        way = math.log(aim / y0) / math.log(y1 / y0)
        return float(x0 * (x1 / x0) ** way)
    kl, loss = min(known, key=lambda pair: abs(math.log(pair[1] / aim)))
    return kl * aim / loss
