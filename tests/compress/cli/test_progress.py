"""What is shown while a run goes on, on a terminal and elsewhere."""

import io
import re
from typing import Any

import pytest

from compress.cli.progress import Pace, Shown


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pace_follows_what_was_measured_last() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    assert pace.seconds_left() is None
    clock.now += 30  # the first step compiles something
    pace.step(1)
    assert pace.seconds_left() == pytest.approx(30 * 9)
    clock.now += 2
    pace.step(2)
    assert pace.seconds_left() == pytest.approx(2 * 8), "the first step has no say once there is another"
    clock.now += 0.5
    assert pace.seconds_left() == pytest.approx(2 * 8 - 0.5)
    clock.now += 100  # stuck: what is left does not fall below the other steps
    assert pace.seconds_left() == pytest.approx(2 * 7)

    pace.step(4)
    clock.now += 4
    pace.step(6)
    assert pace.seconds_left() == pytest.approx(4 * (100.5 + 4) / 4)
    pace.step(10)
    assert pace.seconds_left() is None


def test_pace_does_not_count_what_was_read_back() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    pace.step(6, resumed=True)
    assert pace.seconds_left() is None
    clock.now += 5
    pace.step(7)
    assert pace.seconds_left() == pytest.approx(15)


def shown(**options: Any) -> tuple[Shown, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    return Shown(file=file, clock=clock, **options), file, clock


def test_plain_lines_say_stage_time_left_and_findings() -> None:
    listener, file, clock = shown(describe=lambda found: f"worst {found['worst']}")
    with listener:
        listener.say("model: [m]")
        listener.start("block", 3)
        listener.step(doing="searching")
        clock.now += 4
        listener.step(1, found={"worst": 0.5})
        clock.now += 4
        listener.step(2, resumed=True)
        listener.note("something was left out")
    lines = [re.sub(r"peak memory \d+ MiB", "peak", line) for line in file.getvalue().splitlines()]
    assert lines == [
        "model: [m]",
        "block 1/3: worst 0.5, 8 s left, peak",
        "block 2/3: read back, 4 s left, peak",
        "note: something was left out",
    ]
    assert listener.notes == ["something was left out"]


def test_quick_steps_share_a_line_and_the_last_is_always_said() -> None:
    listener, file, clock = shown()
    with listener:
        listener.start("window", 1000)
        for done in range(1, 1001):
            clock.now += 0.01
            listener.step(done)
    lines = file.getvalue().splitlines()
    assert 10 <= len(lines) <= 12 and lines[-1].startswith("window 1000/1000: peak")


def test_a_terminal_shows_stage_and_time_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case: what is being done took the place of the time left."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file, clock = Terminal(), Clock()
    with Shown(file=file, clock=clock) as listener:
        listener.start("block", 3)
        clock.now += 70
        listener.step(1, "worst q_proj 1e-3")
        listener.step(doing="searching")
        assert listener._progress is not None
        listener._progress.refresh()
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    line = [part for part in re.split(r"[\r\n]", seen) if "searching" in part][-1]
    assert "1/3" in line and "2 min 20 s left" in line and len(line) <= 100


def test_quiet_shows_what_is_said_only() -> None:
    listener, file, _ = shown(quiet=True)
    with listener:
        listener.say("model: m")
        listener.start("block", 1)
        listener.step(1)
        listener.note("kept")
    assert file.getvalue() == "model: m\n" and listener.notes == ["kept"]


def test_when_each_job_began_is_kept() -> None:
    """`seconds` of a command count from its blocks on, whatever jobs come after them."""
    listener, _, clock = shown()
    with listener:
        for seconds, what in ((3, "sampled position"), (5, "block"), (7, "update through the whole model")):
            clock.now += seconds
            listener.start(what, 2)
    assert listener.started["update through the whole model"] - listener.started["block"] == pytest.approx(7)
    assert listener.started["block"] - listener.started["sampled position"] == pytest.approx(5)
