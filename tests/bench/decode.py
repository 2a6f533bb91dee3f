"""Speed of one linear of a decode step on one GPU against the memory it must read, beside other kernels; one run.

    python tests/bench/decode.py check      every kernel against float64
    python tests/bench/decode.py gemv       shares of the measured bandwidth, weights cold in the cache
    python tests/bench/decode.py tune       the tiling of each linear (for `weight_only.tiling`)

Whole steps: `decode_step.py`; other tools: `decode_rivals.py`; all of it in one run: `decode_run.py`.

Weights are random in the shape of the named model: speed does not depend on their values. Bandwidth is that of
reading: the best of several sums over one large float32 tensor in the same run. A share is (bytes that a step must
read) / time / bandwidth.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_shapes import SHAPES
from torch import Tensor

from compress.runtime.gpu_decoder import LayerWeights, Weights
from compress.runtime.kernels import weight_only
from compress.runtime.kernels.decode import Heads
from compress.runtime.kernels.weight_only import Packed

COLD_BYTES = 200 << 20  # weights in rotation: several times the cache


def milliseconds(run: Callable[[], object], *, repeats: int = 20, inner: int = 1) -> float:
    """Median over repeats of the time of one `run`, by events."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return sorted(times)[len(times) // 2]


def read_bandwidth() -> float:
    """Bytes a second of reading: a sum over 4 GiB."""
    x = torch.randn(1 << 30, device="cuda")
    for _ in range(3):
        x.sum()
    return x.numel() * 4 / min(milliseconds(lambda: x.sum(), repeats=1) for _ in range(10)) * 1000


def random_packed(n: int, k: int, bits: int, group_size: int) -> Packed:
    if bits == 16:
        return weight_only.pack_dense(torch.randn(n, k, device="cuda", dtype=torch.float16) * k**-0.5)
    groups = k // group_size if group_size > 0 else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n, groups, device="cuda") + 0.5) * k**-0.5 / 2 ** (bits - 1)
    zero = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 2, (n, groups), device="cuda")
    return weight_only.pack(codes, scale, zero, bits)


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def cold_time(calls: list[Callable[[], object]]) -> float:
    """Milliseconds a call, over calls that each read other memory, in one graph."""

    def run() -> None:
        for call in calls:
            call()

    graph = captured(run)
    graph.replay()
    return milliseconds(graph.replay, inner=len(calls))


def copies(n: int, k: int, bits: int, group_size: int) -> list[Packed]:
    first = random_packed(n, k, bits, group_size)
    count = max(4, COLD_BYTES // first.num_bytes())
    return [first, *(random_packed(n, k, bits, group_size) for _ in range(count - 1))]


def check() -> None:
    """Every kernel against the decoded weight in float64."""
    worst = 0.0
    for bits, group in ((4, 128), (4, 64), (4, 32), (8, 128), (8, -1), (16, -1)):
        for (n, k), m in itertools.product(((4096, 4096), (1000, 576), (136, 11008)), (1, 3, 8, 16, 33, 64)):
            if group > 0 and k % group:
                continue
            packed = random_packed(n, k, bits, group)
            x = torch.randn(m, k, device="cuda", dtype=torch.float16)
            w = weight_only.dense(packed).double()
            want = x.double() @ w.t()
            got = weight_only.matmul(x, packed).double()
            error = float((got - want).norm() / want.norm())
            worst = max(worst, error)
            assert error < 1e-3, (bits, group, n, k, m, error)
    print(f"kernels agree with float64 to {worst:.1e}", flush=True)


LINEARS = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (14336, 4096), (128256, 4096), (3072, 3072))


