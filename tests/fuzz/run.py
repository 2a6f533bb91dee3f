"""Seeded fuzz of everything that is opened: model folders, artifacts, texts, ONNX graphs.

    python tests/fuzz/run.py --count 1000                     # 1000 model folders and 300 each of the others
    python tests/fuzz/run.py --kind folders --only 17 --keep  # one trial again, its folder kept

Prints the counts of each outcome (see `trial.py`) and every fault; exit code 1 if there is a traceback, a silent wrong
result, a hang (`--seconds` without an answer) or more than `MEMORY_BYTES` of memory. Trials run one after the other in
a process that is replaced when it hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEMORY_BYTES = 3 << 30
BAD = ("traceback", "silent", "hang", "memory")
SHARES = {"folders": 1.0, "artifacts": 0.3, "texts": 0.3, "graphs": 0.1}


class Worker:
    """A process that does trials, one line of JSON each."""

    def __init__(self, root: Path) -> None:
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1", "TMPDIR": str(root),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
        environ.pop("COMPRESS_DEBUG", None)
        command = [sys.executable, str(HERE / "run.py"), "--serve", str(root)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, env=environ, text=True, bufsize=1)  # fmt: skip
        self.ask({"kind": "", "seed": 0}, 300)  # its imports are not a trial's time

    def ask(self, trial: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(trial) + "\n")
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if not ready:
            self.process.kill()
        code = self.process.wait()
        detail = f"the process ended with {code}" if ready else f"no answer in {seconds:.0f} s"
        return {"damage": "?", "outcome": "traceback" if ready else "hang", "detail": detail}


def serve(root: Path) -> None:
    """The worker's side: trials from stdin, answers to stdout, which nothing else writes to."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import resource

    import trial

    import compress.model  # noqa: F401  (its imports are not a trial's time)

    for line in sys.stdin:
        asked = json.loads(line)
        if not asked["kind"]:
            answers.write(json.dumps({}) + "\n")
            continue
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = trial.run(root, asked["kind"], asked["seed"])
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if after > max(before, MEMORY_BYTES):
            found = {**found, "outcome": "memory", "detail": f"{after / 1e9:.1f} GB; {found['detail']}"}
        answers.write(json.dumps(found) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="model folders; of the other kinds a share of it")
    parser.add_argument("--kind", choices=list(SHARES), action="append", help="these kinds only, COUNT of each")
    parser.add_argument("--seed", type=int, default=0, help="number of the first trial")
    parser.add_argument("--only", type=int, help="this trial only")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder, and say where it is")
    parser.add_argument("--seconds", type=float, default=60, help="a trial without an answer by then hangs")
    parser.add_argument("--log", type=Path, help="write every trial there, one JSON line each")
    parser.add_argument("--root", type=Path, help="scratch folder whose bases may be there already")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    kinds = args.kind or list(SHARES)
    counts = {k: args.count if args.kind else max(1, round(args.count * SHARES[k])) for k in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch if not args.keep else tempfile.mkdtemp())
        root.mkdir(parents=True, exist_ok=True)
        bad = fuzz(root, counts, args)
        if args.keep:
            print(f"scratch: {root}")
    return 1 if bad else 0


def fuzz(root: Path, counts: dict[str, int], args: argparse.Namespace) -> int:
    """Every trial of each kind; returns how many were at fault."""
    import bases

    os.environ["HF_HUB_OFFLINE"] = "1"
    bases.make(root, set(counts))
    worker = Worker(root)
    log = open(args.log, "a", encoding="utf-8") if args.log else None
    faults = 0
    for kind, count in counts.items():
        outcomes: Counter[str] = Counter()
        started = time.monotonic()
        for seed in [args.only] if args.only is not None else range(args.seed, args.seed + count):
            found = worker.ask({"kind": kind, "seed": seed}, args.seconds)
            outcomes[found["outcome"]] += 1
            if worker.process.poll() is not None:
                worker = Worker(root)
            if log:
                log.write(json.dumps({"kind": kind, "seed": seed, **found}) + "\n")
                log.flush()
            if found["outcome"] in BAD or args.only is not None:
                print(f"{kind} {seed}: {found['outcome']}: {found['damage']}: {found['detail']}", flush=True)
        faults += sum(outcomes[o] for o in BAD)
        shown = ", ".join(f"{outcomes[o]} {o}" for o in ("clear", "same", *BAD))
        print(f"{kind}: {sum(outcomes.values())} trials: {shown}; {time.monotonic() - started:.0f} s", flush=True)
    worker.process.kill()
    return faults


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(HERE)]
    raise SystemExit(main())
