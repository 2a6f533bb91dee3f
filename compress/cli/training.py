"""What a training run tells, on stderr: a live line on a terminal; elsewhere a line now and then, not one a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from compress.cli.progress import Steps, seconds_text
from compress.tell import Tell

# Without a terminal: seconds between lines.
_SECONDS = 15.0


class Shown(Tell):
    """Use as a context manager. notes: what is to be printed at the end."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.notes: list[str] = []
        self._steps: Steps | None = None
        self._what, self._total, self._begun, self._resumed, self._said = "", 0, 0.0, 0, 0.0

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, what: str, total: int) -> None:
        self.__exit__(None, None, None)
        self._what, self._total, self._begun, self._resumed, self._said = what, total, time.monotonic(), 0, 0.0
        self._steps = Steps(what, quiet=self.quiet).__enter__()
        self._steps.start(total)

    def step(
        self,
        done: int | None = None,
        doing: str = "",
        *,
        found: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        assert self._steps is not None
        if done is None:
            self._steps.note(doing)
            return
        now = time.monotonic()
        if resumed:
            self._resumed, self._begun = done, now
        computed = done - self._resumed
        left = self._total - done
        eta = f", {seconds_text((now - self._begun) / computed * left)} left" if computed and left else ""
        if self._steps.live:
            self._steps.progress.update(self._steps.task, completed=done, note=f"{doing}{eta}")
        elif not self.quiet and (now - self._said > _SECONDS or done == self._total or resumed):
            self._said = now
            print(f"{self._what} {done}/{self._total}: {doing}{eta}", file=sys.stderr, flush=True)
