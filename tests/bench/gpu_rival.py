"""Seconds a block and GPU memory of llm-compressor and of `compress awq` on one GPU, on a Llama of random blocks.

    python tests/bench/gpu_rival.py --sites DIR --text FILE.txt --folder SCRATCH [--blocks 1,3] [--json FILE]

Both read the same folder (the shape of Llama-3-8B but for a vocabulary of 4096) and the same 128 x 512 token ids.
Each method runs at two depths in processes of their own: the difference, over the blocks between, is the time of
a block without start, loading, embedding and head. Nothing else is extrapolated.

Columns: quantize s is the tool's own clock; process s is read to written, imports included, each tool in its own
format. GPU MiB is the most that `nvidia-smi` showed in use on the card less what was in use before, so it holds the
CUDA context; sampled, so a short peak can be missed. Random weights say nothing about quality, and none is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(BENCH)]

import texts  # noqa: E402
from pool import Finished, RunFailed, in_own_process, log, run_child  # noqa: E402

Row = dict[str, Any]
Tool = Callable[[str, Path, texts.CalibrationText, argparse.Namespace], Row]
SHAPES = ("8b", "70b", "tiny")


class GpuMemory:
    """The most memory in use on the first GPU while the block runs, in MiB; None where there is no `nvidia-smi`."""

    def __init__(self) -> None:
        self._before = gpu_used()
        self._most = self._before
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._most is not None and not self._ended.wait(0.2):
            self._most = max(self._most, gpu_used() or 0)

    @property
    def peak_mib(self) -> int | None:
        return None if self._most is None or self._before is None else self._most - self._before


def gpu_used() -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else int(done.stdout)


def build(folder: Path, shape: str, depth: int) -> None:
    """The model of `depth` blocks, in its own process as it needs torch."""
    import random_llama
    import torch

    shapes = {
        "8b": random_llama.LLAMA_3_8B,
        "70b": random_llama.LLAMA_3_70B,
        "tiny": random_llama.Shape(hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64),
    }
    random_llama.build(folder, shapes[shape], depth, scale=0.02, dtype=torch.bfloat16)


def variables(folders: Sequence[Path]) -> dict[str, str]:
    """The GPU stays visible, unlike in `pool.environment`."""
    out = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out.pop("PYTHONPATH", None)
    return out | ({"PYTHONPATH": os.pathsep.join(map(str, folders))} if folders else {})


def measured(command: Sequence[str], out: Path, folders: Sequence[Path], said_in_last_line: bool) -> Row:
    """Run a tool that writes `out`; what it said, its cost, and the size of what it wrote."""
    shutil.rmtree(out, ignore_errors=True)
    with GpuMemory() as memory:
        done: Finished = run_child(command, cwd=ROOT, environment=variables(folders), errors=out.with_suffix(".log"))
    said: Row = json.loads(done.stdout.strip().splitlines()[-1] if said_in_last_line else done.stdout)
    shutil.rmtree(out)
    return {
        "quant_seconds": said.get("quant_seconds", said.get("seconds")),
        "process_seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "peak_rss_mib": done.peak_rss_mib,
        "gpu_mib": memory.peak_mib,
        "reported": {key: value for key, value in said.items() if key != "record"},
    }


def rival(method: str, model: Path, calibration: texts.CalibrationText, options: argparse.Namespace) -> Row:
    script = BENCH / "quantizers/run_llmcompressor.py"
    out = options.folder / "rival"
    command = [str(options.python), "-W", "ignore", str(script), str(model), str(out), str(calibration.ids)]
    command += ["--method", method, "--dtype", "bfloat16", "--packed"]
    folders = [options.sites / "llmcompressor", options.sites / "common"]
    return measured(command, out, folders, said_in_last_line=True)


def ours(arguments: str, model: Path, calibration: texts.CalibrationText, options: argparse.Namespace) -> Row:
    out = options.folder / "ours"
    command = [sys.executable, "-m", "compress", "awq", str(model), "--calib", str(calibration.text), "-o", str(out)]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), "--json"]
    command += shlex.split(arguments)
    return measured(command, out, [], said_in_last_line=False)


def table(rows: Sequence[Row]) -> str:
    """Markdown; the seconds a block come from a method's deepest and shallowest model."""
    lines = ["| method | blocks | quantize s | process s | s a block | GPU MiB | host RSS MiB |", "|" + "---|" * 7]
    for row in rows:
        same = sorted((r for r in rows if r["method"] == row["method"]), key=lambda r: int(r["blocks"]))
        more = same[-1]["blocks"] - same[0]["blocks"]
        slope = (same[-1]["quant_seconds"] - same[0]["quant_seconds"]) / more if more and row is same[-1] else None
        lines.append(
            f"| {row['method']} | {row['blocks']} | {row['quant_seconds']:.1f} | {row['process_seconds']:.1f} "
            f"| {'' if slope is None else f'{slope:.2f}'} | {row['gpu_mib'] or ''} | {row['peak_rss_mib']:.0f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sites", type=lambda s: Path(s).absolute(), required=True, help="as for rivals.py")
    parser.add_argument("--python", default=sys.executable, help="interpreter for --sites")
    parser.add_argument("--text", type=lambda s: Path(s).absolute(), required=True, help="to calibrate on")
    parser.add_argument("--folder", type=lambda s: Path(s).absolute(), required=True, help="for models and results")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=lambda s: [int(n) for n in s.split(",")], default=[1, 3])
    parser.add_argument("--methods", type=lambda s: s.split(",") if s else [], default=["awq", "gptq"])
    parser.add_argument("--ours", action="append", help="NAME=OPTIONS of `compress awq`, which must name the device")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write every figure here, after each run")
    return parser.parse_args()


def main() -> int:
    """0 when every run ended well, 1 otherwise."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for depth in options.blocks:
        models[depth] = options.folder / f"model-{depth}"
        if not models[depth].exists():
            in_own_process(build, models[depth], options.shape, depth)
        log(f"{models[depth]} is there")
    first = models[options.blocks[0]]
    calibration = in_own_process(
        texts.write_seed, options.text, 0, options.samples, options.seq_len, first, options.folder
    )
    runs: list[tuple[str, Tool, str]] = [(f"llm-compressor {method}", rival, method) for method in options.methods]
    for asked in options.ours or []:
        name, _, arguments = asked.partition("=")
        runs.append((name, ours, arguments))
    rows: list[Row] = []
    failed = []
    for name, tool, argument in runs:
        for depth in options.blocks:
            try:
                rows.append({"method": name, "blocks": depth} | tool(argument, models[depth], calibration, options))
            except RunFailed as error:
                log(f"FAILED {name}, {depth} blocks: {error}")
                failed.append(f"{name}, {depth} blocks")
                continue
            log(json.dumps(rows[-1]))
            if options.json:
                options.json.write_text(json.dumps({"rows": rows, "failed": failed}) + "\n")
    print(table(rows))
    if failed:
        print(f"\nNot measured: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
