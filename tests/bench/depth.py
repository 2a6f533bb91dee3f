"""Does peak memory grow with depth? Quantizes synthetic models of 8, 32 and 128 equal blocks, each in its own process.

    python tests/bench/depth.py [--hidden 512] [--json FILE]

Prints a table of peak resident memory. The claim holds when 128 blocks need no more than 10 % above 8 blocks, beyond
what the manifest's own rows take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_llama import Shape, build

import calibration_data

DEPTHS = (8, 32, 128)


def measure(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak resident MiB of `compress awq` in a process of its own."""
    command = [sys.executable, "-m", "compress", "awq", str(folder), "--samples", "8", "--seq-len", "256", "--json"]
    command += ["--calib", str(calibration_data.default_calibration()), "-o", str(out)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(errors.decode())
    return time.monotonic() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    hidden: int = arguments.hidden
    shape = Shape(hidden, 2 * hidden, heads=hidden // 64, kv_heads=hidden // 128, head_dim=64)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for depth in DEPTHS:
            folder = Path(scratch) / f"depth-{depth}"
            build(folder, shape, depth)
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**20
            seconds, peak = measure(folder, Path(scratch) / f"out-{depth}")
            rows.append({"blocks": depth, "model_mib": size, "peak_mib": peak, "seconds": seconds})
            print(f"{depth} blocks done", file=sys.stderr, flush=True)
    print("| blocks | model on disk, MiB | peak resident, MiB | seconds |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['blocks']} | {row['model_mib']:.0f} | {row['peak_mib']:.0f} | {row['seconds']:.1f} |")
    growth = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    print(f"\npeak at {DEPTHS[-1]} blocks / peak at {DEPTHS[0]} blocks = {growth:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
