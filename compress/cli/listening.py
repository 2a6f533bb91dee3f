"""What machines hear of a run: events as JSON lines (`--log-json`), and counters for Prometheus (`--metrics`).

A textfile collector (node_exporter's) reads the metrics file; it is written once, at the end, by one rename.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

from compress import __version__
from compress.cli.peak import peak_memory_bytes
from compress.errors import ConfigError, reason

_FIRST = "# HELP compress_run_"
_METRICS = {
    "info": "What ran.",
    "exit_code": "0 done or PASS, 1 input, 2 usage, 3 gate FAIL, 4 INCONCLUSIVE, 70 a bug, 130 interrupted.",
    "duration_seconds": "Wall time of the command.",
    "end_timestamp_seconds": "When it ended, since 1970.",
    "peak_memory_bytes": "Largest resident memory of the process.",
    "steps": "Steps finished, by what they are.",
    "steps_resumed": "Of these, those read back from an earlier run.",
    "notes": "Sentences that the user was to see: fallbacks, what was left out.",
}
_current: Listening | None = None


class Listening:
    """One command's events and counters. Use `listening`."""

    def __init__(self, log: Path | None, metrics: Path | None) -> None:
        self.command = ""
        self.started = time.monotonic()
        self.metrics = metrics
        self.steps: dict[str, int] = {}
        self.resumed: dict[str, int] = {}
        self.notes = 0
        self._what, self._done = "", 0
        self._log: TextIO | None = None
        for flag, path, mine in (("--log-json", log, '{"time"'), ("--metrics", metrics, _FIRST)):
            if path is not None:
                _check(path, flag, mine)
        if log is not None:
            self._log = open(log, "a", encoding="utf-8", buffering=1)

    def hear(self, event: str, **facts: Any) -> None:
        """Count an event, and log it."""
        if event == "start":
            self._what, self._done = facts["what"], 0
        elif event == "step" and facts["done"] is not None:
            new = max(0, facts["done"] - self._done)
            self._done += new
            self.steps[self._what] = self.steps.get(self._what, 0) + new
            if facts["resumed"]:
                self.resumed[self._what] = self.resumed.get(self._what, 0) + new
        elif event == "note":
            self.notes += 1
        if self._log is not None:
            line = {"time": round(time.time(), 3), "command": self.command, "event": event, **facts}
            self._log.write(json.dumps(line, default=str) + "\n")

    def end(self, code: int) -> None:
        """The command is over: the last line, and the metrics."""
        self.hear("end", exit_code=code, seconds=round(time.monotonic() - self.started, 3))
        if self._log is not None:
            self._log.close()
        if self.metrics is not None:
            from compress.files import write_bytes_atomically

            write_bytes_atomically(self.metrics, self.text(code).encode())

    def text(self, code: int) -> str:
        """The metrics in Prometheus' text format."""
        mine = {"command": self.command or "none"}
        values: dict[str, list[tuple[dict[str, str], float]]] = {
            "info": [({**mine, "version": __version__}, 1)],
            "exit_code": [(mine, code)],
            "duration_seconds": [(mine, round(time.monotonic() - self.started, 3))],
            "end_timestamp_seconds": [(mine, round(time.time(), 3))],
            "peak_memory_bytes": [(mine, peak_memory_bytes())],
            "steps": [({**mine, "what": what}, n) for what, n in self.steps.items()],
            "steps_resumed": [({**mine, "what": what}, self.resumed.get(what, 0)) for what in self.steps],
            "notes": [(mine, self.notes)],
        }
        lines = []
        for name, help_text in _METRICS.items():
            lines += [f"# HELP compress_run_{name} {help_text}", f"# TYPE compress_run_{name} gauge"]
            for labels, value in values[name]:
                inside = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
                lines.append(f"compress_run_{name}{{{inside}}} {value}")
        return "\n".join(lines) + "\n"


def hear(event: str, **facts: Any) -> None:
    """Tell whoever listens to the command that runs, if anyone does."""
    if _current is not None:
        _current.hear(event, **facts)


def called(command: str) -> None:
    """The command's name is known."""
    if _current is not None:
        _current.command = command


@contextmanager
def listening(listener: Listening, *, quiet: bool) -> Iterator[None]:
    """Inside, events of the command reach `listener`; with `quiet`, nothing is shown on stderr."""
    global _current
    before, _current = _current, listener
    try:
        if not quiet:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        _current = before


def _check(path: Path, flag: str, mine: str) -> None:
    """Refuse a file that is not ours to write, before any work."""
    from compress.output import check_apart

    check_apart(path.parent, {}, flag)
    try:
        with open(path, "a+", encoding="utf-8") as f:
            f.seek(0)
            found = f.read(len(mine))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{flag} {path} cannot be written ({reason(e)}); pass another file") from None
    if found and found != mine:
        raise ConfigError(f"{flag} {path} holds something else, which would be lost; pass another file")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


__all__ = ["Listening", "called", "hear", "listening"]
