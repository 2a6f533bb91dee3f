"""Comparing the weights in an onnxruntime-genai graph with the artifact's, value by value.

The artifact is read with the second reader's plain unpacking, not with the code that the toolkit packs with.

Shapes: N out_features, K in_features, G groups along K
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.formats import Stored, second_reader
from exporters.genai.graph import Graph, attribute, is_identity, unpack
from exporters.genai.head import NODE as HEAD_NODE

_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul(NBits|Integer)?")
_ROOM = {"attn": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Codes uint8 `[N, K]`, scales float32 `[N, G]`, zero points uint8 `[N, G]`."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def compare_weights(graph: Graph, folder: Stored, *, head: bool = False) -> dict[str, int]:
    """Check that every linear of the artifact's blocks is in the graph, once, with exactly the artifact's values.

    head: the output matrix is quantized too, and compared elsewhere (`exporters.genai.head`).
    Returns how many layers were compared: `quantized` and `dense`. Raises ArtifactError at the first difference, for a
    layer that the graph lacks, and for a node that belongs to no layer of the artifact.
    """
    checkpoint = folder.checkpoint
    count = {"quantized": 0, "dense": 0}
    seen: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type not in ("MatMulNBits", "MatMulInteger") and not _is_product(node):
            continue
        if is_identity(node):
            _compare_identity(graph, node)
            continue
        if head and node.name == HEAD_NODE:
            continue
        sources = node_sources(folder, node.name)
        found = node_weights(graph, node)
        if [layer for layer, _ in sources if (layer in folder) != (found is not None)]:
            said = "is not quantized" if found is None else "is quantized"
            raise ArtifactError(
                f"{node.name}: it {said} in the graph, and {sources[0][0]} in {checkpoint.path} the other"
            )
        if found is not None:
            wanted = [artifact_weights(folder, *s) for s in sources]
            for label in ("codes", "scales", "zeros"):
                meant = np.concatenate([getattr(w, label) for w in wanted])
                if label != "codes":  # one scale a row is written once a block
                    meant = meant.repeat(found.scales.shape[1] // meant.shape[1], axis=1)
                _same(getattr(found, label), meant, f"{node.name}: its {label}", checkpoint)
            _compare_inputs(graph, node, folder, [layer for layer, _ in sources])
        else:
            meant = np.concatenate([dense_weight(checkpoint, *s) for s in sources])
            name = node.input[1].removesuffix("/float32")
            _same(graph.array(name).astype(np.float32).T, meant, f"{node.name}: its weight", checkpoint)
        for layer, rows in sources:
            width = _out_features(folder, layer)
            seen[layer] = seen.get(layer, 0) + len(range(*rows.indices(width)))
            if seen[layer] == width:
                count["quantized" if layer in folder else "dense"] += 1
    for layer in block_linears(folder):
        if seen.get(layer, 0) != _out_features(folder, layer):
            raise ArtifactError(
                f"{layer}: {seen.get(layer, 0)} of its {_out_features(folder, layer)} rows are in the graph; "
                "the builder left something out or read it twice"
            )
    return count


def block_linears(folder: Stored) -> list[str]:
    """Names of the linear layers inside the artifact's blocks, sorted."""
    tensors = folder.checkpoint.tensors
    dense = [n.removesuffix(".weight") for n, i in tensors.items() if n.endswith(".weight") and len(i.shape) == 2]
    return sorted(layer for layer in {*folder.layers, *dense} if ".layers." in layer)


def node_sources(folder: Stored, name: str) -> list[tuple[str, slice]]:
    """`source_rows` of a node by its name in the graph, such as `/model/layers.0/attn/q_proj/MatMulNBits`."""
    match = _NODE.fullmatch(name)
    if match is None:
        raise ArtifactError(
            f"{name}: quantized in the graph, but no such layer is in the blocks of {folder.checkpoint.path}"
        )
    return source_rows(folder, *match.groups()[:3])


