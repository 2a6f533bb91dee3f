"""The judge of a search (`compress.search`): `compress evaluate` of each artifact, on one text held out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError

if TYPE_CHECKING:
    from compress.search import Found, Judge
    from compress.tell import Tell
    from compress.workspace import Source
    from evaluators.results import Report
    from evaluators.windows import Windows

GATE = 0.98
# The chance that an artifact passes which is below the gate, at most, over all that are tried.
DOUBT = 0.05


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
    """Evaluates artifacts of a search against the original, and keeps the reports until one of them has its place.

    Of several artifacts that are judged on one text, the smallest that passes is also the luckiest. So each one's
    bounds are stated at a confidence of `1 - 0.05 / tries` (Bonferroni): that any of them passes which should not has
    then a chance of 5 % at most, however alike they are.
    """

    def __init__(
        self, original: Path, data: str, gate: float | None, max_tokens: int, device: str, tries: int = 1
    ) -> None:
        from compress.cli.next import EVALUATED_CONTEXT
        from compress.positions import positions_of

        self.original, self.data, self.gate, self.max_tokens, self.device = original, data, gate, max_tokens, device
        self.confidence = 1 - DOUBT / (tries if gate is not None else 1)
        limit = positions_of(original)
        self.context = min(EVALUATED_CONTEXT, limit[1] if limit else EVALUATED_CONTEXT)
        self.reports: dict[int, Report] = {}
        self.windows = self._windows()

    def _windows(self) -> Windows | None:
        """What is judged on; None for text that is sampled. ConfigError for too little of it."""
        from compress.model import StreamedModel
        from compress.tokens import load_tokenizer
        from evaluators.gate import LEAST_WINDOWS
        from evaluators.windows import load_windows

        least = LEAST_WINDOWS * self.context
        if self.gate is not None and self.max_tokens < least:
            raise ConfigError(f"--max-tokens {self.max_tokens}: a gate needs {LEAST_WINDOWS} windows of {self.context} "
                              f"tokens to judge by; ask for {least} or more")  # fmt: skip
        if self.data == "self":
            return None
        self.tokenizer = load_tokenizer(self.original)
        found = load_windows(
            self.data, self.tokenizer, context=self.context, stride=None, min_context=None, bos="auto",
            max_tokens=self.max_tokens, model=self.original, vocab_size=StreamedModel.open(self.original).vocab_size,
        )  # fmt: skip
        if self.gate is not None and len(found.sequences) < LEAST_WINDOWS:
            raise ConfigError(
                f"--data {self.data} gives {len(found.sequences)} windows of {self.context} tokens, and a gate needs "
                f"{LEAST_WINDOWS} to judge by; pass more text"
            )
        return found

    def vet(self, calibration: Mapping[str, Any]) -> None:
        """ConfigError for a text that was calibrated on. calibration: what a manifest keeps of that."""
        from evaluators.overlap import refuse_used

        if self.windows is not None:
            refuse_used([calibration], self.windows, self.tokenizer, "is calibrated on")

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
                    confidence=self.confidence,
                    context=self.context, max_tokens=self.max_tokens, device=self.device,
                    cache_folder=cache.default_folder(),
                ),
                shown,
            )  # fmt: skip
            self.reports[folder.stat().st_ino] = report
            verdict = report.verdicts[0]
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


def unvetted(calibration: Mapping[str, Any]) -> None:
    """Where nothing is judged, any text may be calibrated on."""
