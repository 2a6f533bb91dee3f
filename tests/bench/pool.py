"""Child processes with their cost, and jobs that run side by side, each on cores of its own."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


class Finished(NamedTuple):
    """A child that ended: its stdout and what `wait4` says about it."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_rss_mib: float


class RunFailed(Exception):
    """A child exited with an error, or was stopped; the message holds its command and status."""


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run_child(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    errors: Path | None = None,
    until: float | None = None,
) -> Finished:
    """Run a command to its end; stdout is returned, stderr passes through or goes to the file `errors`.

    until: when to stop it, on the clock of `time.monotonic`. Raises RunFailed.
    """
    log("$ " + shlex.join(command))
    # files and not pipes: nobody reads while we wait
    with tempfile.TemporaryFile("w+") as stdout, open(errors or os.devnull, "ab") as kept:
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=kept if errors else None,
            cwd=cwd,
            env=dict(environment),
            start_new_session=True,
        )
        timer = None
        if until is not None:
            timer = threading.Timer(max(0.0, until - started), os.killpg, (child.pid, signal.SIGKILL))
            timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        if timer:
            timer.cancel()
        seconds = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        text = stdout.read()
    if child.returncode:
        said = text[-2000:] + (errors.read_text(errors="replace")[-2000:] if errors else "")
        log(said)
        late = until is not None and time.monotonic() >= until
        why = "stopped at the deadline" if late else f"exit status {child.returncode}"
        raise RunFailed(f"{why} after {seconds:.0f} s: {shlex.join(command)}")
    return Finished(text, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def environment(threads: int, path: Sequence[Path] = (), *, gpu: bool = False) -> dict[str, str]:
    """Of a quantizer: so many threads, no accelerator unless `gpu`, no network, packages from the folders `path`."""
    out = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpu:
        out["CUDA_VISIBLE_DEVICES"] = ""
    out.pop("PYTHONPATH", None)
    if path:
        out["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return out


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that needs torch or numpy in a fresh process, to keep this one small."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def run_pinned(jobs: Sequence[Callable[[], None]], workers: int, threads: int) -> None:
    """Run the jobs, in order, `workers` at a time; each and its children on `threads` cores of their own.

    With one worker nothing is pinned. A job handles its own errors: one that raises ends the run.
    """
    if workers == 1:
        for job in jobs:
            job()
        return
    cores = sorted(os.sched_getaffinity(0))
    if workers * threads > len(cores):
        raise SystemExit(f"{workers} workers of {threads} threads need more than the {len(cores)} cores here")
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for worker in range(workers):
        free.put(cores[worker * threads : (worker + 1) * threads])

    def run(job: Callable[[], None]) -> None:
        mine = free.get()
        try:
            os.sched_setaffinity(0, mine)  # of this thread, and so of the processes that it starts
            job()
        finally:
            free.put(mine)

    with ThreadPoolExecutor(workers) as executor:
        for future in [executor.submit(run, job) for job in jobs]:
            future.result()
