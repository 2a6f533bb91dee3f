"""One vocabulary of progress, for the command line, JSON, notebooks and tests.

Everything that takes long takes a `Tell` and speaks through it; who listens subclasses it and overrides what it shows.
The class itself says nothing, so `Tell()` is silence.

    say     a line about what is going on, once
    start   a counted job of `total` equal steps begins; the job before it has ended
    step    so many steps of it are done; or, with `done` None, what is going on inside the current one
    note    something that the user must still see when all is over
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Tell:
    """Listens to a run and shows nothing. A listener overrides any of the four."""

    def say(self, text: str) -> None:
        """One line, now."""

    def start(self, what: str, total: int) -> None:
        """`total` steps of `what` (a noun in the singular: `block`, `window`) begin."""

    def step(
        self,
        done: int | None = None,
        doing: str = "",
        *,
        found: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        """`done` steps are finished; None inside a step, which is then `doing` something.

        found: what the step just finished found out, as the manifest will record it. resumed: it was read back from an
        earlier run and says nothing about how long the others take.
        """

    def note(self, text: str) -> None:
        """One sentence for the end: a fallback taken, something skipped, advice."""


SILENT = Tell()


class Heard(Tell):
    """Keeps what was told, in order, for tests and for callers that show everything at the end.

    events: `("say", text)`, `("start", what, total)`, `("step", done, doing)`, `("note", text)`. finished: what each
    finished step found, and whether it was `resumed`.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.finished: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        self.events.append(("say", text))

    def start(self, what: str, total: int) -> None:
        self.events.append(("start", what, total))

    def step(
        self,
        done: int | None = None,
        doing: str = "",
        *,
        found: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        self.events.append(("step", done, doing))
        if done is not None:
            self.finished.append({"resumed": resumed, **(found or {})})

    def note(self, text: str) -> None:
        self.events.append(("note", text))

    @property
    def said(self) -> list[str]:
        """The lines alone."""
        return [event[1] for event in self.events if event[0] == "say"]

    @property
    def notes(self) -> list[str]:
        """The notes alone."""
        return [event[1] for event in self.events if event[0] == "note"]
