"""What a run tells, on stderr: lines as they come, and one live line of progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from compress.cli.progress import Steps
from compress.tell import Tell


class Listener(Tell):
    """Shows lines, and counted jobs one after the other. Use as a context manager, which ends the last of them.

    described: what to say of a step that is done, from what it found. quiet: no progress, as for `--json`; lines stay.
    notes: what the user must still see at the end. started: when the first counted job began, `time.monotonic`.
    """

    def __init__(self, described: Callable[[Mapping[str, Any]], str] = lambda found: "done", *, quiet: bool) -> None:
        self.described = described
        self.quiet = quiet
        self.notes: list[str] = []
        self.started: float | None = None
        self._steps: Steps | None = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, what: str, total: int) -> None:
        self._end()
        self.started = self.started or time.monotonic()
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
        if self._steps is None:
            return
        if done is None:
            self._steps.note(doing)
            return
        self._steps.step("read back" if resumed else doing or self.described(found or {}), computed=not resumed)
        if self._steps.done == self._steps.total:
            self._end()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None
