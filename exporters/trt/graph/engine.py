"""What a device needs beside the graph: input shapes by profile, a script that builds, the contract in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.trt.graph.architecture import Architecture
from exporters.trt.graph.write import DATA, GRAPH

PLAN = "build.json"
SCRIPT = "build_engine.py"

# Activations are sized for the largest prefill, so a long prompt enters in pieces of this many tokens.
MAX_PREFILL = 1024
# First TensorRT whose parser has every operator of the dialect (onnx-tensorrt changelog, 10.15). JetPack 6.2 has 10.3.
MINIMUM_TENSORRT = {24: [10, 15], 21: [10, 3]}


def plan(
    arch: Architecture, *, context: int, batch: int, opset: int, quantized: Mapping[int, list[str]]
) -> dict[str, Any]:
    """`build.json`. quantized: bits of the weights (4, 8) -> names of their products in the graph.

    Profiles: `prefill` for many tokens; `decode` with every shape fixed, which a CUDA Graph needs; and `any`, which
    does both less well but holds the weights once (TensorRT-RTX 1.7 stored a float16 model twice for prefill and
    decode).
    """
    longest = min(MAX_PREFILL, context)
    return {
        "onnx": GRAPH,
        "data": DATA,
        "opset": opset,
        "minimum_tensorrt": MINIMUM_TENSORRT[opset],
        "capacity": context,
        "batch": batch,
        "profiles": {
            "prefill": _profile(arch, context, (1, batch), (1, max(1, longest // 2), longest)),
            "decode": _profile(arch, context, (batch, batch), (1, 1, 1)),
            "any": _profile(arch, context, (1, batch), (1, 1, longest)),
        },
        "cuda_graph": ["decode"],
        "caches": {
            f"past_key_values.{index}.{kind}": f"present.{index}.{kind}"
            for index in range(len(arch.layers))
            for kind in ("key", "value")
        },
        "caches_in_place": opset >= 24,
        "quantized_layers": quantized[4],
        "int8_layers": quantized[8],
    }


def _profile(
    arch: Architecture, context: int, batches: tuple[int, int], tokens: tuple[int, int, int]
) -> dict[str, dict[str, list[int]]]:
    sizes = list(zip(("min", "opt", "max"), (batches[0], batches[1], batches[1]), tokens, strict=True))
    shapes = {
        "input_ids": {label: [b, t] for label, b, t in sizes},
        "write_indices": {label: [b] for label, b, _ in sizes},
        "logits_indices": {label: [b, 1] for label, b, _ in sizes},
    }
    for index in range(len(arch.layers)):
        for kind in ("key", "value"):
            cache = {label: [b, arch.num_kv_heads, context, arch.head_dim] for label, b, _ in sizes}
            shapes[f"past_key_values.{index}.{kind}"] = cache
    return shapes


def script() -> bytes:
    """The building script, which is a module of ours that imports none of ours."""
    return Path(__file__).with_name(SCRIPT).read_bytes()


def readme(plan: dict[str, Any], arch: Architecture) -> str:
    """Of the export's README: what the script makes, and what goes in and out."""
    cache = f"[B, {arch.num_kv_heads}, {plan['capacity']}, {arch.head_dim}]"
    longest = plan["profiles"]["prefill"]["input_ids"]["max"][1]
    in_place = (
        "Bind each `present.N.*` to the address of its `past_key_values.N.*`: TensorRT updates caches in place."
        if plan["caches_in_place"]
        else "Bind `present.N.*` to a second set of buffers and swap the two sets after every call (two CUDA Graphs)."
    )
    return f"""It gives `model.engine` and `model.engine.json`; `--profiles any` builds one profile for prompt and
answer: less memory, kernels chosen for one token. `compress generate .` then runs
the engine. ONNX opset {plan["opset"]}, strongly typed, float16 activations; weights in `{plan["data"]}`.
The graph was run on ONNX Runtime's CPU provider and compared with the
model (`compress.json`). No engine was built or run when this folder was made.

| input | type | shape | |
|---|---|---|---|
| `input_ids` | int64 | [B, T] | T new tokens of each of B sequences, padded on the right |
| `write_indices` | int64 | [B] | tokens that each sequence's cache holds already; plus T at most {plan["capacity"]} |
| `logits_indices` | int64 | [B, L] | which of the T tokens to predict after; the engine's L is 1 |
| `past_key_values.N.key`, `.value` | float16 | {cache} | caches, any content beyond `write_indices` |

| output | type | shape | |
|---|---|---|---|
| `logits` | float16 | [B, L, {arch.vocab_size}] | |
| `present.N.key`, `.value` | float16 | {cache} | caches with the T tokens written |

{in_place}

A prompt enters through profile `prefill`, at most {longest} tokens a call, longer ones in pieces. Then `decode`, one
token a call, with every shape fixed: warm up once, capture it in a CUDA Graph on a stream of its own, and replay it.
Two profiles may hold weights twice, when their kernels want different layouts: compare `engine_bytes` with
`onnx_data_bytes`.
"""
