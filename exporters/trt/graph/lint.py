"""What a graph for TensorRT must look like, read from the written files by code that shares nothing with the writer.

A reader of ONNX may skip a tensor, assume a zero point or clip a code without a word; ONNX Runtime executes things that
TensorRT refuses. So every rule is checked on the file itself, and every quantized weight of the artifact is compared,
code by code and scale by scale, with what the graph dequantizes and multiplies by.

Shapes: K in_features, N out_features, G groups along K
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.formats import Stored, stored
from compress.formats.second_reader import as_float32
from exporters.trt.graph.decoder import GATE_UP, QKV
from exporters.trt.graph.external import packed_bytes, place, read_bytes

INT4, INT8 = onnx.TensorProto.INT4, onnx.TensorProto.INT8
# Larger than any shape, axis list or scalar of the graph; smaller than any weight.
MAX_INLINE_BYTES = 1024

# Linears that the graph may hold as one product, in the order of its columns (`decoder.siblings`).
SIBLINGS = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}
# Operators of each dialect. The first set is in the table of onnx-tensorrt 10.1 (docs/operators.md) with the types used
# here; the rest came with 10.14 and 10.15.
BASIC = frozenset(
    (
        "Add And Cast Concat DequantizeLinear Div Expand Gather Gelu Gemm Greater LessOrEqual MatMul Mul "
        "QuantizeLinear Range ReduceMean Reshape ScatterND Shape Sigmoid Softmax Split Sqrt Squeeze Sub Tanh Tile "
        "Transpose Unsqueeze Where"
    ).split()
)
OPERATORS = {21: BASIC, 24: BASIC | {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}}


def lint(path: Path, artifact: Path, opset: int) -> dict[str, int]:
    """Check a written graph file against its dialect and its artifact; returns counts for the manifest.

    Raises ArtifactError naming the first thing that is wrong.
    """
    model = onnx.load(str(path), load_external_data=False)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ArtifactError(f"{path}: not valid ONNX ({' '.join(str(e).split())[:300]})") from e
    tensors = {t.name: t for t in model.graph.initializer}
    _check_dialect(path, model, opset)
    _check_data(path, model)
    _check_use(path, model)
    _check_caches(path, model, opset)
    _check_attention(path, model)
    _check_siblings(path, model)
    compared = 0
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    rounded = {n.output[0] for n in quantizers}
    found = {n.input[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in rounded}
    for node in found.values():
        _check_dequantize(path, node, model, tensors)
    for node in quantizers:
        _check_quantize(path, node, model, tensors)
    covered: dict[str, int] = {}
    folder = stored(Checkpoint.open(artifact))
    widths = {layer: folder.shape(layer)[0] for layer in folder.layers}
    for layer, codes_KN, scales_GN in quantized_layers(artifact):
        _compare(path, layer, codes_KN, scales_GN, found, tensors, widths, covered)
        _compare_input(path, folder, layer, found, model, tensors, widths)
        compared += 1
    for name in found:
        width = tensors[name].dims[1]
        if covered.get(name) != width:
            raise ArtifactError(
                f"{path}: {name} has {width} columns, but the artifact's quantized layers fill {covered.get(name, 0)}"
            )
    return {"nodes": len(model.graph.node), "quantized_layers_compared": compared}


def quantized_layers(artifact: Path) -> Iterator[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Name, codes as signed values `[K, N]` and scales `[G, N]`, float32, of each quantized layer of a folder."""
    folder = stored(Checkpoint.open(artifact))
    for layer in folder.layers:
        again, weight = folder.read_again(layer), folder.scheme(layer).weight
        assert weight is not None
        middle = 1 << (weight.num_bits - 1)
        if (again["zero_points"][1] != middle).any():
            raise ArtifactError(
                f"{artifact}: {layer} has a zero point that is not {middle}, which TensorRT's integers cannot hold"
            )
        yield layer, (again["codes"][1].T.astype(np.int16) - middle).astype(np.int8), as_float32(again["scales"]).T


