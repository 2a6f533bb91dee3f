"""A whole decode step on one GPU: share of the bandwidth, graphs on and off, where time goes.

    python tests/bench/decode_step.py step --shape llama-3-8b --bits 4,8,16 --batch 1,8,16,64
    python tests/bench/decode_step.py step --bits 4 --batch 1 --head-bits 8     output matrix in integers too
    python tests/bench/decode_step.py graphs      four shapes at batch 1, launches and replays counted
    python tests/bench/decode_step.py where       the time of each kernel of a step, in the graph

Weights are random in the shape of the named model. A share is (bytes of weights and cache that a step must read) / time
/ bandwidth, which is that of a sum over 4 GiB in the same run. Milliseconds are the median of five times `--new`
tokens, spread is the longest of the five over the shortest: more than a few hundredths mean that something else used
the card. Rows are written to `--json` as they come; `decode_run.py` runs this, and rivals, and prints tables.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode import random_weights, read_bandwidth
from decode_shapes import SHAPES, group_size
from torch import Tensor
from torch.autograd import DeviceType

from compress.runtime.gpu_decoder import GpuDecoder, Weights

Row = dict[str, Any]
REPEATS = 5


@dataclass(frozen=True)
class Timed:
    """Milliseconds a token, the longest over the shortest time, the ids `[B, new]`, and the decoder."""

    ms: float
    spread: float
    ids: Tensor
    decoder: GpuDecoder


def timed(weights: Weights, prompts: Tensor, new: int, *, graphs: bool) -> Timed:
    capacity = prompts.shape[1] + new + 8
    decoder = GpuDecoder(weights, capacity=capacity, batch=len(prompts), graphs=graphs)
    decoder.prefill(prompts)
    decoder.greedy(4)
    times = []
    for _ in range(REPEATS):
        decoder.prefill(prompts)
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        seen = decoder.greedy(new).clone()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / new)
    return Timed(sorted(times)[len(times) // 2], max(times) / min(times), seen, decoder)


def prompts_of(shape: str, batch: int, length: int) -> Tensor:
    ids = torch.randint(0, SHAPES[shape][-1], (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.cuda()


def in_graph(weights: Weights, prompts: Tensor, new: int, bandwidth: float) -> tuple[Row, Tensor]:
    found = timed(weights, prompts, new, graphs=True)
    cache = 2 * found.decoder.keys[..., : prompts.shape[1] + new // 2, :].numel() * 2
    size = weights.bytes_a_token() + cache
    graph = found.decoder.graph
    assert graph is not None
    row: Row = {"ms": found.ms, "spread": found.spread, "bytes": size, "share": size / found.ms * 1000 / bandwidth}
    return row | {"launches": graph.launches, "replays": graph.replays}, found.ids


def leading_equal(a: Tensor, b: Tensor) -> int:
    """Tokens before the first at which any sequence differs."""
    differs = (a != b).any(0)
    return int(differs.int().argmax()) if bool(differs.any()) else a.shape[1]


def step(weights: Weights, head: Row, batches: list[int], asked: argparse.Namespace, bandwidth: float) -> None:
    """Replayed; `graphs`: beside the same launched one by one."""
    for batch in batches:
        prompts = prompts_of(head["shape"], batch, asked.prompt)
        row, ids = in_graph(weights, prompts, asked.new, bandwidth)
        row["new"] = asked.new
        if head["what"] == "graphs":
            plain = timed(weights, prompts, asked.new, graphs=False)
            row |= {"ms_without": plain.ms, "equal_ids": leading_equal(ids, plain.ids)}
        asked.keep(head | {"batch": batch} | row)


def where(weights: Weights, head: Row, batches: list[int], asked: argparse.Namespace, bandwidth: float) -> None:
    """A kernel's time is its end less the end of the one before: they sum to the step however they overlap."""
    parts = ("qkv", "o", "gate_up", "down")
    for batch in batches:
        prompts = prompts_of(head["shape"], batch, asked.prompt)
        decoder = GpuDecoder(weights, capacity=asked.prompt + asked.new, batch=batch)
        decoder.prefill(prompts)
        decoder.greedy(8)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            decoder.greedy(16)
            torch.cuda.synchronize()
        events = [e for e in seen.events() if e.device_type == DeviceType.CUDA]
        events.sort(key=lambda e: e.time_range.end)
        spent: dict[str, list[float]] = defaultdict(list)
        linears = 0
        for before, event in zip(events, events[1:], strict=False):
            name = event.name.split("(")[0]
            if name == "linear":
                at = linears % (4 * len(weights.layers) + 1)
                linears += 1
                name = f"linear {parts[at % 4]}" if at < 4 * len(weights.layers) else "linear head"
            spent[name].append(event.time_range.end - before.time_range.end)
        for name, times in sorted(spent.items(), key=lambda item: -sum(item[1])):
            us = {"us_each": sorted(times)[len(times) // 2], "us_a_step": sum(times) / 16, "count": len(times) / 16}
            asked.keep(head | {"batch": batch, "kernel": name} | us)


KINDS = {"step": step, "graphs": step, "where": where}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(KINDS), nargs="+")
    parser.add_argument("--shape", default="llama-3-8b", help=", ".join(SHAPES))
    parser.add_argument("--bits", default="4,8,16")
    parser.add_argument("--batch", default="1,8,16,64")
    parser.add_argument("--head-bits", type=int, default=16, choices=[8, 16], help="of the output matrix [16]")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    free, total = torch.cuda.mem_get_info()
    bandwidth = read_bandwidth()
    found: Row = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bandwidth": bandwidth}
    found |= {"rows": [], "in_use_before": total - free}
    print(
        f"{found['device']}, torch {torch.__version__}, reads {bandwidth / 1e12:.2f} TB/s; "
        f"{(total - free) >> 20} MiB were in use before",
        flush=True,
    )

    def keep(row: Row) -> None:
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found))

    asked.keep = keep
    for what in asked.what:
        shapes = list(reversed(SHAPES)) if what == "graphs" else asked.shape.split(",")
        batches = [1] if what == "graphs" else [int(b) for b in asked.batch.split(",")]
        for shape in shapes:
            for bits in map(int, asked.bits.split(",")):
                torch.manual_seed(0)
                size, positions = group_size(shape) if bits == 4 else -1, asked.prompt + asked.new + 8
                weights = random_weights(shape, bits, size, positions, asked.head_bits)
                row = {"what": what, "shape": shape, "bits": bits, "head_bits": asked.head_bits}
                KINDS[what](weights, row, batches, asked, bandwidth)
                del weights
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
