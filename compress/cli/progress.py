"""Progress on stderr: a live line on a terminal, plain lines elsewhere. Results never go through here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from compress.cli.console import Console
from compress.cli.listening import hear
from compress.cli.peak import peak_memory_bytes as peak_memory_bytes
from compress.tell import Tell


def seconds_text(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Pace:
    """How long the steps that are left of a job will take, from how long the later half of those done took.

    The first step of a job often takes longer than the others (a kernel is compiled, a file is not in memory yet), and
    a machine gets busy or free: so what was measured last counts, and not the mean since the start.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0
        self._clock = clock
        self._last = clock()
        self._each: list[tuple[float, int]] = []

    def step(self, done: int, *, resumed: bool = False) -> None:
        """`done` steps are finished. Those that were `resumed` say nothing about the others."""
        now = self._clock()
        if done > self.done and not resumed:
            self._each.append((now - self._last, done - self.done))
        self.done, self._last = max(done, self.done), now

    def seconds_left(self) -> float | None:
        """None while nothing is known. What the step now running has taken already is not left."""
        if not self._each or self.done >= self.total:
            return None
        later = self._each[len(self._each) // 2 :]
        each = sum(seconds for seconds, _ in later) / sum(steps for _, steps in later)
        running = min(self._clock() - self._last, each)
        return each * (self.total - self.done) - running


class _Left(ProgressColumn):
    """The time left, going down between two steps as well."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        pace: Pace | None = task.fields.get("pace")
        left = pace.seconds_left() if pace else None
        if left is not None:
            return Text(f"{seconds_text(left)} left")
        return Text("" if pace is None or pace.done >= pace.total else "time left unknown yet", style="dim")


class Shown(Tell):
    """Shows a run on stderr. Use as a context manager.

    On a terminal one line says what is done, what is left, and what goes on; elsewhere each step gets a plain line, but
    steps that follow each other within a second share one. `describe` turns what a step found into words. Notes are
    shown at once and kept in `notes`. `quiet`: what is said is shown, steps and notes are not. `started`: when
    each job began, by `clock`.
    """

    LINE_SECONDS = 1.0

    def __init__(
        self,
        *,
        quiet: bool = False,
        describe: Callable[[Mapping[str, Any]], str] = lambda found: "",
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet, self.describe, self.clock = quiet, describe, clock
        self.console = Console(file=file, stderr=file is None)
        self.live = self.console.is_terminal and not quiet
        self.notes: list[str] = []
        self.pace: Pace | None = None
        self.started: dict[str, float] = {}
        self._what = ""
        self._said = -1e9
        self._progress: Progress | None = None

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """The job is over, or given up; the live line goes."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self.pace = None, None

    def say(self, text: str) -> None:
        hear("say", text=text)
        self._line(text)

    def note(self, text: str) -> None:
        self.notes.append(text)
        hear("note", text=text)
        if not self.quiet:
            self._line(f"note: {text}")

    def start(self, what: str, total: int) -> None:
        self.end()
        hear("start", what=what, total=total)
        self._what, self._said, self.started[what] = what, -1e9, self.clock()
        self.pace = Pace(total, self.clock)
        if self.live:
            self._progress = _bar(self.console)
            self._task = self._progress.add_task(what, total=total, doing="", memory="", pace=self.pace)
            self._progress.start()

    def step(
        self,
        done: int | None = None,
        doing: str = "",
        *,
        found: Mapping[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        pace = self.pace
        if pace is None:
            return
        hear("step", what=self._what, done=done, doing=doing, found=found, resumed=resumed)
        if done is not None:
            pace.step(done, resumed=resumed)
        text = "read back" if resumed else doing or (self.describe(found) if found is not None else "")
        if self._progress is not None:
            memory = f"peak {peak_memory_bytes() / 2**20:.0f} MiB"
            self._progress.update(self._task, completed=pace.done, doing=text, memory=memory)
        elif done is not None and not self.quiet:
            now = self.clock()
            if found is not None or pace.done == pace.total or now - self._said >= self.LINE_SECONDS:
                self._said = now
                self._line(self._plain(pace, text))

    def _plain(self, pace: Pace, text: str) -> str:
        left = pace.seconds_left()
        parts = [text, f"{seconds_text(left)} left" if left is not None else ""]
        parts.append(f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB")
        return f"{self._what} {pace.done}/{pace.total}: {', '.join(p for p in parts if p)}"

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    """What comes first stays when the terminal is narrow: how far, how long, and only then what is going on."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        _Left(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[memory]}", table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[doing]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
        console=console,
        transient=True,
        expand=True,
    )
