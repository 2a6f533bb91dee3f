"""Runs the graph that TensorRT Edge-LLM's exporter wrote, node by node, in float32 on a CPU.

ONNX Runtime cannot: the graph's matrix products and attention are operators of NVIDIA's plugin library, which needs a
GPU. Here each of them is computed from its published meaning, so that what runs is the graph as written (its nodes,
its constants, its key-value pages), while NVIDIA's kernels, TensorRT and float16 rounding do not. An operator without
a definition here is refused, never skipped.

The tokens are known beforehand, so steps depend on each other only through the key-value pages. All steps therefore
pass through one node before the next: each weight is read and unpacked once, and memory holds one weight at a time.

Shapes: T tokens of a step, P pages, C tokens of a page, D head_dim, Q query heads, H key-value heads, R rotary dims,
N out_features, K in_features, G groups along K, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import ArtifactError, UnsupportedError
from compress.files import read_json
from exporters.edge.layout import unpack_fragments

DOMAIN = "trt_edgellm"
PAGE_TOKENS = (
    128  # tensorrt_edgellm 0.11.0, onnx/export.py: past_key_values_i is [2, num_pages, 128, kv_heads, head_dim]
)

# What AttentionPlugin may do besides plain causal attention. All must be off: none has a definition here.
_OFF = (
    "enable_tree_attention", "enable_fp8_kv_cache", "enable_context_mask_selector", "enable_vision_block_attention",
    "enable_kv_shared", "enable_attention_sink", "enable_contiguous_query_swa", "qk_norm_post_rope",
    "skip_softmax_scale_factor",
)  # fmt: skip


class Graph:
    """A model.onnx of Edge-LLM with its constants still on disk. Needs `onnx`."""

    def __init__(self, folder: Path) -> None:
        import onnx

        self.folder = folder
        self.model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.inputs = [i.name for i in self.model.graph.input]
        self.outputs = [o.name for o in self.model.graph.output]
        self.initializers = {t.name: t for t in self.model.graph.initializer}

    def constant(self, name: str) -> Tensor:
        """An initializer as it is stored (its own dtype), read from the data file."""
        shape = tuple(self.initializers[name].dims)
        return self._read(name, math.prod(shape)).reshape(shape)

    def first_row(self, name: str) -> Tensor:
        """The values along the last axis at index 0 of the others; the rest is not read."""
        return self._read(name, int([1, *self.initializers[name].dims][-1]))

    def num_bytes(self, name: str) -> int:
        """Bytes of an initializer as stored."""
        import onnx

        proto = self.initializers[name]
        return int(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize * math.prod(proto.dims))

    def _read(self, name: str, count: int) -> Tensor:
        """The first `count` values of an initializer."""
        import onnx

        proto = self.initializers[name]
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return torch.from_numpy(onnx.numpy_helper.to_array(proto).reshape(-1)[:count].copy())
        where = {entry.key: entry.value for entry in proto.external_data}
        file = where["location"]
        if Path(file).name != file:
            raise ArtifactError(f"{self.folder / 'model.onnx'}: {name} lies in {file!r}, outside the export; refused")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
        values = np.fromfile(self.folder / file, dtype=dtype, count=count, offset=int(where.get("offset", 0)))
        if values.size != count:
            raise ArtifactError(f"{self.folder / file}: ends inside {name}; the disk may be full, export again")
        return torch.from_numpy(values)


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def logits(folder: Path, ids_T: Tensor, *, prefill: int) -> Tensor:
    """Logits float32 `[T, V]` of the exported folder: `prefill` tokens at once, then one at a time.

    folder holds model.onnx, embedding.safetensors and config.json. Raises UnsupportedError for an operator or feature
    that has no definition here.
    """
    from safetensors import safe_open

    graph = Graph(folder)
    config = read_json(folder / "config.json")
    spans = [(0, prefill), *((t, t + 1) for t in range(prefill, len(ids_T)))]
    with safe_open(folder / "embedding.safetensors", framework="pt") as file:
        embedding_VH = file.get_tensor("embedding")
    cos_sin_TR = rope_table(config, len(ids_T))
    pages = -(-len(ids_T) // PAGE_TOKENS)
    shape = (2, pages, PAGE_TOKENS, int(config["num_key_value_heads"]), int(config["head_dim"]))
    caches = [name for name in graph.inputs if name.startswith("past_key_values_")]
    steps: list[dict[str, Tensor]] = []
    for start, end in spans:
        length = end - start
        values = {
            "inputs_embeds": embedding_VH[ids_T[start:end]].float(),
            "rope_rotary_cos_sin": cos_sin_TR[start:end],
            "positions": torch.arange(start, end),
            "query_start_offsets": torch.tensor([0, length]),
            "query_lengths": torch.tensor([length]),
            "past_lengths": torch.tensor([start]),
            "attention_sequence_lengths": torch.tensor([end]),
            "state_indices": torch.tensor([0]),
            "execution_phase_marker": torch.zeros(1, dtype=torch.int64),
            "context_sequence_count_carrier": torch.zeros(1, dtype=torch.int64),
            # keys of page p lie in row p of the pool, its values in row P + p
            "kv_page_table": torch.stack([torch.arange(pages), pages + torch.arange(pages)])[None],
            "logits_indices": torch.arange(length),
        }
        unknown = [n for n in graph.inputs if n not in values and n not in caches]
        if unknown:
            raise UnsupportedError(f"{folder / 'model.onnx'}: input {unknown[0]} is not one of a text model's; refused")
        steps.append(values)
    steps[0].update({name: torch.zeros(shape) for name in caches})
    _run(graph, steps)
    return torch.cat([values["logits"] for values in steps])


def _run(graph: Graph, steps: list[dict[str, Tensor]]) -> None:
    """Compute every node for every step; afterwards each step holds `logits`."""
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.input}
    for index, node in enumerate(graph.nodes):
        compute = _OPERATORS.get((node.domain, node.op_type))
        if compute is None:
            raise UnsupportedError(
                f"{graph.folder / 'model.onnx'}: operator {node.domain or 'ai.onnx'}.{node.op_type} has no definition "
                "here, so the export cannot be verified"
            )
        keywords = attributes(node)
        constants = {name: _loaded(graph, name) for name in node.input if name in graph.initializers}
        if node.op_type == "Int4GroupwiseGemmPluginV2":
            constants = {node.input[1]: _int4_weight(node, keywords, constants)}
        for number, values in enumerate(steps):
            arguments = [constants[n] if n in constants else values.get(n) for n in node.input]
            results = compute(arguments, keywords)
            values.update(zip(node.output, results, strict=True))
            for name in node.output:
                if name.startswith("present_key_values_") and number + 1 < len(steps):
                    steps[number + 1][name.replace("present", "past")] = values[name]
            for name in set(node.input):
                if last_use[name] == index:
                    values.pop(name, None)


def _loaded(graph: Graph, name: str) -> Tensor:
    value = graph.constant(name)
    return value.float() if value.is_floating_point() else value


def _int4_weight(node: Any, keywords: Mapping[str, Any], constants: Mapping[str, Tensor]) -> Tensor:
    """The float32 weight `[N, K]` of an INT4 product: (code - 8) * scale, scales `[G, N]`."""
    n, k, group = int(keywords["gemm_n"]), int(keywords["gemm_k"]), int(keywords["group_size"])
    codes_NK = unpack_fragments(constants[node.input[1]], n, k)
    scale_NG = constants[node.input[2]].t()
    return ((codes_NK.float() - 8).reshape(n, k // group, group) * scale_NG[:, :, None]).reshape(n, k)


def rope_table(config: Mapping[str, Any], length: int) -> Tensor:
    """Cosines, then sines, of each position's angles: float32 `[length, R]`, as Edge-LLM's runtime fills its table.

    config: the export's config.json, which is all that the runtime knows. Plain rotary embedding (Su et al. 2021), or
    `llama3`.
    """
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    dim = int(int(config["head_dim"]) * float(config.get("partial_rotary_factor", 1.0)))
    angle = float(config["rope_theta"]) ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "llama3":
        angle = angle / llama3_factors(angle, scaling)
    elif kind != "default":
        raise UnsupportedError(f"rope type {kind!r} has no definition here; refused")
    angles = torch.arange(length, dtype=torch.float64)[:, None] * angle[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def llama3_factors(angle: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """What Llama 3.1 divides each angle by; float64, same shape.

    Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor are divided by `factor`,
    and between them 1 / factor is interpolated in original / wavelength. Source: Meta's Llama 3.1 reference code.
    """
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    share = ((original * angle / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def attention(arguments: Sequence[Tensor | None], keywords: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """AttentionPlugin for one sequence: rotate, write the key-value pages, attend causally.

    qkv `[T, (Q + 2 H) * D]` -> output `[T, Q, D]` and the pages `[2, P, C, H, D]`. Optional RMSNorm of each query and
    key head before rotating (Qwen3). Attention is in float32, its scale an attribute.
    """
    on = [name for name in _OFF if keywords.get(name)]
    if on:
        raise UnsupportedError(f"AttentionPlugin with {on[0]}={keywords[on[0]]} has no definition here; refused")
    heads, kv_heads, dim = (int(keywords[n]) for n in ("num_q_heads", "num_kv_heads", "head_size"))
    qkv, pages, _, cos_sin_TR, past_lengths, table = arguments[:6]
    assert qkv is not None and pages is not None and cos_sin_TR is not None
    assert past_lengths is not None and table is not None
    length, past = qkv.shape[0], int(past_lengths[0])
    q_TQD, k_THD, v_THD = qkv.reshape(length, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    if keywords.get("enable_qk_norm"):
        gamma_q, gamma_k = arguments[6:8]
        assert gamma_q is not None and gamma_k is not None
        q_TQD = _rms_norm(q_TQD, gamma_q, float(keywords["rms_norm_eps"]))
        k_THD = _rms_norm(k_THD, gamma_k, float(keywords["rms_norm_eps"]))
    q_TQD, k_THD = rotate(q_TQD, cos_sin_TR), rotate(k_THD, cos_sin_TR)
    pool = pages.reshape(-1, *pages.shape[2:]).clone()  # [2 P, C, H, D]
    position = torch.arange(past, past + length)
    for plane, new in ((0, k_THD), (1, v_THD)):
        pool[table[0, plane][position // PAGE_TOKENS], position % PAGE_TOKENS] = new
    seen = torch.arange(past + length)
    keys, values = (pool[table[0, plane][seen // PAGE_TOKENS], seen % PAGE_TOKENS] for plane in (0, 1))
    keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
    score_QTS = torch.einsum("tqd,sqd->qts", q_TQD, keys) * float(keywords["attention_scale"])
    hidden_TS = seen[None, :] > position[:, None]
    window = int(keywords.get("sliding_window_size", -1))
    if window > 0:
        hidden_TS = hidden_TS | (seen[None, :] <= position[:, None] - window)
    weight_QTS = score_QTS.masked_fill(hidden_TS, -torch.inf).softmax(dim=-1)
    return torch.einsum("qts,sqd->tqd", weight_QTS, values), pool.reshape(pages.shape)


def rotate(x_THD: Tensor, cos_sin_TR: Tensor) -> Tensor:
    """Rotate the first R dims of each head, dim i with dim i + R/2; the rest pass."""
    rotary = cos_sin_TR.shape[-1]
    cos, sin = (half[:, None] for half in cos_sin_TR.chunk(2, dim=-1))
    first, second = x_THD[..., :rotary].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated, x_THD[..., rotary:]], dim=-1)


def _rms_norm(x_THD: Tensor, gamma_D: Tensor, eps: float) -> Tensor:
    return x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + eps) * gamma_D.float()


def _reshape(x: Tensor, shape: Tensor, allowzero: int) -> Tensor:
    sizes = [int(n) for n in shape]
    if not allowzero:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def _shape(x: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    return torch.tensor(x.shape[keywords.get("start", 0) : keywords.get("end", x.ndim)])


def _gemm(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    a = arguments[0].t() if keywords.get("transA") else arguments[0]
    b = arguments[1].t() if keywords.get("transB") else arguments[1]
    out: Tensor = keywords.get("alpha", 1.0) * (a @ b)
    return out + keywords.get("beta", 1.0) * arguments[2] if len(arguments) > 2 and arguments[2] is not None else out


def _cast(x: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Between floating-point types a cast does nothing: everything here is float32."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return x.float() if keywords["to"] in floats else x.long()


def _quantize(x: Tensor, scale: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """INT8 codes, as floats, of one scale for the whole tensor."""
    if keywords.get("output_dtype") != 3 or scale.numel() != 1:
        raise UnsupportedError(f"QuantizeLinear with {dict(keywords)} has no definition here; refused")
    return (x / scale).round().clamp(-128, 127)


def _dequantize(q: Tensor, scale: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Codes times their scale: one for the whole tensor, or one a row (axis 0)."""
    if scale.numel() == 1:
        return q.float() * scale
    if keywords.get("axis", 1) != 0 or scale.numel() != len(q):
        raise UnsupportedError(f"DequantizeLinear with {dict(keywords)} has no definition here; refused")
    return q.float() * scale[:, None]