def products(path: Path) -> dict[int, list[str]]:
    """Names of the MatMul nodes whose weight the graph dequantizes, in the graph's order, by its bits: 4 and 8."""
    model = onnx.load(str(path), load_external_data=False)
    types = {t.name: t.data_type for t in model.graph.initializer}
    bits = {INT4: 4, INT8: 8}
    dequantized = {
        n.output[0]: bits[types[n.input[0]]]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in types
    }
    found: dict[int, list[str]] = {4: [], 8: []}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in dequantized:
            found[dequantized[node.input[1]]].append(node.name)
    return found


def _check_dialect(path: Path, model: onnx.ModelProto, opset: int) -> None:
    declared = [(i.domain, i.version) for i in model.opset_import]
    if declared != [("", opset)]:
        raise ArtifactError(
            f"{path}: declares opsets {declared}; this dialect is [('', {opset})], without other domains"
        )
    if model.functions:
        raise ArtifactError(f"{path}: holds {len(model.functions)} local functions; this dialect has none")
    for node in model.graph.node:
        if node.domain or node.op_type not in OPERATORS[opset]:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise ArtifactError(f"{path}: node {node.name} is {name}, which is not in the dialect of opset {opset}")


def _check_data(path: Path, model: onnx.ModelProto) -> None:
    """Weights lie outside, inside their file, at their full length and not on top of each other."""
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in model.graph.initializer:
        where = place(tensor)
        size = packed_bytes(tensor.data_type, tensor.dims)
        if where is None:
            if size > MAX_INLINE_BYTES or len(tensor.raw_data) != size:
                raise ArtifactError(f"{path}: {tensor.name} ({size} bytes) is inside the model file, not beside it")
            continue
        if Path(where.location).name != where.location:
            raise ArtifactError(f"{path}: {tensor.name} points at {where.location!r}, outside the folder")
        if where.length != size:
            raise ArtifactError(f"{path}: {tensor.name} is {where.length} bytes, {list(tensor.dims)} needs {size}")
        spans.setdefault(where.location, []).append((where.offset, where.offset + size, tensor.name))
    for location, members in spans.items():
        file = path.parent / location
        size = file.stat().st_size if file.is_file() else 0
        end, previous = 0, ""
        for start, stop, name in sorted(members):
            if stop > size:
                raise ArtifactError(f"{path}: {name} ends at byte {stop} of {location}, which has {size}")
            if start < end:
                raise ArtifactError(f"{path}: {name} and {previous} share bytes of {location}")
            end, previous = stop, name


def _check_use(path: Path, model: onnx.ModelProto) -> None:
    """Every weight, input and node leads to an output."""
    needed = {o.name for o in model.graph.output}
    for node in reversed(model.graph.node):
        if not needed & set(node.output):
            raise ArtifactError(f"{path}: node {node.name} leads to no output")
        needed.update(node.input)
    for value in [*model.graph.initializer, *model.graph.input]:
        if value.name not in needed:
            raise ArtifactError(f"{path}: {value.name} is not used by any node")


def _check_caches(path: Path, model: onnx.ModelProto, opset: int) -> None:
    """A cache is an input of static length whose update is an output (TensorRT: KVCacheUpdate)."""
    inputs = {i.name: i for i in model.graph.input}
    outputs = {o.name for o in model.graph.output}
    makers = {name: node for node in model.graph.node for name in node.output}
    for name, value in inputs.items():
        if not name.startswith("past_key_values."):
            continue
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 4 or not all(d.dim_value for d in dims[1:]):
            raise ArtifactError(f"{path}: {name} must be [batch, heads, capacity, size] with all but batch static")
        present = name.replace("past_key_values.", "present.")
        maker = makers.get(present)
        wanted = "TensorScatter" if opset >= 24 else "ScatterND"
        if present not in outputs or maker is None or maker.op_type != wanted or maker.input[0] != name:
            raise ArtifactError(f"{path}: output {present} must be the {wanted} of {name}")


