"""Decoding on one GPU, all of it in one run: our steps with and without graphs, products, and rivals.

    python tests/bench/decode_run.py --work DIR [--jobs graphs step ...] [--gpus 1] [--deadline 540]
        [--sites DIR] [--ort DIR --graphs DIR] [--model AWQ_FOLDER]

Each job is a process of its own, so that none can break another; what it measured is in DIR/JOB.json as it comes, and
the tables of all such files are printed last (`--jobs` without names: only those). Jobs that were finished are not run
again. --gpus: so many jobs side by side, a GPU each, of those that CUDA_VISIBLE_DEVICES names; nothing else may use
them. --sites: as for rivals.py, with gptqmodel and common. --ort: a folder with onnxruntime-gpu, and --graphs what
`ort_graph.py` made. --model: for transformers; without it a Llama of the 1B shape with random weights is made and
quantized.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(BENCH)]

from pool import RunFailed, in_own_process, log, run_child  # noqa: E402

Row = dict[str, Any]
STEP, RIVALS = "decode_step.py", "decode_rivals.py"
JOBS: dict[str, list[str]] = {
    "check": ["decode.py", "check"],
    "gemv": ["decode.py", "gemv"],
    "graphs": [STEP, "graphs", "--bits", "4,16"],
    "step": [STEP, "step"],
    "head": [STEP, "step", "--bits", "4", "--batch", "1", "--head-bits", "8"],
    "onnxruntime": [RIVALS, "onnxruntime", "--shape", "llama-3-8b,llama-1b,smollm2-135m"],
    "where": [STEP, "where", "--bits", "4,16", "--batch", "1"],
    "torch": [RIVALS, "torch"],
    "transformers": [RIVALS, "transformers"],
}
# Seconds that a job gets at most, so that those after it have a turn: a whole step compiled twice; Marlin's kernels.
LIMITS = {"torch": 240.0, "transformers": 240.0, "onnxruntime": 90.0}
STEADY = 1.05  # the longest of a row's times over the shortest, on a card that nothing else uses
CLAIM = 0.25  # of latency, which graphs are said to save


def make_model(folder: Path) -> None:
    """A Llama of the 1B shape, random weights, the reference tokenizer."""
    import random_llama

    shape = random_llama.Shape(hidden=2048, intermediate=8192, heads=32, kv_heads=8, head_dim=64)
    random_llama.build(folder, shape, 16)


def quantized(asked: argparse.Namespace, variables: dict[str, str]) -> Path:
    if asked.model is not None:
        return asked.model
    dense, packed = asked.work / "llama-1b", asked.work / "llama-1b-int4"
    if not packed.exists():
        shutil.rmtree(dense, ignore_errors=True)
        in_own_process(make_model, dense)
        command = [sys.executable, "-m", "compress", "awq", str(dense), "-o", str(packed), "--effort", "fast"]
        command += "--group-size 128 --samples 4 --seq-len 128 --self-samples 0 --device cuda".split()
        run_child(command, cwd=ROOT, environment=variables, until=asked.until)
    return packed


def cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without it the first eight."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(8)] if visible is None else [c for c in visible.split(",") if c]


def run_job(name: str, gpu: str, asked: argparse.Namespace) -> str | None:
    """Why the job failed, if it did."""
    file = asked.work / f"{name}.json"
    if file.exists() and json.loads(file.read_text()).get("finished"):
        return None
    limit = time.monotonic() + LIMITS.get(name, 600.0)
    until = limit if asked.until is None else min(limit, asked.until)
    if until - time.monotonic() < 10:
        return "no time was left"
    sites = {
        "transformers": [asked.sites and asked.sites / s for s in ("gptqmodel", "common")],
        "onnxruntime": [asked.ort],
    }
    path = [ROOT, BENCH, *(s for s in sites.get(name, []) if s)]
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, str(BENCH / JOBS[name][0]), *JOBS[name][1:], "--json", str(file)]
    begun = time.monotonic()
    try:
        if name == "transformers":
            command += ["--model", str(quantized(asked, variables))]
        if name == "onnxruntime":
            if asked.graphs is None:
                return "without --graphs it was not run"
            command += ["--graphs", str(asked.graphs)]
        said = run_child(command, cwd=ROOT, environment=variables, errors=asked.work / f"{name}.log", until=until)
        (asked.work / f"{name}.txt").write_text(said.stdout)
    except RunFailed as error:
        return str(error)
    finally:
        log(f"{name}: {time.monotonic() - begun:.0f} s")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": True}))
    return None


# ---- tables ------------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def tables(files: Sequence[Path]) -> str:
    rows: list[Row] = []
    for file in files:
        found = json.loads(file.read_text())
        rows += [{"device": found.get("device", ""), **row} for row in found.get("rows", [])]
        rows += [{"device": found["device"], "what": "gemv", **row} for row in found.get("gemv", [])]
    parts = [f"On {', '.join(sorted({row['device'] for row in rows}))}; milliseconds a token."]
    for what, make in (
        ("graphs", _graphs),
        ("step", _steps),
        ("where", _where),
        ("gemv", _gemv),
    ):
        mine = [row for row in rows if row["what"] == what]
        if mine:
            parts.append(make(mine))
    parts += _disturbed(rows)
    rivals = [row for row in rows if row["what"] == "rival"]
    if rivals:
        steps = [row for row in rows if row["what"] in ("graphs", "step") and row["batch"] == 1]
        steps = [row for row in steps if row.get("head_bits", 16) == 16]  # as the rivals have it
        parts.append(_rivals(rivals, steps))
    return "\n\n".join(parts)


def _disturbed(rows: Sequence[Row]) -> list[str]:
    timed = [row["spread"] for row in rows if "spread" in row and row["what"] != "rival"]  # theirs wait for the host
    many = sum(spread > STEADY for spread in timed)
    if not many:
        return []
    said = f"{many} of {len(timed)} rows took up to {max(timed):.2f} times as long once as another time"
    return [f"{said}: something else used the card, and these figures say little."]


def _graphs(rows: Sequence[Row]) -> str:
    head = [
        "shape",
        "bits",
        "without",
        "in a graph",
        "saved",
        "launches a step",
        "replays",
        "equal ids",
        f"{CLAIM:.0%}?",
    ]
    lines = []
    for row in rows:
        saved = 1 - row["ms"] / row["ms_without"]
        said = "confirmed" if saved >= CLAIM else "refuted"
        lines.append([row["shape"], row["bits"], f"{row['ms_without']:.3f}", f"{row['ms']:.3f}", f"{saved:.0%}",
                      row["launches"], row["replays"], f"{row['equal_ids']} of {row['new']}", said])  # fmt: skip
    return table(head, lines)


def _steps(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        dense = next((r for r in rows if (r["shape"], r["batch"], r["bits"]) == (row["shape"], row["batch"], 16)), None)
        ratio = f"{dense['ms'] / row['ms']:.2f}" if dense else ""
        bits = f"{row['bits']}, head {row.get('head_bits', 16)}"
        lines.append([row["shape"], bits, row["batch"], f"{row['ms']:.3f}", f"{row['share']:.1%}", ratio])
    return table(["shape", "bits", "batch", "ms", "share", "over 16 bits"], lines)


def _where(rows: Sequence[Row]) -> str:
    lines = [
        [r["shape"], r["bits"], r["kernel"], f"{r['count']:.0f}", f"{r['us_each']:.2f}", f"{r['us_a_step']:.0f}"]
        for r in rows
    ]
    return table(["shape", "bits", "kernel", "a step", "us each", "us a step"], lines)


def _gemv(rows: Sequence[Row]) -> str:
    lines = [[r["shape"], r["bits"], r["m"], f"{r['us']:.1f}", f"{r['share']:.1%}"] for r in rows]
    return table(["out x in", "bits or kernel", "M", "us", "share"], lines)


def _rivals(rows: Sequence[Row], ours: Sequence[Row]) -> str:
    """Each beside our best step of the same shape and bits, or ours on the same folder."""
    lines = []
    for row in rows:
        if row["tool"] == "ours":
            mine = [row.get("ms", 0.0)]
        elif "shape" in row:
            mine = [r["ms"] for r in ours if (r["shape"], r["bits"]) == (row["shape"], row["bits"])]
        else:
            mine = [r["ms"] for r in rows if r["tool"] == "ours" and r.get("model") == row["model"] and "ms" in r]
        where = row.get("shape", row.get("model", ""))
        bits = f"{row['bits']}, head {row['head_bits']}"
        more = ", ".join(f"{row[k]}" for k in ("kernel", "launches") if k in row)
        ms = f"{row['ms']:.3f}" if "ms" in row else row.get("error", "failed")
        ratio = f"{row['ms'] / min(mine):.2f}" if mine and "ms" in row else ""
        lines.append([row["tool"], row["way"], where, bits, ms, ratio, more])
    return table(["tool", "way", "model", "bits", "ms", "over ours", "kernel or launches"], lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = {"type": lambda s: Path(s).absolute()}
    parser.add_argument("--work", **path, required=True)
    parser.add_argument("--jobs", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--deadline", type=float, help="seconds after which nothing runs on")
    parser.add_argument("--sites", **path)
    parser.add_argument("--ort", **path)
    parser.add_argument("--graphs", **path)
    parser.add_argument("--model", **path)
    return parser.parse_args()


def main() -> int:
    """0 when every job ended well."""
    asked = parse()
    asked.work.mkdir(parents=True, exist_ok=True)
    asked.until = None if asked.deadline is None else time.monotonic() + asked.deadline
    if len(cards()) < asked.gpus:
        raise SystemExit(f"--gpus {asked.gpus}: CUDA_VISIBLE_DEVICES names {len(cards())}")
    gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in cards()[: asked.gpus]:
        gpus.put(gpu)

    def run(name: str) -> str | None:
        gpu = gpus.get()
        try:
            return run_job(name, gpu, asked)
        except Exception as e:  # what one job meets must not end the others
            return f"{type(e).__name__}: {e}"
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(asked.gpus) as executor:
        failed = {name: why for name, why in zip(asked.jobs, executor.map(run, asked.jobs), strict=True) if why}
    files = [asked.work / f"{name}.json" for name in JOBS if (asked.work / f"{name}.json").exists()]
    print(tables(files) if files else "nothing was measured")
    for name, why in failed.items():
        print(f"\nNot finished: {name}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
