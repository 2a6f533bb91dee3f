"""What TensorRT Edge-LLM's exporter wrote, compared with the artifact: every code, scale and float16 value.

Shapes: N out_features, K in_features, G groups along K, V vocabulary, H hidden size
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.files import read_json
from compress.formats import compressed_tensors, stored
from exporters.edge.folder import GROUP_SIZE, Handed, expected_dense, expected_int4, rope_of
from exporters.edge.graph import PAGE_TOKENS, Graph, attributes
from exporters.edge.int8 import expected as expected_int8
from exporters.edge.layout import unpack_fragments
from exporters.edge.split import head_dim

INT4 = "Int4GroupwiseGemmPluginV2"
ATTENTION = "AttentionPlugin"
_PREFIX = "_model."
_INPUTS = (
    "inputs_embeds", "rope_rotary_cos_sin", "positions", "query_start_offsets", "query_lengths", "past_lengths",
    "attention_sequence_lengths", "state_indices", "execution_phase_marker", "context_sequence_count_carrier",
    "kv_page_table", "logits_indices",
)  # fmt: skip
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_COUNTS = re.compile(r"Loaded (\d+) tensors, skipped (\d+) from")


def check_log(lines: Iterable[str], handed: Handed) -> tuple[int, int]:
    """(loaded, skipped) as the exporter counted. ArtifactError unless it loaded everything that it was given.

    It ends with code 0 whatever it skips, so this line is the only word about it.
    """
    found = [(int(m[1]), int(m[2])) for line in lines if (m := _COUNTS.search(line))]
    if not found:
        raise ArtifactError("TensorRT Edge-LLM's exporter did not say how many tensors it loaded; its version differs")
    loaded, skipped = found[-1]
    if loaded != handed.tensors or skipped != handed.ignorable:
        raise ArtifactError(
            f"TensorRT Edge-LLM's exporter loaded {loaded} tensors and skipped {skipped}, but {handed.tensors} and "
            f"{handed.ignorable} were due; the export is wrong and was not kept"
        )
    return loaded, skipped


def check_weights(checkpoint: Checkpoint, folder: Path) -> dict[str, int]:
    """Compare every weight of the artifact with what `folder` (model.onnx, embedding.safetensors) holds.

    Returns how many INT4 and INT8 layers, codes, scales and float16 tensors were equal. Raises ArtifactError at the
    first that is not, that is missing, or that nobody asked for.
    """
    graph = Graph(folder)
    products = {n.input[1]: n for n in graph.nodes if n.op_type == INT4}
    norms = _head_norms(graph)
    counts = {"int4_layers": 0, "int8_layers": 0, "codes": 0, "scales": 0, "float16_tensors": 0}
    seen: set[str] = set()
    for name, wanted in expected_int4(checkpoint):
        weight, scales = f"{_PREFIX}{name}.qweight", f"{_PREFIX}{name}.scales"
        node = products.get(weight)
        if node is None or node.input[2] != scales:
            raise _wrong(folder, name, "is not an INT4 product of the graph")
        n, k = wanted.codes_OI.shape
        stated = attributes(node)
        if (stated["gemm_n"], stated["gemm_k"], stated["group_size"]) != (n, k, GROUP_SIZE):
            raise _wrong(folder, name, f"is {stated}, but {n} x {k} in groups of {GROUP_SIZE} was due")
        if bool((wanted.zero_point_OG != 8).any()):
            raise _wrong(folder, name, "has zero points other than 8 in the artifact, which this format cannot hold")
        _equal(folder, f"{name} codes", unpack_fragments(graph.constant(weight), n, k), wanted.codes_OI)
        _equal(folder, f"{name} scales", graph.constant(scales).t(), wanted.scale_OG)
        seen |= {weight, scales}
        counts["int4_layers"] += 1
        counts["codes"] += n * k
        counts["scales"] += wanted.scale_OG.numel()
    extra = sorted(set(products) - seen)
    if extra:
        raise _wrong(folder, extra[0].removeprefix(_PREFIX), "is quantized, though the artifact's is not")
    _check_int8(graph, checkpoint, counts)
    for name, value in expected_dense(checkpoint):
        _equal(folder, name, _dense(graph, folder, name, norms, value), value)
        counts["float16_tensors"] += 1
    return counts


def _check_int8(graph: Graph, checkpoint: Checkpoint, counts: dict[str, int]) -> None:
    """Follow each INT8 weight to its product and from there to its inputs; every number must be the artifact's."""
    makers = {name: node for node in graph.nodes for name in node.output}
    weights = {
        n.input[0]: n for n in graph.nodes if n.op_type == "DequantizeLinear" and n.input[0] in graph.initializers
    }
    layers = expected_int8(checkpoint) if stored(checkpoint).format is compressed_tensors else ()
    for layer, wanted in layers:
        back = weights.pop(f"{_PREFIX}{layer}.weight", None)
        if back is None or attributes(back).get("axis") != 0:
            raise _wrong(graph.folder, layer, "is not an INT8 weight of the graph with a scale a row")
        value, seen = back.output[0], [back.op_type]
        while seen[-1] != "MatMul":
            (user,) = (n for n in graph.nodes if value in n.input)
            seen.append(user.op_type)
            if seen != ["DequantizeLinear", "Cast", "Transpose", "MatMul"][: len(seen)]:
                raise _wrong(graph.folder, layer, f"goes through {seen} instead of into a product")
            value, product = user.output[0], user
        inputs = [makers[product.input[0]]]
        while len(inputs) < 4:
            inputs.append(makers[inputs[-1].input[0]])
        if [n.op_type for n in inputs] != ["Cast", "DequantizeLinear", "QuantizeLinear", "Mul"]:
            raise _wrong(graph.folder, layer, f"gets its inputs through {[n.op_type for n in inputs]}")
        if inputs[1].input[1] != inputs[2].input[1]:
            raise _wrong(graph.folder, layer, "has its inputs dequantized with another scale than they were quantized")
        found = {
            "weight": back.input[0],
            "weight_scale": back.input[1],
            "input_scale": inputs[2].input[1],
            "pre_quant_scale": inputs[3].input[1],
        }
        for leaf, name in found.items():
            _equal(graph.folder, f"{layer} {leaf}", graph.constant(name), wanted[leaf])
        counts["int8_layers"] += 1
        counts["codes"] += wanted["weight"].numel()
        counts["scales"] += wanted["weight_scale"].numel() + 1
    if weights:
        raise _wrong(graph.folder, next(iter(weights)).removeprefix(_PREFIX), "is INT8, though the artifact's is not")


