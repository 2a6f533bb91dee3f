"""Where a token's time goes in `onnx` exports: ONNX Runtime's own profile of decoding steps, by kind of node.

    python tests/bench/onnx_profile.py EXPORT... [--threads 1] [--tokens 200] [--prompt 24]

Of each folder: the time of a step as a user has it (median and least), of which ONNX Runtime's `run`, the bundle's
Python around it and the choice of the token; then, from a session that writes its profile, for each kind of node how
many run for a token and their time, as the median over tokens. A profile costs a microsecond or two a node, so that
they sum to more than a step; what is to be compared are the kinds. The last line has the bytes of the products' weights
and the speed at which they are read if nothing else took time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.genai.bundle import run
from exporters.genai.graph import Graph

PRODUCTS = ("MatMulNBits", "MatMul", "FusedMatMul", "MatMulInteger")


def steps(decoder: run.Decoder, prompt: int, tokens: int) -> list[tuple[float, float, float]]:
    """Microseconds of each step: ONNX Runtime, Python around it, the likeliest token."""
    inside = 0.0
    original = decoder.session.run_with_iobinding

    def timed(binding: Any) -> None:
        nonlocal inside
        begun = time.perf_counter()
        original(binding)
        inside = time.perf_counter() - begun

    decoder.session.run_with_iobinding = timed
    logits = decoder.prefill([5 + i for i in range(prompt)])
    out = []
    for _ in range(tokens):
        begun = time.perf_counter()
        token = int(logits.argmax())
        chosen = time.perf_counter()
        logits = decoder.forward([token])[-1]
        done = time.perf_counter()
        out.append((inside * 1e6, (done - chosen - inside) * 1e6, (chosen - begun) * 1e6))
    decoder.session.run_with_iobinding = original
    return out


def profile(folder: Path, threads: int, prompt: int, tokens: int) -> dict[str, tuple[int, float]]:
    """By kind of node: how many run for a token, and the median of their time in microseconds."""
    with tempfile.TemporaryDirectory() as scratch:
        original = onnxruntime.SessionOptions

        def profiled() -> Any:
            options = original()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(scratch, "profile"))
            return options

        onnxruntime.SessionOptions = profiled
        try:
            decoder = run.Decoder(folder, prompt + tokens, threads)
        finally:
            onnxruntime.SessionOptions = original
        steps(decoder, prompt, tokens)
        events = json.loads(Path(decoder.session.end_profiling()).read_text())
    runs = [e for e in events if e["name"] == "model_run"][-tokens:]
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    found: dict[str, list[float]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for event in runs:
        mine = [e for e in kernels if event["ts"] <= e["ts"] < event["ts"] + event["dur"]]
        kinds = Counter[str]()
        counts = Counter[str]()
        for e in mine:
            kind = ("lm_head, " if "lm_head" in e["name"] else "") + e["args"]["op_name"]
            kinds[kind] += e["dur"]
            counts[kind] += 1
        for kind, spent in kinds.items():
            found[kind].append(spent)
    return {kind: (counts[kind], statistics.median(values)) for kind, values in found.items()}


def weight_bytes(folder: Path) -> int:
    """Bytes of what products read: as stored, or float32 where a Cast widens it at load."""
    graph = Graph(folder)
    total = 0
    for node in graph.nodes:
        if node.op_type in PRODUCTS:
            for name in node.input[1:]:
                stored = name.removesuffix("/float32")
                if stored in graph.tensors:
                    array = graph.array(stored)
                    total += array.size * 4 if stored != name else array.nbytes
    return total


def table(folder: Path, options: argparse.Namespace) -> str:
    spent = np.array(steps(run.Decoder(folder, options.prompt + options.tokens, options.threads),
                           options.prompt, options.tokens))  # fmt: skip
    whole = spent.sum(axis=1)
    kinds = profile(folder, options.threads, options.prompt, options.tokens)
    size = weight_bytes(folder)
    lines = [
        f"{folder.name}, {options.threads} threads: a step {np.median(whole):.0f} us (least {whole.min():.0f}): ONNX "
        f"Runtime {np.median(spent[:, 0]):.0f}, Python around it {np.median(spent[:, 1]):.0f}, the token "
        f"{np.median(spent[:, 2]):.0f}",
        "",
        "| node | a token | us |",
        "|---|---|---|",
        *(f"| {kind} | {n} | {us:.0f} |" for kind, (n, us) in sorted(kinds.items(), key=lambda item: -item[1][1])),
        f"| all | {sum(n for n, _ in kinds.values())} | {sum(us for _, us in kinds.values()):.0f} |",
        "",
        f"weights of products: {size / 1e6:.1f} MB, {size / np.median(whole) / 1e3:.1f} GB/s over the step",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path, nargs="+", help="folders of `compress export --format onnx`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=24)
    options = parser.parse_args()
    print("\n\n".join(table(folder, options) for folder in options.exports))


if __name__ == "__main__":
    main()
