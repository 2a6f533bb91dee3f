"""The judge of a search (`compress.search`): `compress evaluate` of each artifact, on one text held out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ConfigError

if TYPE_CHECKING:
    from compress.search import Found, Judge
    from compress.tell import Tell
    from compress.workspace import Source
    from evaluators.results import Report

GATE = 0.98


def text_to_judge(source: Source, data: str | None, gate: float | None, calib: str | None) -> str | None:
    """The text to judge on; None where none is needed and none is there. ConfigError for the calibration text."""
    from compress.cli.evaluate import text_for
    from compress.workspace import is_reference

    if data is None and gate is None and not is_reference(source.path):
        return None
    text = text_for(source.path, data)
    if calib is not None and os.path.exists(calib) and os.path.exists(text) and os.path.samefile(calib, text):
        raise ConfigError(f"--data {text} is the calibration text, of which the artifact has seen the answers; hold "
                          "another text out")  # fmt: skip
    return text


class Judges:
    """Evaluates artifacts of a search against the original, and keeps the reports until one of them has its place."""

    def __init__(self, original: Path, data: str, gate: float | None, max_tokens: int, device: str) -> None:
        from compress.cli.next import EVALUATED_CONTEXT
        from compress.positions import positions_of

        self.original, self.data, self.gate, self.max_tokens, self.device = original, data, gate, max_tokens, device
        limit = positions_of(original)
        self.context = min(EVALUATED_CONTEXT, limit[1] if limit else EVALUATED_CONTEXT)
        self.reports: dict[int, Report] = {}
        self._check_text()

    def _check_text(self) -> None:
        """ConfigError, before anything is made, for a text that gives too few windows to judge by."""
        from compress.texts import documents
        from evaluators.gate import LEAST_WINDOWS

        least = LEAST_WINDOWS * self.context
        if self.gate is not None and self.max_tokens < least:
            raise ConfigError(f"--max-tokens {self.max_tokens}: a gate needs {LEAST_WINDOWS} windows of {self.context} "
                              f"tokens to judge by; ask for {least} or more")  # fmt: skip
        if self.data != "self" and not self.data.startswith("hf:"):
            next(iter(documents(self.data)), None)

    def judge(self, shown: Tell) -> Judge:
        """What `compress.search` asks of every artifact."""
        from compress.search import Judged
        from evaluators import cache
        from evaluators.evaluate import evaluate
        from evaluators.request import EvaluationRequest

        def judged(folder: Path) -> Judged:
            report = evaluate(
                EvaluationRequest(
                    candidate=folder, reference=self.original, data=self.data, threshold=self.gate or GATE,
                    context=self.context, max_tokens=self.max_tokens, device=self.device,
                    cache_folder=cache.default_folder(),
                ),
                shown,
            )  # fmt: skip
            self.reports[folder.stat().st_ino] = report
            verdict = report.verdicts[0]
            if verdict.outcome == "INCONCLUSIVE" and self.gate is not None and verdict.needed is None:
                _refuse_text(verdict.reason)
            kl = next(metric.value for metric in report.metrics if metric.name == "kl_mean")
            passes = self.gate is not None and verdict.outcome == "PASS"
            bounds = verdict.recovery
            return Judged(passes=passes, recovery=bounds.value, lower=bounds.lower, upper=bounds.upper, kl=kl)

        return judged

    def keep(self, found: Found) -> str | None:
        """Remember the report of what was published, beside it; a note when that could not be."""
        from dataclasses import replace

        from evaluators import memory

        report = self.reports.get(found.out.stat().st_ino)
        if report is None or self.gate is None:
            return None
        report = replace(report, candidate=replace(report.candidate, path=str(found.out)))
        return memory.remember(found.out, report)


def _refuse_text(reason: str) -> None:
    if "windows are too few" in reason:
        raise ConfigError(f"--data: {reason}")
