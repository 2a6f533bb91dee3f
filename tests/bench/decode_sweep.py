"""Ways to cut up the products of a decode step of Llama-3-8B on one GPU: each against float64, then timed.

    python tests/bench/decode_sweep.py --seconds 85 --json FILE

Runs a warp takes at once, warps, rows of tiles a block, runs on their way through shared memory (`depth`), and whether
a kernel may start while the one before still waits (`early`). Weights lie cold in the cache (several are used in turn),
all in one CUDA graph; a share is of the bandwidth of a sum over 4 GiB in the same run. What time was not left for is
named. `--device cpu` goes through the candidates without a GPU, and only counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decode import cold_time, copies, read_bandwidth
from torch.nn import functional as F

from compress.runtime.kernels import nvrtc, weight_only
from compress.runtime.kernels.weight_only import Packed, Tiling

# name, out, in, bits; gate_up is interleaved
SHAPES = (("down", 4096, 14336, 4), ("gate_up", 28672, 4096, 4), ("qkv", 6144, 4096, 4), ("o", 4096, 4096, 4),
          ("head", 128256, 4096, 16))  # fmt: skip
RINGS = (0, 16, 32, 64, 96)  # KiB of a block
MOST_SHARED = 200 << 10


def candidates(packed: Packed, rows_of_x: int) -> list[Tiling]:
    """The present choice first; depths that a warp has runs for and shared memory has room for."""
    first = weight_only.tiling(packed, rows_of_x)
    found = [first]
    few = rows_of_x <= 8
    for run, warps, rows, kib in itertools.product((1, 2) if few else (1,), (4, 8, 16), (1, 2, 4), RINGS):
        cut = Tiling(run, first.tiles, warps, rows)
        one = replace(cut, depth=1).ring_bytes(packed)
        runs = -(-packed.column_tiles * 64 // (warps * run * (packed.group_size or 64)))
        depth = min(runs, (kib << 10) // one)
        if cut.tiles * rows * warps > 64 or rows * run > 2 + 2 * (kib > 0) or (kib and depth < 2):
            continue
        cut = replace(cut, depth=depth)
        if cut.ring_bytes(packed) <= MOST_SHARED and cut not in found:
            found.append(cut)
    return found


def reference(packed: Packed, x: torch.Tensor, gated: bool) -> torch.Tensor:
    """The product in float64."""
    want = x.double() @ weight_only.dense(packed).double().t()
    if gated:
        gate, value = want.unflatten(-1, (-1, 2, 8)).unbind(-2)
        want = (F.silu(gate) * value).flatten(-2)
    return want


def off(packed: Packed, x: torch.Tensor, cut: Tiling, gated: bool, want: torch.Tensor) -> float:
    """How far the product is from `want`, relative."""
    out = torch.full(want.shape, torch.nan, dtype=torch.float16, device=x.device)
    found = weight_only.matmul(x, packed, gated=gated, out=out, cut=cut).double()
    return float((found - want).norm() / want.norm())


def build(packed: Packed, gated: bool, cuts: list[Tiling]) -> None:
    """Compile side by side what the timings need; what does not compile is found out there."""

    def one(cut: Tiling) -> None:
        defines = weight_only._defines(packed, cut, gated)
        nvrtc.compiled(weight_only.SOURCE, defines, "linear", packed.codes.device.index, cut.ring_bytes(packed))

    with ThreadPoolExecutor(12) as executor:
        for done in [executor.submit(one, cut) for cut in cuts]:
            done.exception()


def sweep(shape: tuple[str, int, int, int], m: int, bandwidth: float, until: float) -> list[dict[str, Any]]:
    name, n, k, bits = shape
    gated = name == "gate_up"
    weights = copies(n, k, bits, 128 if bits == 4 else -1)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    want = reference(weights[0], x, gated)
    cuts = candidates(weights[0], m)
    rows: list[dict[str, Any]] = []
    for early in (False, True):
        weight_only.EARLY = early
        if early:  # the quickest few only
            rows.sort(key=lambda row: row["us"])
            cuts = [row["cut"] for row in rows[:4]]
        build(weights[0], gated, cuts)
        for cut in cuts:
            if time.monotonic() > until:
                print(f"{name} M={m}: no time was left for some", flush=True)
                break
            row: dict[str, Any] = {"shape": name, "m": m, "cut": cut, "early": early, "present": not rows}
            try:
                row["off"] = off(weights[0], x, cut, gated, want)
                calls = [lambda w=w, c=cut: weight_only.matmul(x, w, gated=gated, cut=c) for w in weights]
                row["us"] = 1000 * cold_time(calls)
            except Exception as e:  # a cut that does not compile or launch
                print(name, cut, str(e)[:150], flush=True)
                continue
            row["share"] = weights[0].num_bytes() / row["us"] * 1e6 / bandwidth
            assert row["off"] < 1e-3, row
            rows.append(row)
    weight_only.EARLY = False
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The present choice and the best five of each shape."""
    lines = ["| product | M | run, tiles, warps, rows, depth | early | us | share | off by |", "|---" * 7 + "|"]
    for key in dict.fromkeys((row["shape"], row["m"]) for row in rows):
        mine = [row for row in rows if (row["shape"], row["m"]) == key]
        for row in [*(row for row in mine if row["present"]), *sorted(mine, key=lambda r: r["us"])[:5]]:
            c = row["cut"]
            what = f"{c.run}, {c.tiles}, {c.warps}, {c.rows}, {c.depth}" + (" (present)" if row["present"] else "")
            lines.append(f"| {key[0]} | {key[1]} | {what} | {'yes' if row['early'] else ''} | {row['us']:.2f} | "
                         f"{row['share']:.1%} | {row['off']:.1e} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    plan = [(shape, 1) for shape in SHAPES] + [(shape, 16) for shape in SHAPES[:2]]
    if asked.device == "cpu":
        for (name, n, k, bits), m in plan:
            empty = torch.empty(0, dtype=torch.int32)
            packed = Packed(
                codes=empty, scales=None, zeros=None, num_bits=bits, group_size=128 * (bits == 4), shape=(n, k)
            )
            print(name, m, len(candidates(packed, m)))
        return
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    found: list[dict[str, Any]] = []
    for at, (shape, m) in enumerate(plan):
        left = until - time.monotonic()
        share = min(left, 2 * left / (len(plan) - at))
        found += sweep(shape, m, bandwidth, time.monotonic() + share)
        torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {bandwidth / 1e12:.2f} TB/s")
    print(table(found))
    if asked.json:
        rows = [{**row, "cut": list(vars(row["cut"]).values())} for row in found]
        kept = {"device": torch.cuda.get_device_name(), "bandwidth": bandwidth, "sweep": rows, "table": table(found)}
        asked.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
