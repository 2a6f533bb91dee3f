"""How many threads compute, how they wait for each other, and what must not depend on their number.

A thread that waits spins: libgomp's for some 300,000 turns. Where another process holds the core that the last thread
needs, all others burn theirs until it comes back, at every one of a million small parallel regions. Waiting threads
therefore go to sleep after a short spin. It must be said before the OpenMP library is loaded, that is before torch is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# libgomp: turns of the loop before a thread sleeps. LLVM's and Intel's libomp: milliseconds.
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
# ONNX Runtime's threads.
SPIN_MICROSECONDS = 1000
_POLICY = "OMP_WAIT_POLICY"
_NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CGROUP = Path("/sys/fs/cgroup")
# LAPACK's blocking, and so the last bits of a factor, follows the number of threads.
PINNED = 2


def configure(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set, before torch is loaded, how threads wait and at most how many there are; what the user has set stays."""
    if _POLICY not in environ and not any(name in environ for name in WAITING):
        environ.update(WAITING)
    cores = len(affinity())
    if not any(name in environ for name in _NUMBERS) and available_cores() < cores:
        environ[_NUMBERS[0]] = str(available_cores())


def affinity() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores(cgroup: Path = _CGROUP) -> int:
    """As many cores as this process may keep busy: those of its affinity, and no more than its container is given."""
    cores = len(affinity())
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, round(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores that the control group allows, None where it does not limit them. Reads version 2, then version 1."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()[:2]
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        return microseconds / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text()) if microseconds > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


@contextmanager
def pinned() -> Iterator[None]:
    """As many threads as ever, `PINNED`, inside: for the routines whose bits follow the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(PINNED)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def calm(options: Any) -> None:
    """Give an ONNX Runtime session's options torch's number of threads, that sleep after a millisecond of waiting.

    Between the nodes of a graph they wait for microseconds, and waking one takes tens of them: a decoding step of a
    small model takes 2.3 times as long with threads that sleep at once. ONNX Runtime's own default also ties each
    thread to a core, which another process may hold.
    """
    import torch

    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