def _check_attention(path: Path, model: onnx.ModelProto) -> None:
    """Attention as TensorRT takes it (operator page Attention; its parser since 10.14): Q, K, V and a mask, no more.

    A causal flag would be read from the upper left corner, which is wrong for every call but the first.
    """
    for node in model.graph.node:
        if node.op_type != "Attention":
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if len(node.output) != 1 or len(node.input) != 4 or attributes != {"scale": 1.0, "is_causal": 0}:
            raise ArtifactError(
                f"{path}: {node.name} has {len(node.input)} inputs, {len(node.output)} outputs and {attributes}; "
                "TensorRT needs queries, keys, values, a mask and one output, with scale 1.0 and is_causal 0"
            )


def _check_siblings(path: Path, model: onnx.ModelProto) -> None:
    """A product that several linears share is cut into them in the order of its columns."""
    for node in model.graph.node:
        parent, _, together = node.input[0].rpartition(".") if node.op_type == "Split" else ("", "", "")
        wanted = [f"{parent}.{member}" for member in SIBLINGS.get(together, ())]
        if set(wanted) & set(node.output) and list(node.output) != wanted:
            raise ArtifactError(
                f"{path}: {node.name} gives {', '.join(node.output)}; its columns are {', '.join(wanted)}"
            )


def _check_dequantize(
    path: Path, node: onnx.NodeProto, model: onnx.ModelProto, tensors: dict[str, onnx.TensorProto]
) -> None:
    """Integers as TensorRT takes them, without zero point: INT4 in blocks along the axis that the product sums over,
    INT8 with a scale for each of its columns."""
    if len(node.input) != 2:
        raise ArtifactError(
            f"{path}: {node.name} has a zero point input; TensorRT's weights are symmetric, leave it out"
        )
    codes, scales = (tensors.get(name) for name in node.input)
    if codes is None or scales is None or codes.data_type not in (INT4, INT8):
        raise ArtifactError(f"{path}: {node.name} must dequantize a constant INT4 or INT8 weight with constant scales")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    axis, block_size = attributes.get("axis", 1), attributes.get("block_size", 0)
    in_features, out_features = codes.dims
    if codes.data_type == INT8:
        if axis != 1 or block_size or list(scales.dims) != [out_features]:
            raise ArtifactError(
                f"{path}: {node.name} has axis {axis}, block_size {block_size} and scales {list(scales.dims)} for INT8 "
                f"codes {list(codes.dims)}; each column along axis 1 has one scale"
            )
    elif axis != 0 or not block_size or list(scales.dims) != [in_features // block_size, out_features]:
        raise ArtifactError(
            f"{path}: {node.name} has axis {axis}, block_size {block_size} and scales {list(scales.dims)} for codes "
            f"{list(codes.dims)}; blocks must lie along axis 0"
        )
    users = [n for n in model.graph.node if node.output[0] in n.input]
    if [u.op_type for u in users] != ["MatMul"] or users[0].input[1] != node.output[0]:
        raise ArtifactError(f"{path}: {node.name} must feed the second input of one MatMul, so that the two are fused")
    layer = codes.name.removesuffix(".weight.codes")
    if users[0].name not in (layer, f"{layer}/product"):
        raise ArtifactError(
            f"{path}: the weight of {layer} is multiplied by in {users[0].name}; each belongs to its own layer"
        )


def _check_quantize(
    path: Path, node: onnx.NodeProto, model: onnx.ModelProto, tensors: dict[str, onnx.TensorProto]
) -> None:
    """Inputs as TensorRT takes them: one scale, a zero point of 0, and straight back, into first inputs of products."""
    scale, zero = (tensors.get(name) for name in node.input[1:])
    if scale is None or zero is None or list(scale.dims) or zero.data_type != INT8 or onnx.numpy_helper.to_array(zero):
        raise ArtifactError(f"{path}: {node.name} must quantize to INT8 with one constant scale and a zero point of 0")
    back = [n for n in model.graph.node if node.output[0] in n.input]
    if [n.op_type for n in back] != ["DequantizeLinear"] or list(back[0].input[1:]) != list(node.input[1:]):
        raise ArtifactError(f"{path}: what {node.name} gives must be dequantized once, with the same scale")
    users = [n for n in model.graph.node if back[0].output[0] in n.input]
    if not users or any(n.op_type != "MatMul" or n.input[0] != back[0].output[0] for n in users):
        raise ArtifactError(f"{path}: what {node.name} rounds must be the first input of MatMul nodes and nothing else")


def _compare_input(
    path: Path,
    folder: Stored,
    layer: str,
    found: dict[str, onnx.NodeProto],
    model: onnx.ModelProto,
    tensors: dict[str, onnx.TensorProto],
    widths: Mapping[str, int],
) -> None:
    """A layer's product takes its inputs rounded with the artifact's step, or as they are where that has none."""
    name, _ = _place(layer, found, widths)
    assert name is not None
    product = next(n for n in model.graph.node if found[name].output[0] in n.input)
    makers = {n.output[0]: n for n in model.graph.node}
    back = makers.get(product.input[0])
    step = None
    if back is not None and back.op_type == "DequantizeLinear":
        step = float(onnx.numpy_helper.to_array(tensors[back.input[1]]))
    again = folder.read_again(layer) if folder.scheme(layer).input is not None else {}
    wanted = float(as_float32(again["input_scale"]).reshape(-1)[0]) if again else None
    if step != wanted:
        raise ArtifactError(
            f"{path}: the inputs of {layer} are rounded with a step of {step}, those of the artifact with {wanted}"
        )


def _compare(
    path: Path,
    layer: str,
    codes_KN: np.ndarray[Any, Any],
    scales_GN: np.ndarray[Any, Any],
    found: dict[str, onnx.NodeProto],
    tensors: dict[str, onnx.TensorProto],
    widths: Mapping[str, int],
    covered: dict[str, int],
) -> None:
    """A layer's codes and scales are in the graph: alone, or as columns of the product that it shares (`siblings`).

    covered: how many columns of each weight have been compared; filled here.
    """
    name, first = _place(layer, found, widths)
    if name is None:
        raise ArtifactError(f"{path}: the artifact's quantized layer {layer} is not in the graph")
    codes, scales = (tensors[n] for n in found[name].input)
    columns = slice(first, first + codes_KN.shape[1])
    covered[name] = covered.get(name, 0) + codes_KN.shape[1]
    data, dims = read_bytes(path.parent, codes), tuple(codes.dims)
    written = unpack_int4(data, dims) if codes.data_type == INT4 else np.frombuffer(data, np.int8).reshape(dims)
    written = written[:, columns]
    if written.shape != codes_KN.shape or (written != codes_KN).any():
        raise ArtifactError(f"{path}: the codes of {layer} are not the artifact's")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(scales.data_type)
    values = np.frombuffer(read_bytes(path.parent, scales), dtype).reshape(-1, codes.dims[1])[:, columns]
    scales_GN = scales_GN.astype(dtype)
    if values.shape != scales_GN.shape or (values != scales_GN).any() or not (values > 0).all():
        raise ArtifactError(f"{path}: the scales of {layer} are not the artifact's, or not positive")


def _place(layer: str, found: Iterable[str], widths: Mapping[str, int]) -> tuple[str | None, int]:
    """The weight that holds a layer, and its first column there."""
    names = {name.removesuffix(".weight.codes"): name for name in found}
    own = next((name for stem, name in names.items() if stem.endswith(layer)), None)
    if own is not None:
        return own, 0
    parent, _, leaf = layer.rpartition(".")
    for together, members in SIBLINGS.items():
        name = next((n for stem, n in names.items() if stem.endswith(f"{parent}.{together}")), None)
        if leaf in members and name is not None:
            before = members[: members.index(leaf)]
            return name, sum(widths[f"{parent}.{member}"] for member in before)
    return None, 0


def unpack_int4(data: bytes, dims: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """ONNX INT4 into int8: the first of two values in the low nibble, two's complement."""
    packed = np.frombuffer(data, np.uint8)
    nibbles = np.stack([packed % 16, packed // 16], axis=-1).reshape(-1)[: int(np.prod(dims))].astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).reshape(dims)
