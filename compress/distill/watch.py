"""A second text, looked at now and then: narrow data overfits, and the student kept is the one best on this text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from compress import distributed
from compress.distill.engine import Engine
from compress.distill.rows import Rows
from compress.distill.student import PARTS, Study
from compress.distill.teacher import Lessons


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """rows: of the text. by: the measure that decides, `divergence` (from the teacher, less noisy) or `cross_entropy`.

    every: steps from look to look. patience: looks without improvement that end the run. micro: rows a pass.
    """

    rows: Rows
    lessons: Lessons
    by: str
    every: int
    patience: int
    micro: int
    isolate: bool = False

    def is_due(self, step: int, steps: int) -> bool:
        return step % self.every == 0 or step == steps

    def best(self, looks: Sequence[dict[str, float]]) -> tuple[int, int]:
        """(step of the best look, looks since then)."""
        index = min(range(len(looks)), key=lambda i: (looks[i][self.by], i))
        return int(looks[index]["step"]), len(looks) - 1 - index

    def said(self, look: dict[str, float]) -> str:
        divergence = f"divergence {look['divergence']:.4f}, " if self.by == "divergence" else ""
        return f"watched text at step {look['step']:.0f}: {divergence}perplexity {look['perplexity']:.3f}"

    @torch.no_grad()
    def measure(self, engine: Engine) -> dict[str, float]:
        """Means of the student's `PARTS` over the text, and its perplexity; the same in every process."""
        engine.module.eval()
        sums = torch.zeros(len(PARTS), dtype=torch.float64, device=engine.device)
        batches = list(self._batches())
        for indices in batches:
            batch = self.rows.batch(indices, isolate=self.isolate).to(engine.device)
            _, parts = engine.module(Study(batch=batch, lesson=self.lessons.lesson(batch)))
            sums += parts.double() / len(batches)
        engine.module.train()
        means = dict(zip(PARTS, engine.agree(sums.tolist()), strict=True))
        return {**means, "perplexity": math.exp(min(means["cross_entropy"], 700.0))}

    def _batches(self) -> Iterator[Sequence[int]]:
        """This process's rows; every process has as many passes, or they would wait for each other."""
        world, rank = distributed.num_processes(), distributed.rank()
        size = min(self.micro, max(1, len(self.rows) // world))
        for start in range(0, len(self.rows) - world * size + 1, world * size):
            yield range(start + rank * size, start + (rank + 1) * size)