def tune(bandwidth: float) -> None:
    for bits, group in ((4, 128), (8, -1), (16, -1)):
        for n, k in LINEARS[:5]:
            weights = copies(n, k, bits, group)
            for m in (1, 16, 64):
                x = torch.randn(m, k, device="cuda", dtype=torch.float16)
                found = []
                tiles = 1 << max(0, (m - 1) // 8).bit_length()
                for run, warps, rows in itertools.product((1, 2), (4, 8, 16), (1, 2, 4)):
                    if (
                        tiles * rows > 16
                        or tiles * rows * warps > 128
                        or (m > 1 and run > 1)
                        or (bits == 16 and run > 1)
                    ):
                        continue
                    cut = weight_only.Tiling(run, tiles, warps, rows)
                    try:
                        ms = cold_time([lambda w=w, c=cut, x=x: weight_only.matmul(x, w, cut=c) for w in weights])
                    except Exception as e:  # a tiling that does not compile or launch
                        print("  ", cut, str(e)[:80])
                        continue
                    found.append((weights[0].num_bytes() / ms * 1000 / bandwidth, (run, tiles, warps, rows)))
                best = sorted(found, reverse=True)[:3]
                d = weight_only.tiling(weights[0], m)
                mine = next((s for s, c in found if c == (d.run, d.tiles, d.warps, d.rows)), 0.0)
                said = " ".join(f"{c}:{s:.3f}" for s, c in best)
                print(
                    bits,
                    group,
                    f"{n}x{k} M={m}",
                    said,
                    f"default {d.run, d.tiles, d.warps, d.rows}:{mine:.3f}",
                    flush=True,
                )
            del weights


def gemv(bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for (n, k), (bits, group) in itertools.product(LINEARS, ((4, 128), (8, -1), (16, -1))):
        weights = copies(n, k, bits, group)
        size = weights[0].num_bytes()
        for m in (1, 8, 16, 64):
            x = torch.randn(m, k, device="cuda", dtype=torch.float16)
            ms = cold_time([lambda w=w, x=x: weight_only.matmul(x, w) for w in weights])
            rows.append(
                {"shape": f"{n}x{k}", "bits": bits, "m": m, "us": 1000 * ms, "share": size / ms * 1000 / bandwidth}
            )
        del weights
        if bits == 16:
            dense = [
                torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(max(4, COLD_BYTES // (2 * n * k)))
            ]
            for m in (1, 8, 16, 64):
                x = torch.randn(m, k, device="cuda", dtype=torch.float16)
                ms = cold_time([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
                rows.append(
                    {
                        "shape": f"{n}x{k}",
                        "bits": "cuBLAS",
                        "m": m,
                        "us": 1000 * ms,
                        "share": 2 * n * k / ms * 1000 / bandwidth,
                    }
                )
            del dense
        if bits == 4:
            rows += tinygemm(n, k, group, bandwidth)
    for row in rows:
        print("{shape:>14} {bits!s:>8} M={m:<3} {us:8.1f} us  {share:6.1%}".format(**row), flush=True)
    return rows


def tinygemm(n: int, k: int, group: int, bandwidth: float) -> list[dict[str, Any]]:
    """torch's own INT4 kernel, which gpt-fast and torchao use; bfloat16."""
    out = []
    try:
        size = n * k // 2 + n * (k // group) * 4
        packed = [
            torch.ops.aten._convert_weight_to_int4pack(
                torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda"), 8
            )
            for _ in range(max(4, COLD_BYTES // size))
        ]
        scales = torch.rand(k // group, n, 2, device="cuda", dtype=torch.bfloat16)
        for m in (1, 8, 16, 64):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            ms = cold_time([lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w, group, scales) for w in packed])
            out.append(
                {
                    "shape": f"{n}x{k}",
                    "bits": "tinygemm",
                    "m": m,
                    "us": 1000 * ms,
                    "share": size / ms * 1000 / bandwidth,
                }
            )
    except RuntimeError as e:
        print("tinygemm:", str(e)[:100])
    return out


def random_weights(shape: str, bits: int, group_size: int, positions: int, head_bits: int = 16) -> Weights:
    """head_bits: of the output matrix; 8: one scale a row."""
    hidden, intermediate, depth, query, key, size, vocabulary = SHAPES[shape]

    def norm() -> Tensor:
        return torch.rand(hidden, device="cuda") + 0.5

    layers = [
        LayerWeights(
            input_norm=norm(),
            qkv=random_packed((query + 2 * key) * size, hidden, bits, group_size),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            o=random_packed(hidden, query * size, bits, group_size),
            o_bias=None,
            post_norm=norm(),
            gate_up=random_packed(2 * intermediate, hidden, bits, group_size),
            down=random_packed(hidden, intermediate, bits, group_size),
        )
        for _ in range(depth)
    ]
    angle = torch.outer(torch.arange(positions), 10000.0 ** (-torch.arange(size // 2) / (size // 2))).cuda()
    embedding = torch.randn(vocabulary, hidden, device="cuda", dtype=torch.float16)
    return Weights(
        embedding=embedding,
        layers=layers,
        norm=norm(),
        head=weight_only.pack_dense(embedding) if head_bits == 16 else random_packed(vocabulary, hidden, head_bits, -1),
        cosines=angle.cos(),
        sines=angle.sin(),
        heads=Heads(query=query, key=key, size=size, scale=size**-0.5),
        eps=1e-5,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "gemv", "tune"], nargs="+")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "read_bytes_per_second": bandwidth}
    if "check" in asked.what:
        check()
    if "tune" in asked.what:
        tune(bandwidth)
    if "gemv" in asked.what:
        found["gemv"] = gemv(bandwidth)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