Compute = Callable[[Sequence[Any], Mapping[str, Any]], tuple[Tensor, ...]]
_OPERATORS: dict[tuple[str, str], Compute] = {
    ("", "Add"): lambda a, k: (a[0] + a[1],),
    ("", "Mul"): lambda a, k: (a[0] * a[1],),
    ("", "Pow"): lambda a, k: (a[0] ** a[1],),
    ("", "Sqrt"): lambda a, k: (a[0].sqrt(),),
    ("", "Reciprocal"): lambda a, k: (1 / a[0],),
    ("", "Sigmoid"): lambda a, k: (a[0].sigmoid(),),
    ("", "Cast"): lambda a, k: (_cast(a[0], k),),
    ("", "ReduceMean"): lambda a, k: (a[0].mean(tuple(int(i) for i in a[1]), keepdim=bool(k.get("keepdims", 1))),),
    ("", "Shape"): lambda a, k: (_shape(a[0], k),),
    ("", "Unsqueeze"): lambda a, k: (a[0].unsqueeze(int(a[1])),),
    ("", "Concat"): lambda a, k: (torch.cat(list(a), dim=k["axis"]),),
    ("", "Reshape"): lambda a, k: (_reshape(a[0], a[1], k.get("allowzero", 0)),),
    ("", "Gather"): lambda a, k: (a[0].index_select(k.get("axis", 0), a[1]),),
    ("", "Transpose"): lambda a, k: (a[0].permute(list(k["perm"])),),
    ("", "QuantizeLinear"): lambda a, k: (_quantize(a[0], a[1], k),),
    ("", "DequantizeLinear"): lambda a, k: (_dequantize(a[0], a[1], k),),
    ("", "MatMul"): lambda a, k: (a[0] @ a[1],),
    ("", "Gemm"): lambda a, k: (_gemm(a, k),),
    (DOMAIN, "Int4GroupwiseGemmPluginV2"): lambda a, k: (a[0] @ a[1].t(),),
    (DOMAIN, "QkvConcatPlugin"): lambda a, k: (torch.cat(list(a), dim=-1),),
    (DOMAIN, "AttentionPlugin"): attention,
}
