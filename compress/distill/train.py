"""The training loop: rows to updates, watched, checkpointed, and resumed bit for bit.

What an update reads is a function of its number alone: rows in the order of `rows.order`, shared out to processes and
passes. So the position in the data needs no state, and any number of processes reads the same rows for an update.

Shapes: B rows, T tokens
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import distributed
from compress.distill import checkpoint
from compress.distill.checkpoint import Checkpoints
from compress.distill.engine import Engine
from compress.distill.gradients import Compression
from compress.distill.onpolicy import is_on_policy, uniforms
from compress.distill.optim import Rate, set_rate
from compress.distill.rows import Batch, Rows, moved, order
from compress.distill.signals import Stop
from compress.distill.student import PARTS, Rewrite, Study
from compress.distill.teacher import Lessons
from compress.distill.watch import Watch
from compress.errors import CompressError
from compress.tell import Tell


class Diverged(CompressError):
    """A loss or a gradient that is not finite."""


class Worse(CompressError):
    """Training made the watched text worse from the first look on."""


class Stopped(CompressError):
    """A signal ended the run; its checkpoint is written."""

    exit_code = 130


@dataclass(frozen=True, kw_only=True)
class Plan:
    """steps: updates. batch: rows an update. micro: rows a pass of one process. clip: largest norm of a gradient.

    on_policy: share of updates on the student's own text, of the first `num_ids` ids. isolate: see `Rows.batch`.
    """

    steps: int
    batch: int
    micro: int
    rate: Rate
    clip: float = 1.0
    seed: int = 0
    isolate: bool = False
    on_policy: float = 0.0
    num_ids: int = 0
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 600.0

    @property
    def passes(self) -> int:
        """Forward and backward passes of a process for an update."""
        return self.batch // (self.micro * distributed.num_processes())


@dataclass(kw_only=True)
class State:
    """Where a run stands. curve: one record an update; watched: one a look at the watched text."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    watched: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    ended_early: bool = False

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Training:
    """One run in this process. `heard` is called with each record of the curve that was computed, not read back."""

    def __init__(
        self,
        engine: Engine,
        lessons: Lessons,
        rows: Rows,
        plan: Plan,
        checkpoints: Checkpoints,
        *,
        watch: Watch | None = None,
        compression: Compression | None = None,
        stop: Stop | None = None,
        tell: Tell | None = None,
        describe: Callable[[dict[str, float]], str] = lambda record: f"loss {record['loss']:.4f}",
        heard: Callable[[dict[str, float]], None] = lambda record: None,
    ) -> None:
        self.engine, self.lessons, self.rows, self.plan, self.checkpoints = engine, lessons, rows, plan, checkpoints
        self.watch, self.compression = watch, compression
        self.stop, self.tell, self.describe, self.heard = stop or Stop(), tell or Tell(), describe, heard
        self.best = Checkpoints(checkpoints.folder.with_name("best"), checkpoints.what)
        self.state = State()
        self._orders: dict[int, Any] = {}
        self._ahead: tuple[int, Study] | None = None
        self._saved_at = time.monotonic()

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self, *, resume: bool = True) -> State:
        """Train to the end, from the newest checkpoint if there is one. The student then has its best or last weights.

        Raises Diverged, with the last checkpoint's name, and Stopped once a signal came and a checkpoint is written.
        """
        self.engine.module.train()
        if self.engine.kind == "ddp":
            first = self._batch(0, 0).to(self.engine.device)
            self.engine.rehearse(Study(batch=first, lesson=self.lessons.lesson(first)))
        if resume:
            self._resume()
        if self.compression is not None:
            self.compression.on = True
        self.tell.start("step", self.plan.steps)
        if self.state.step:
            self.tell.step(self.state.step, f"from the checkpoint at step {self.state.step}", resumed=True)
        elif self.watch is not None and not self.state.watched:
            self._look()
        while self.state.step < self.plan.steps and not self.state.ended_early:
            record, stopping, due = self._update()
            self.tell.step(self.state.step, self.describe(record))
            if self.watch is not None and self.watch.is_due(self.state.step, self.plan.steps):
                self._look()
            saved = self.save() if stopping or due or self._by_count() else None
            if stopping:
                raise Stopped(
                    f"stopped by {self.stop.asked or 'a signal'} at step {self.state.step} of {self.plan.steps}, which "
                    f"is saved in {saved}; the same command goes on from there"
                )
        if self.state.best_step is not None and self.state.best_step != self.state.step:
            self._load_best()
        return self.state

    def _update(self) -> tuple[dict[str, float], bool, bool]:
        """One update; returns its record, whether a signal came, and whether it is time for a checkpoint."""
        plan, step = self.plan, self.state.step
        rate = plan.rate.at(step, plan.steps)
        set_rate(self.engine.optimizer, rate)
        sums = torch.zeros(1 + len(PARTS), dtype=torch.float64, device=self.engine.device)
        for number in range(plan.passes):
            study = self._study(step, number)
            with self.engine.accumulating(last=number + 1 == plan.passes):
                loss, parts = self.engine.module(study)
                self.engine.backward(loss / plan.passes)
            sums += torch.cat([loss.detach()[None], parts]).double() / plan.passes
        norm_1 = self.engine.clip(plan.clip).double()[None]
        found = self.engine.on_its_way(torch.cat([self.engine.mean(torch.cat([sums, self._flags()])), norm_1]))
        self._look_ahead(step + 1)
        *values, stopping, due, norm = found()
        if not all(math.isfinite(v) for v in (*values, norm)):
            raise Diverged(self._diverged(values[0], norm, rate))
        norm = self.engine.update(norm)
        if not math.isfinite(norm):
            raise Diverged(self._diverged(values[0], norm, rate))
        self.state.step += 1
        record = {
            "step": self.state.step,
            **dict(zip(("loss", *PARTS), values, strict=True)),
            "rate": rate,
            "norm": norm,
        }
        self.state.curve.append(record)
        self.heard(record)
        return record, bool(stopping), bool(due)

    def _flags(self) -> Tensor:
        """Whether a signal came and, of the first process, whether it is time for a checkpoint: float64 `[2]`."""
        overdue = time.monotonic() - self._saved_at > self.plan.checkpoint_seconds
        flags = (bool(self.stop.asked), overdue and distributed.rank() == 0)
        return moved(torch.tensor(flags, dtype=torch.float64), self.engine.device)

    def _study(self, step: int, number: int) -> Study:
        """What pass `number` of an update reads, with the teacher's word on it."""
        if number == 0 and self._ahead is not None and self._ahead[0] == step:
            study, self._ahead = self._ahead[1], None
            return study
        batch, counted_P = self._batch(step, number).to(self.engine.device), None
        if is_on_policy(step, self.plan.on_policy):
            places = [self._place(step, number) + i for i in range(self.plan.micro)]
            uniform_BT = uniforms(step, places, self.rows.seq_len, self.plan.seed)
            task = Rewrite(batch=batch, uniform_BT=uniform_BT, num_ids=self.plan.num_ids)
            batch, counted_P = self.engine.module(task)
        return Study(batch=batch, lesson=replace(self.lessons.lesson(batch), counted_P=counted_P))

    def _look_ahead(self, step: int) -> None:
        """Hand a GPU the next update's first lesson, so that it has work while this one's numbers are looked at."""
        waits = self.engine.device.type == "cuda" and step < self.plan.steps
        if waits and not is_on_policy(step, self.plan.on_policy):
            self._ahead = (step, self._study(step, 0))

    def _place(self, step: int, number: int) -> int:
        """The first of this process's places in the order of rows."""
        plan = self.plan
        return step * plan.batch + (number * distributed.num_processes() + distributed.rank()) * plan.micro

    def _batch(self, step: int, number: int) -> Batch:
        """This process's rows for pass `number` of update `step`."""
        start = self._place(step, number)
        return self.rows.batch([self._row(start + i) for i in range(self.plan.micro)], isolate=self.plan.isolate)

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, len(self.rows))
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = order(len(self.rows), self.plan.seed, epoch)
        return int(self._orders[epoch][within])

    def _diverged(self, loss: float, norm: float, rate: float) -> str:
        return (
            f"loss {loss:.4g}, gradient norm {norm:.4g} at step {self.state.step + 1} (rate {rate:.3g}): {self._kept()}"
        )

    def _kept(self) -> str:
        """What is left of a run that diverged, and what to do."""
        steps = self.checkpoints.steps()
        kept = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was due yet"
        )
        return f"{kept}; pass a smaller --lr with --no-resume"

    # ---- watching another text -----------------------------------------------------------------------

    def _look(self) -> None:
        """Measure the watched text; keep the weights if none were better on it, end if the last looks were worse."""
        assert self.watch is not None
        record = {"step": float(self.state.step), **self.watch.measure(self.engine)}
        self.state.watched.append(record)
        best, since = self.watch.best(self.state.watched)
        if best == self.state.step and best:
            self.best.save(best, self.engine.tensors(optimizer=False), {}, {})
        self.state.best_step = best
        self.tell.say(self.watch.said(record))
        self.state.ended_early = since >= self.watch.patience
        if self.state.ended_early:
            self.tell.note(
                f"ended at step {self.state.step} of {self.plan.steps}: the watched text was best at step {best}, and "
                f"{since} looks since then found it worse"
            )

    # ---- checkpoints ---------------------------------------------------------------------------------

    def _by_count(self) -> bool:
        every = self.plan.checkpoint_steps
        return bool(every) and self.state.step % every == 0

    def save(self) -> Path:
        """Write a checkpoint of now. Diverged where the last update made weights that are not finite."""
        if not self.engine.are_finite():
            rate = self.plan.rate.at(self.state.step - 1, self.plan.steps)
            raise Diverged(f"the weights are not finite after step {self.state.step} (rate {rate:.3g}): {self._kept()}")
        tensors = self.engine.tensors(optimizer=True)
        random_tensors, own = checkpoint.random_state()
        tensors.update(random_tensors)
        if self.compression is not None:
            tensors.update(self.compression.tensors())
            own["powersgd"] = self.compression.numbers()
        self._saved_at = time.monotonic()
        return self.checkpoints.save(self.state.step, tensors, own, self.state.to_json())

    def _resume(self) -> None:
        step = self.checkpoints.newest(self.tell.note)
        if step is None:
            return
        tensors, own, state = self.checkpoints.load(step)
        if not self.engine.shares and distributed.rank() != 0:  # copies are equal: the first process's
            shared, _, _ = self.checkpoints.load(step, rank=0)
            tensors = {**{n: v for n, v in shared.items() if n.startswith(("param.", "optim."))}, **tensors}
        self.engine.restore(tensors)
        if self.compression is not None:
            self.compression.restore(tensors, own["powersgd"], self.engine.device)
        self.state = State(**state)
        checkpoint.restore_random_state(tensors, own)

    def _load_best(self) -> None:
        assert self.state.best_step is not None
        self.tell.note(f"the weights of step {self.state.best_step} are kept, the best on the watched text")
        if self.state.best_step == 0:
            raise Worse(
                "no step made the watched text better than the student had been before; pass a smaller --lr or other "
                "--data, or leave out --watch"
            )
        tensors, _, _ = self.best.load(self.state.best_step, rank=None if self.engine.shares else 0)
        self.engine.restore(tensors)