def check_structure(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Compare inputs, outputs, layers and config.json with the artifact's config; returns what was found."""
    graph, config, written = Graph(folder), checkpoint.config, read_json(folder / "config.json")
    layers, vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
    due = [*_INPUTS, *(f"past_key_values_{i}" for i in range(layers))]
    if sorted(graph.inputs) != sorted(due):
        raise _wrong(folder, "model.onnx", f"has inputs {sorted(set(graph.inputs) ^ set(due))} too many or too few")
    outputs = ["logits", *(f"present_key_values_{i}" for i in range(layers))]
    if sorted(graph.outputs) != sorted(outputs):
        raise _wrong(folder, "model.onnx", f"has outputs {sorted(set(graph.outputs) ^ set(outputs))} too many or few")
    heads = (int(config["num_attention_heads"]), int(config["num_key_value_heads"]), head_dim(config))
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.model.graph.input}
    for i in range(layers):
        if shapes[f"past_key_values_{i}"][2:] != [PAGE_TOKENS, heads[1], heads[2]]:
            raise _wrong(folder, f"past_key_values_{i}", f"has shape {shapes[f'past_key_values_{i}']}, not {heads}")
    attention = [attributes(n) for n in graph.nodes if n.op_type == ATTENTION]
    found = {(a["num_q_heads"], a["num_kv_heads"], a["head_size"]) for a in attention}
    if len(attention) != layers or found != {heads}:
        raise _wrong(folder, "model.onnx", f"has {len(attention)} attentions {sorted(found)}, not {layers} of {heads}")
    stated = {"vocab_size": vocab, "num_hidden_layers": layers, "hidden_size": config["hidden_size"]}
    stated |= {"num_key_value_heads": heads[1], "head_dim": heads[2], "rope_theta": rope_of(config)["rope_theta"]}
    stated |= {name: config[name] for name in ("max_position_embeddings", "rms_norm_eps")}
    for name, value in stated.items():
        if written.get(name) != value:
            raise _wrong(folder, "config.json", f"says {name} = {written.get(name)}, the artifact {value}")
    rope, wanted = written.get("rope_scaling") or {}, rope_of(config)
    for name in ("rope_type", *_LLAMA3) if wanted["rope_type"] == "llama3" else ("rope_type",):
        if rope.get(name, "default") != wanted[name]:
            raise _wrong(folder, "config.json", f"says {name} = {rope.get(name)}, the artifact {wanted[name]}")
    opsets = {o.domain or "ai.onnx": int(o.version) for o in graph.model.opset_import}
    return {"layers": layers, "opset": opsets, "inputs": len(graph.inputs), "outputs": len(graph.outputs)}


