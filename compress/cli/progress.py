"""Progress on stderr: a live line on a terminal, one plain line a step elsewhere. Results never go through here."""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far (`ru_maxrss`; kibibytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds_text(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Steps:
    """Counts equal steps and says how many are left and for how long. Use as a context manager."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self.what = what
        self.quiet = quiet
        self.total = 0
        self.done = 0
        self.computed = 0
        self.started = time.monotonic()
        console = Console(stderr=True)
        self.live = console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task(what, total=1, note="")

    def __enter__(self) -> Steps:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.live:
            self.progress.stop()

    def start(self, total: int) -> None:
        self.total = total
        self.started = time.monotonic()
        self.progress.update(self.task, total=total)

    def note(self, text: str) -> None:
        """What is being done inside the current step; shown on a terminal only."""
        if self.live:
            self.progress.update(self.task, note=text)

    def step(self, text: str, *, computed: bool = True) -> None:
        """One step is done. Steps that cost nothing (read back) do not count for the estimate."""
        self.done += 1
        self.computed += computed
        left = self.total - self.done
        eta = ""
        if left and self.computed:
            each = (time.monotonic() - self.started) / self.computed
            eta = f", {seconds_text(each * left)} left"
        note = f"{text}{eta}, peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
        if self.live:
            self.progress.update(self.task, completed=self.done, note=note)
        elif not self.quiet:
            print(f"{self.what} {self.done}/{self.total}: {note}", file=sys.stderr, flush=True)
