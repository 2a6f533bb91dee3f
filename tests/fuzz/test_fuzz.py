"""A seeded share of the fuzz; all of it: `python tests/fuzz/run.py --count 1000`, or COMPRESS_FUZZ=1000 here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHARE = {"folders": 12, "artifacts": 4, "texts": 4, "graphs": 2}


@pytest.mark.slow
def test_nothing_silent_no_traceback_no_hang(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    whole = os.environ.get("COMPRESS_FUZZ")
    run = [sys.executable, str(Path(__file__).with_name("run.py")), "--root", str(tmp_path), "--seed", "5000"]
    counted = {}
    for options in [["--count", whole]] if whole else [["--kind", k, "--count", str(n)] for k, n in SHARE.items()]:
        done = subprocess.run([*run, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        counted.update(
            re.findall(r"^(\w+): (\d+) trials: .* 0 traceback, 0 silent, 0 hang, 0 memory", done.stdout, re.M)
        )
        print(done.stdout)
    assert set(counted) == set(SHARE)
    assert whole or {k: int(n) for k, n in counted.items()} == SHARE
