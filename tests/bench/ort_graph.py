"""A decoder as onnxruntime-genai's builder (0.18, `-p int4 -e cuda`) writes it for a GPU, in any of our shapes.

    python tests/bench/ort_graph.py FOLDER [--shapes llama-3-8b,...]

writes FOLDER/SHAPE/model.onnx, which is small and needs the package `onnx`, and weights.json, which says what random
numbers its weights are; `fill` makes those where the graph runs. Same operators, attributes and packing as the
builder's own graph of a Llama with AutoAWQ weights (float16, q, k and v in one, lm_head in float16).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decode_shapes import SHAPES, group_size

POSITIONS = 2048
WEIGHTS = "model.onnx.data"


class _Graph:
    """Nodes and weights on the way; a weight is a place in the file and how it is drawn."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.weights: list[dict[str, Any]] = []
        self.size = 0

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        from onnx import helper

        domain = "com.microsoft" if kind in ("MatMulNBits", "GroupQueryAttention") or "Skip" in kind else ""
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, name=outputs[0] + "/node", domain=domain, **attributes)
        )
        return outputs[0]

    def weight(self, name: str, dims: Sequence[int], draw: str, scale: float = 0.0) -> str:
        """draw: codes (bytes), zeros (both nibbles 8), or float16: ones, normal or level (0.5 to 1.5) times scale."""
        from onnx import StringStringEntryProto, TensorProto

        integer = draw in ("codes", "zeros")
        length = math.prod(dims) * (1 if integer else 2)
        tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.UINT8 if integer else TensorProto.FLOAT16)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", self.size), ("length", length)):
            tensor.external_data.append(StringStringEntryProto(key=key, value=str(value)))
        self.initializers.append(tensor)
        self.weights.append({"offset": self.size, "length": length, "draw": draw, "scale": scale})
        self.size += -(-length // 4096) * 4096
        return name

    def linear(self, x: str, name: str, n: int, k: int, group: int) -> str:
        groups = -(-k // group)
        parts = [
            self.weight(f"{name}.qweight", (n, groups, group // 2), "codes"),
            self.weight(f"{name}.scales", (n * groups,), "level", k**-0.5 / 8),
            self.weight(f"{name}.qzeros", (n * -(-groups // 2),), "zeros"),
        ]
        sizes = {"accuracy_level": 0, "bits": 4, "block_size": group, "K": k, "N": n}
        return self.node("MatMulNBits", [x, *parts], [f"{name}/out"], **sizes)


def make(folder: Path, shape: str) -> None:
    import onnx
    from onnx import TensorProto, helper

    hidden, _, depth, _, key, size, vocabulary = SHAPES[shape]
    graph = _Graph()
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("at", TensorProto.INT64, [], [1]),
    ]
    graph.initializers += constants
    graph.node("ReduceSum", ["attention_mask", "one"], ["tokens"], keepdims=0)
    graph.node("Sub", ["tokens", "one"], ["past"])
    graph.node("Cast", ["past"], ["seqlens_k"], to=TensorProto.INT32)
    graph.node("Shape", ["attention_mask"], ["mask_shape"])
    graph.node("Gather", ["mask_shape", "at"], ["total"], axis=0)
    graph.node("Cast", ["total"], ["total_sequence_length"], to=TensorProto.INT32)
    for name in ("cos_cache", "sin_cache"):
        graph.weight(name, (POSITIONS, size // 2), "level", 0.7)
    table = graph.weight("embed", (vocabulary, hidden), "normal", 1.0)
    stream = graph.node("Gather", [table, "input_ids"], ["embedded"])
    norm = graph.weight("layers.0.input_norm", (hidden,), "ones")
    x = graph.node("SimplifiedLayerNormalization", [stream, norm], ["normed"], epsilon=1e-5, axis=-1, stash_type=1)
    for i in range(depth):
        x, stream = _block(graph, i, x, stream, SHAPES[shape], group_size(shape))
    head = graph.weight("lm_head", (hidden, vocabulary), "normal", hidden**-0.5)
    graph.node("MatMul", [x, head], ["logits"])

    def value(name: str, dims: Sequence[int | str], kind: int = TensorProto.FLOAT16) -> Any:
        return helper.make_tensor_value_info(name, kind, dims)

    caches = [(f"{i}.{part}") for i in range(depth) for part in ("key", "value")]
    ids = [value("input_ids", ["batch", "tokens"], TensorProto.INT64)]
    ids.append(value("attention_mask", ["batch", "total"], TensorProto.INT64))
    pasts = [value(f"past_key_values.{c}", ["batch", key, "past", size]) for c in caches]
    presents = [value(f"present.{c}", ["batch", key, "total", size]) for c in caches]
    logits = value("logits", ["batch", "tokens", vocabulary])
    made = helper.make_graph(graph.nodes, shape, [*ids, *pasts], [logits, *presents], graph.initializers)
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    (folder / "weights.json").write_text(json.dumps({"shape": shape, "size": graph.size, "weights": graph.weights}))


def _block(graph: _Graph, i: int, x: str, stream: str, sizes: tuple[int, ...], group: int) -> tuple[str, str]:
    """(what the next block reads normed, the residual stream)."""
    hidden, intermediate, depth, query, key, size, _ = sizes
    name = f"layers.{i}"
    qkv = graph.linear(x, f"{name}.qkv", (query + 2 * key) * size, hidden, group)
    caches = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
    inputs = [qkv, "", "", *caches, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache", "", "", ""]
    heads = {"num_heads": query, "kv_num_heads": key, "scale": size**-0.5, "local_window_size": -1, "softcap": 0.0}
    outputs = [f"{name}.attended", f"present.{i}.key", f"present.{i}.value"]
    attended = graph.node("GroupQueryAttention", inputs, outputs, **heads, do_rotary=1, rotary_interleaved=0)
    out = graph.linear(attended, f"{name}.o", hidden, query * size, group)
    x, stream = _add_norm(graph, stream, out, f"{name}.post_norm", hidden)
    gate = graph.linear(x, f"{name}.gate", intermediate, hidden, group)
    up = graph.linear(x, f"{name}.up", intermediate, hidden, group)
    sigmoid = graph.node("Sigmoid", [gate], [f"{name}.sigmoid"])
    silu = graph.node("Mul", [gate, sigmoid], [f"{name}.silu"])
    gated = graph.node("Mul", [silu, up], [f"{name}.gated"])
    down = graph.linear(gated, f"{name}.down", hidden, intermediate, group)
    return _add_norm(graph, stream, down, f"layers.{i + 1}.input_norm" if i + 1 < depth else "norm", hidden)


def _add_norm(graph: _Graph, stream: str, added: str, name: str, hidden: int) -> tuple[str, str]:
    outputs = [f"{name}/out", "", "", f"{name}/sum"]
    weight = graph.weight(name, (hidden,), "ones")
    graph.node("SkipSimplifiedLayerNormalization", [stream, added, weight], outputs, epsilon=1e-5)
    return outputs[0], outputs[3]


def fill(folder: Path) -> None:
    """The weights beside the graph, from seed 0, unless they are there."""
    said = json.loads((folder / "weights.json").read_text())
    path = folder / WEIGHTS
    if path.exists() and path.stat().st_size == said["size"]:
        return
    rng = np.random.default_rng(0)
    once = rng.standard_normal(1 << 22, dtype=np.float32)  # numbers to repeat: drawing 5 GB anew would take a minute
    with path.open("wb") as file:
        for weight in said["weights"]:
            file.seek(weight["offset"])
            file.write(_drawn(rng, once, weight))
        file.truncate(said["size"])


def _drawn(rng: np.random.Generator, once: np.ndarray[Any, Any], weight: dict[str, Any]) -> bytes:
    length, draw, scale = weight["length"], weight["draw"], weight["scale"]
    if draw == "codes":
        return rng.bytes(length)
    if draw == "zeros":
        return b"\x88" * length
    if draw == "ones":
        return np.ones(length // 2, np.float16).tobytes()
    source = once if draw == "normal" else 0.5 + np.abs(once % 1)
    return np.resize((source * scale).astype(np.float16), length // 2).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    asked = parser.parse_args()
    for shape in asked.shapes.split(","):
        make(asked.folder / shape, shape)


if __name__ == "__main__":
    main()