def source_rows(folder: Stored, block: str, room: str, part: str) -> list[tuple[str, slice]]:
    """The artifact's layers, and which rows of each, that make the node `part` of a block, in order of rows."""
    prefix = f"model.layers.{block}.{_ROOM[room]}"
    everything = slice(None)
    members = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(part)
    if members and not _has(folder, f"{prefix}.{part}"):
        return [(f"{prefix}.{name}", everything) for name in members]
    fused = f"{prefix}.gate_up_proj"
    if part in ("gate_proj", "up_proj") and _has(folder, fused):
        half = _out_features(folder, fused) // 2
        return [(fused, slice(0, half) if part == "gate_proj" else slice(half, None))]
    if not _has(folder, f"{prefix}.{part}"):
        raise ArtifactError(f"{prefix}.{part}: the builder's graph has it, but {folder.checkpoint.path} does not")
    return [(f"{prefix}.{part}", everything)]


def _is_product(node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMul" and _NODE.fullmatch(node.name) is not None


def block_products(graph: Graph) -> Iterator[onnx.NodeProto]:
    """The products of the blocks' linears that are not quantized."""
    return (node for node in graph.nodes if _is_product(node))


def node_weights(graph: Graph, node: onnx.NodeProto) -> Packed | None:
    """What a product of quantized weights holds; None for one of plain weights.

    Of MatMulNBits, B is `[N, G, block_size * bits / 8]`, of 4 bits the low half first; zero points pad each row to a
    byte, and none are the middle code. Source: ONNX Runtime, `docs/ContribOperators.md`.
    """
    if node.op_type == "MatMulInteger":
        return _integer_weights(graph, node)
    if node.op_type == "MatMul":
        return _widened_weights(graph, node)
    inputs = node.input
    n, k, block_size, bits = (attribute(node, name) for name in ("N", "K", "block_size", "bits"))
    groups = -(-k // block_size)
    packed = graph.array(inputs[1])
    codes = (unpack(packed) if bits == 4 else packed).reshape(n, -1)[:, :k]
    scales = graph.array(inputs[2]).astype(np.float32).reshape(n, groups)
    if len(inputs) > 3 and inputs[3]:
        stored = graph.array(inputs[3]).reshape(n, -1)
        zeros = (unpack(stored) if bits == 4 else stored)[:, :groups]
    else:
        zeros = np.full((n, groups), 1 << (bits - 1), np.uint8)
    return Packed(codes=codes, scales=scales, zeros=zeros)


def _integer_weights(graph: Graph, node: onnx.NodeProto) -> Packed:
    """Of MatMulInteger, the scale is what its sums are multiplied with; what is taken off them must be their own."""
    codes = graph.array(node.input[1]).T
    value, scale = node.output[0], None
    while scale is None:
        user = next(n for n in graph.nodes if value in n.input)
        if user.op_type == "Sub":
            rows = next(n for n in graph.nodes if n.output[0] == user.input[1]).input[1]
            wanted = (codes.astype(np.int64) - 128).sum(axis=1)
            if not np.array_equal(graph.array(rows), wanted):
                raise ArtifactError(f"{node.name}: what zero points take off its sums is not the sum of its weights")
        elif user.op_type == "Mul":
            scale = graph.array(user.input[1])
        value = user.output[0]
    zero = _constant(graph, node.input[3])
    return Packed(codes=codes, scales=scale.reshape(-1, 1), zeros=np.full((len(codes), 1), zero, np.uint8))


def _widened_weights(graph: Graph, node: onnx.NodeProto) -> Packed | None:
    """Of a product whose weight is `(Cast(codes) - middle) * scale`, in groups `[G, K / G, N]`."""
    maker = {n.output[0]: n for n in graph.nodes}
    reshape = maker.get(node.input[1])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    product = maker[reshape.input[0]]
    steps = maker[product.input[0]]
    codes_GgN = graph.array(maker[steps.input[0]].input[0])
    scales_G1N = graph.array(product.input[1])
    scales = scales_G1N[:, 0].T
    zeros = np.full(scales.shape, _constant(graph, steps.input[1]), np.uint8)
    return Packed(codes=codes_GgN.reshape(-1, codes_GgN.shape[2]).T, scales=scales, zeros=zeros)


def _compare_identity(graph: Graph, node: onnx.NodeProto) -> None:
    """ArtifactError unless a product that shows what a kernel keeps of its input multiplies by 1."""
    found = node_weights(graph, node)
    assert found is not None
    wanted = np.eye(len(found.codes), dtype=np.uint8)
    if not np.array_equal(found.codes, wanted) or (found.scales != 1).any() or found.zeros.any():
        raise ArtifactError(f"{node.name}: it does not multiply by 1, so inputs lose bits; export it again")


def _compare_inputs(graph: Graph, node: onnx.NodeProto, folder: Stored, layers: Sequence[str]) -> None:
    """Inputs are quantized exactly where the artifact does it, and with its range where it has one."""
    maker = {n.output[0]: n for n in graph.nodes}
    for layer in layers:
        scheme = folder.scheme(layer).input
        if (scheme is not None) != (node.op_type == "MatMulInteger"):
            raise ArtifactError(
                f"{node.name}: the inputs of {layer} are quantized in the graph or in the artifact only"
            )
        if scheme is None:
            continue
        quantizer = maker[node.input[0]]
        if (quantizer.op_type == "QuantizeLinear") == scheme.dynamic:
            raise ArtifactError(
                f"{node.name}: the inputs of {layer} have one range in the graph or in the artifact only"
            )
        if not scheme.dynamic:
            again = folder.read_again(layer)
            found = [_constant(graph, name) for name in quantizer.input[1:]] + [_constant(graph, node.input[2])]
            zero = int(again["input_zero_point"][1].reshape(-1)[0])
            wanted = [float(second_reader.as_float32(again["input_scale"]).reshape(-1)[0]), zero, zero]
            if found != wanted:
                raise ArtifactError(
                    f"{node.name}: its inputs are quantized with {found}, those of {layer} with {wanted}"
                )


def _constant(graph: Graph, name: str) -> float | int:
    """The value of a scalar constant."""
    node = next(n for n in graph.nodes if n.op_type == "Constant" and n.output[0] == name)
    value: float | int = onnx.numpy_helper.to_array(attribute(node, "value")).item()
    return value


def artifact_weights(folder: Stored, layer: str, rows: slice) -> Packed:
    """Rows of a quantized layer."""
    again = folder.read_again(layer)
    scales = second_reader.as_float32(again["scales"])
    return Packed(codes=again["codes"][1][rows], scales=scales[rows], zeros=again["zero_points"][1][rows])


def dense_weight(checkpoint: Checkpoint, layer: str, rows: slice) -> np.ndarray:
    """Rows of a dense layer, float32 `[N, K]`."""
    weight: np.ndarray = checkpoint.tensor(f"{layer}.weight").to(torch.float32).numpy()
    return weight[rows]


def _has(folder: Stored, layer: str) -> bool:
    return layer in folder or f"{layer}.weight" in folder.checkpoint


def _out_features(folder: Stored, layer: str) -> int:
    return folder.shape(layer)[0] if layer in folder else folder.checkpoint.info(f"{layer}.weight").shape[0]


def _same(found: np.ndarray, meant: np.ndarray, what: str, checkpoint: Checkpoint) -> None:
    if found.shape != meant.shape:
        raise ArtifactError(f"{what} have shape {found.shape}, those of {checkpoint.path} {meant.shape}")
    if not np.array_equal(found, meant):
        different = int((found != meant).sum())
        raise ArtifactError(
            f"{what} differ from those of {checkpoint.path} in {different} of {meant.size} places; "
            "the builder changed the weights and the export was not kept"
        )