def _head_norms(graph: Graph) -> Mapping[str, str]:
    """Qwen3's norms of query and key heads by the artifact's name: they are inputs 6 and 7 of a layer's attention."""
    out = {}
    for node in graph.nodes:
        if node.op_type == ATTENTION and attributes(node).get("enable_qk_norm"):
            layer = node.input[1].removeprefix("past_key_values_")
            for which, name in zip("qk", node.input[6:8], strict=True):
                out[f"model.layers.{layer}.self_attn.{which}_norm.weight"] = name
    return out


def _dense(graph: Graph, folder: Path, name: str, norms: Mapping[str, str], like: Tensor) -> Tensor:
    """The tensor that the export holds for the artifact's `name`."""
    if name == "model.embed_tokens.weight":
        with safe_open(folder / "embedding.safetensors", framework="pt") as file:
            value: Tensor = file.get_tensor("embedding")
        return value
    inside = norms.get(name, _PREFIX + name)
    if inside in graph.initializers:
        return graph.constant(inside)
    for other, proto in graph.initializers.items():
        dims = tuple(proto.dims)
        if dims == tuple(like.shape):  # equal tensors are stored once, under one of their names
            if torch.equal(graph.first_row(other), like if like.ndim == 1 else like[0]):
                found = graph.constant(other)
                if torch.equal(found, like):
                    return found
        if like.ndim == 2 and len(dims) == 2 and dims[0] == like.shape[1] and dims[1] >= like.shape[0]:
            for start in _starts(graph.first_row(other), like[:, 0]):
                found = graph.constant(other)[:, start : start + len(like)].t()
                if torch.equal(found, like):
                    return found
    raise _wrong(folder, name, "is missing")


def _starts(row_M: Tensor, wanted_N: Tensor) -> list[int]:
    """Where `wanted_N` lies in `row_M`.

    Unquantized projections of one input are stored transposed and side by side (query, key and value), without a name:
    one row tells which columns they could be before anything large is read.
    """
    n = len(wanted_N)
    starts = (row_M[: len(row_M) - n + 1] == wanted_N[0]).nonzero().flatten().tolist()
    return [start for start in starts if torch.equal(row_M[start : start + n], wanted_N)]


def _equal(folder: Path, name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise _wrong(folder, name, f"has shape {tuple(found.shape)}, the artifact's is {tuple(wanted.shape)}")
    if not torch.equal(found, wanted):
        different = int((found != wanted).sum())
        raise _wrong(folder, name, f"differs from the artifact in {different} of {wanted.numel()} values")


def _wrong(folder: Path, name: str, what: str) -> ArtifactError:
    return ArtifactError(f"{folder.name}/model.onnx: {name} {what}; the export is wrong and was not kept")
