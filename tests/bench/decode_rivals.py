"""Decoding with other tools on one GPU, as `decode_step.py` measures ours; one tool a process, rows as they come.

    python tests/bench/decode_rivals.py torch --shape llama-3-8b         compiled, `_weight_int4pack_mm`, as gpt-fast
    python tests/bench/decode_rivals.py onnxruntime --graphs FOLDER      MatMulNBits on CUDA (FOLDER: `ort_graph.py`)
    python tests/bench/decode_rivals.py transformers --model AWQ_FOLDER  gptqmodel's kernels, beside ours on the folder

Greedy, batch 1, caches fixed, sampling on the device, milliseconds a token over `--new` tokens after `--prompt`, the
median of five times. torch: the prompt is not computed, the cache is as long as if it were. `--device cpu --shape
tiny` tries the script where there is no GPU. Errors of one way are printed as a row and do not stop the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decode_shapes import SHAPES, group_size
from ort_graph import fill
from torch import Tensor, nn
from torch.nn import functional as F

Row = dict[str, Any]
REPEATS = 5
SHAPES = SHAPES | {"tiny": (256, 512, 2, 4, 2, 64, 1024)}


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def figures(times: list[float], new: int) -> Row:
    """Of times of `new` tokens each."""
    return {"ms": 1000 * median(times) / new, "spread": max(times) / min(times)}


@contextlib.contextmanager
def row(asked: argparse.Namespace, **head: Any) -> Iterator[Row]:
    """A row to fill, kept when the block ends; with the error in it when it fails."""
    found: Row = dict(head)
    try:
        yield found
    except Exception as e:  # another tool's: whatever it is, the next row is tried
        found["error"] = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:300] if str(e).strip() else ''}"
    asked.keep(found)


# ---- torch, compiled ---------------------------------------------------------------------------------


class Int4(nn.Module):
    """A linear of random codes in torch's INT4 layout; bfloat16."""

    def __init__(self, n: int, k: int, group: int, device: str) -> None:
        super().__init__()
        self.group = group
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device=device)
            packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        else:
            codes = torch.randint(0, 15, (n, k), dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.full((k // group, n, 2), k**-0.5 / 8, dtype=torch.bfloat16, device=device)
        scales[..., 1] = 0
        self.register_buffer("codes", packed)  # buffers keep their address: compiled graphs do not copy them
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm
        if not self.on_gpu:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        out: Tensor = multiply(x.reshape(-1, x.shape[-1]), self.codes, self.group, self.scales)
        return out.reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    def __init__(self, n: int, k: int, device: str) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(n, k, dtype=torch.bfloat16, device=device) * k**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Block(nn.Module):
    def __init__(self, shape: tuple[int, ...], capacity: int, bits: int, group: int, device: str) -> None:
        super().__init__()
        hidden, intermediate, _, self.query, self.key, self.size, _ = shape

        def linear(n: int, k: int) -> nn.Module:
            return Int4(n, k, group, device) if bits == 4 else Dense(n, k, device)

        self.qkv = linear((self.query + 2 * self.key) * self.size, hidden)
        self.o = linear(hidden, self.query * self.size)
        self.gate_up = linear(2 * intermediate, hidden)
        self.down = linear(hidden, intermediate)
        self.norms = nn.ParameterList(torch.ones(hidden, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache = torch.zeros(2, 1, self.key, capacity, self.size, dtype=torch.bfloat16, device=device)
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor, at: Tensor, mask: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        qkv = self.qkv(F.rms_norm(x, x.shape[-1:], self.norms[0], 1e-5))
        heads = qkv.view(1, 1, self.query + 2 * self.key, self.size).transpose(1, 2)
        q, k, v = heads.split([self.query, self.key, self.key], 1)
        keys, values = self.cache[0], self.cache[1]
        keys[:, :, at] = turned(k, cosines, sines)
        values[:, :, at] = v
        out = F.scaled_dot_product_attention(turned(q, cosines, sines), keys, values, attn_mask=mask, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(1, 1, -1))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.norms[1], 1e-5)).chunk(2, -1)
        added: Tensor = self.down(F.silu(gate) * up)
        return x + added


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1).to(x.dtype)


class Llama(nn.Module):
    """One token at a position, to the next token: what gpt-fast compiles, with gate and up in one product."""

    def __init__(self, name: str, capacity: int, bits: int, device: str) -> None:
        super().__init__()
        shape, group = SHAPES[name], group_size(name)
        hidden, _, depth, _, _, size, vocabulary = shape
        self.register_buffer("embedding", torch.randn(vocabulary, hidden, dtype=torch.bfloat16, device=device))
        self.blocks = nn.ModuleList(Block(shape, capacity, bits, group, device) for _ in range(depth))
        self.register_buffer("norm", torch.ones(hidden, dtype=torch.bfloat16, device=device))
        self.head = Dense(vocabulary, hidden, device)
        angle = torch.outer(torch.arange(capacity), 10000.0 ** (-torch.arange(size // 2) / (size // 2))).to(device)
        self.register_buffer("cosines", angle.cos())
        self.register_buffer("sines", angle.sin())
        self.register_buffer("mask", torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril())

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        x, mask = self.embedding[ids][None], self.mask[None, None, at]
        cosines, sines = self.cosines[at], self.sines[at]
        for block in self.blocks:
            x = block(x, at, mask, cosines, sines)
        logits: Tensor = self.head(F.rms_norm(x, x.shape[-1:], self.norm, 1e-5))
        return logits[0].argmax(-1)


@torch.no_grad()
def run_torch(asked: argparse.Namespace) -> None:
    for shape in asked.shape.split(","):
        for bits in (4, 16):
            torch.manual_seed(0)
            model = Llama(shape, asked.prompt + asked.new + 8, bits, asked.device).eval()
            head = {
                "tool": f"torch {torch.__version__}, compiled",
                "shape": shape,
                "bits": bits,
                "head_bits": 16,
            }
            with row(asked, **head, way="one graph around it") as found:
                found |= captured(torch.compile(model, fullgraph=True), asked)
            torch.compiler.reset()
            if bits == 4:  # a minute of compiling each: the other differs in its bytes only
                with row(asked, **head, way="reduce-overhead, as gpt-fast") as found:
                    found |= stepped(torch.compile(model, mode="reduce-overhead", fullgraph=True), asked)
                torch.compiler.reset()
            del model
            if asked.device == "cuda":
                torch.cuda.empty_cache()


def stepped(step: Callable[[Tensor, Tensor], Tensor], asked: argparse.Namespace) -> Row:
    ids, start = (
        torch.zeros(1, dtype=torch.int64, device=asked.device),
        torch.tensor([asked.prompt], device=asked.device),
    )

    def run(count: int) -> None:
        now, at = ids.clone(), start.clone()
        for _ in range(count):
            now = step(now, at).clone()
            at += 1

    compiling = seconds(lambda: run(6), asked.device)
    times = [seconds(lambda: run(asked.new), asked.device) for _ in range(REPEATS)]
    return figures(times, asked.new) | {"compile_seconds": compiling}


def captured(step: Callable[[Tensor, Tensor], Tensor], asked: argparse.Namespace) -> Row:
    """The whole step, with its next id and position, in one graph that is replayed without a word of the host."""
    ids, at = torch.zeros(1, dtype=torch.int64, device=asked.device), torch.tensor([asked.prompt], device=asked.device)

    def one() -> None:
        ids.copy_(step(ids, at))
        at.add_(1)

    def run() -> None:
        at.fill_(asked.prompt)
        for _ in range(asked.new):
            replay()

    compiling = seconds(one, asked.device)
    found: Row = {"compile_seconds": compiling}
    replay = one
    if asked.device == "cuda":
        from compress.runtime.cuda_graph import CudaGraph

        graph = CudaGraph(one)
        replay = graph.replay
        found["launches"] = graph.launches
    times = [seconds(run, asked.device) for _ in range(1 + REPEATS)][1:]
    return found | figures(times, asked.new)


# ---- ONNX Runtime ------------------------------------------------------------------------------------


def run_onnxruntime(asked: argparse.Namespace) -> None:
    import onnxruntime

    with contextlib.suppress(Exception):  # where torch is there, its CUDA libraries are loaded already
        onnxruntime.preload_dlls()
    for graph in (False, True) if asked.device == "cuda" else (False,):  # a capture that fails can break what follows
        for shape in asked.shape.split(","):
            folder = asked.graphs / shape
            fill(folder)
            way = "CUDA graph" if graph else "node by node"
            head = {"tool": f"ONNX Runtime {onnxruntime.__version__}", "shape": shape, "bits": 4, "head_bits": 16}
            with row(asked, **head, way=way) as found:
                found |= OrtSteps(onnxruntime, folder, shape, asked, graph).measured()


class OrtSteps:
    """Caches, ids, mask and logits stay where they are, as a graph needs it; the mask has the whole capacity."""

    def __init__(self, ort: Any, folder: Path, shape: str, asked: argparse.Namespace, graph: bool) -> None:
        _, _, depth, _, key, size, vocabulary = SHAPES[shape]
        self.asked, self.device, capacity = asked, asked.device, asked.prompt + asked.new + 8
        self.stream = torch.cuda.Stream() if self.device == "cuda" else None
        self.session = ort.InferenceSession(str(folder / "model.onnx"), *self._options(ort, graph))
        if self.device == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError(f"the graph runs on {self.session.get_providers()[0]}")

        def zeros(*dims: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(dims, dtype=dtype, device=self.device)

        self.ids, self.mask = zeros(1, 1, dtype=torch.int64), zeros(1, capacity, dtype=torch.int64)
        self.logits = zeros(1, 1, vocabulary)
        self.caches = {f"{i}.{part}": zeros(1, key, capacity, size) for i in range(depth) for part in ("key", "value")}
        self.binding = self.session.io_binding()
        self._bind("input_ids", self.ids, True)
        self._bind("attention_mask", self.mask, True)
        self._bind("logits", self.logits, False)
        for name, cache in self.caches.items():
            self._bind(f"past_key_values.{name}", cache, True)
            self._bind(f"present.{name}", cache, False)

    def _options(self, ort: Any, graph: bool) -> tuple[Any, list[Any]]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self.stream is None:
            return options, ["CPUExecutionProvider"]
        cuda = {"enable_cuda_graph": str(int(graph)), "user_compute_stream": str(self.stream.cuda_stream)}
        return options, [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]

    def _bind(self, name: str, tensor: Tensor, is_input: bool) -> None:
        import numpy as np

        kind = {torch.float16: np.float16, torch.int64: np.int64}[tensor.dtype]
        bind = self.binding.bind_input if is_input else self.binding.bind_output
        bind(name, self.device, 0, kind, list(tensor.shape), tensor.data_ptr())

    def _step(self) -> None:
        self.session.run_with_iobinding(self.binding)
        self.ids.copy_(self.logits[0].argmax(-1, keepdim=True))

    def _run(self, count: int) -> None:
        """The mask counts the tokens; the prompt's are taken for computed."""
        self.mask.zero_()
        self.mask[:, : self.asked.prompt] = 1
        for i in range(count):
            self.mask[:, self.asked.prompt + i] = 1
            self._step()

    def measured(self) -> Row:
        on = torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()
        with on:
            self._run(4)
            times = [seconds(lambda: self._run(self.asked.new), self.device) for _ in range(REPEATS)]
            if not bool(torch.isfinite(self.logits).all()):
                raise RuntimeError("logits are not finite")
        return figures(times, self.asked.new)


# ---- transformers with gptqmodel ---------------------------------------------------------------------


def run_transformers(asked: argparse.Namespace) -> None:
    """generate() with each of gptqmodel's kernels; ours on the same folder first."""
    ids = torch.randint(10, 4000, (1, asked.prompt), generator=torch.Generator().manual_seed(0)).to(asked.device)
    head = {"model": str(asked.model.name), "bits": 4, "head_bits": 16}
    if asked.device == "cuda":
        with row(asked, tool="ours", way="decode kernels, graph", **head) as found:
            found |= ours_on(asked, ids)
    with row(asked, tool="ours", way="--runtime torch: dense float16, transformers' forward", **head) as found:
        found |= ours_dense(asked, ids)
    if asked.device == "cuda":  # some of its kernels are compiled at first use
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ".".join(map(str, torch.cuda.get_device_capability())))
    if (os.cpu_count() or 1) < 4:
        os.cpu_count = lambda: 4  # its loader fails with fewer
    for backend in asked.backends.split(","):
        for static in (False, True) if asked.device == "cuda" else (False,):
            way = f"{backend}{', static cache, compiled' if static else ''}"
            with row(asked, tool="transformers, gptqmodel", way=way, **head) as found:
                found |= generated(asked, ids, backend, static)


def ours_on(asked: argparse.Namespace, ids: Tensor) -> Row:
    from compress.runtime import gpu_weights

    decoder = gpu_weights.open_decoder(asked.model, capacity=asked.prompt + asked.new + 8)

    def run(new: int) -> None:
        decoder.prefill(ids)
        decoder.greedy(new)

    return after_first(run, asked) | {"replays": decoder.graph.replays if decoder.graph else 0}


def ours_dense(asked: argparse.Namespace, ids: Tensor) -> Row:
    from compress.runtime.resident import TorchDecoder

    dtype = torch.float16 if asked.device == "cuda" else torch.float32
    capacity = asked.prompt + asked.new + 8
    decoder = TorchDecoder.open(asked.model, capacity=capacity, device=asked.device, dtype=dtype)

    def run(new: int) -> None:
        decoder.prefill(ids)
        for _ in range(new - 1):
            decoder.advance()

    return after_first(run, asked)


def after_first(run: Callable[[int], None], asked: argparse.Namespace) -> Row:
    """Milliseconds of a token after the first: the time of many less the time of one."""
    for new in (asked.new, 1):
        run(new)
    wholes = [seconds(lambda: run(asked.new), asked.device) for _ in range(REPEATS)]
    first = median([seconds(lambda: run(1), asked.device) for _ in range(REPEATS)])
    ms = 1000 * (median(wholes) - first) / (asked.new - 1)
    return {"ms": ms, "spread": max(wholes) / min(wholes), "first_token_ms": 1000 * first}


def generated(asked: argparse.Namespace, ids: Tensor, backend: str, static: bool) -> Row:
    transformers = importlib.import_module("transformers")
    importlib.import_module("gptqmodel")
    dtype = torch.float16 if asked.device == "cuda" else torch.float32
    config = transformers.AwqConfig(backend=backend)
    begun = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=dtype, device_map={"": asked.device}, quantization_config=config
    ).eval()
    kernel = type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__
    extra = {"cache_implementation": "static"} if static else {}

    def run(new: int) -> None:
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, **extra)

    run(2)
    loading = time.perf_counter() - begun
    return {"kernel": kernel, "load_seconds": loading} | after_first(run, asked)


WAYS = {"torch": run_torch, "onnxruntime": run_onnxruntime, "transformers": run_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=list(WAYS))
    parser.add_argument("--shape", default="llama-3-8b", help=", ".join(SHAPES))
    parser.add_argument("--graphs", type=Path, help="folder of `ort_graph.py`")
    parser.add_argument("--model", type=Path, help="an INT4 artifact in AutoAWQ's format")
    parser.add_argument("--backends", default="gemm_triton,marlin", help="of transformers' AwqConfig")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found: Row = {"torch": torch.__version__, "rows": []}
    found["device"] = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"

    def keep(made: Row) -> None:
        found["rows"].append({"what": "rival", **made})
        print(json.dumps(made), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(found))

    asked.keep = keep
    WAYS[asked.tool](asked)


if __name__ == "__main__":
    main()
