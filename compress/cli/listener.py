"""What a run tells, on stderr: lines as they come, and one live line of progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from compress.cli.progress import Steps
from compress.tell import Tell

# Steps of a job that are each worth a line in a log.
MANY = 200


class Listener(Tell):
    """Shows lines, and counted jobs one after the other. Use as a context manager, which ends the last of them.

    described: what to say of a step that is done, from what it found. quiet: no progress, as for `--json`; lines stay.
    notes: what the user must still see at the end. started: when the last counted job began, `time.monotonic`.
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
        self.started = time.monotonic()
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
        if self._is_one_of_many():
            self._steps.done += 1
            self._steps.computed += not resumed
        else:
            said = "read back" if resumed else doing or self.described(found or {})
            self._steps.step(said, computed=not resumed)
        if self._steps.done == self._steps.total:
            self._end()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _is_one_of_many(self) -> bool:
        """Whether the step to come is not worth a line where lines are printed: of many, each tenth is."""
        assert self._steps is not None
        done, total = self._steps.done, self._steps.total
        return not self._steps.live and total > MANY and (done + 1) * 10 // total == done * 10 // total

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None
