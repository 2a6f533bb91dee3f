"""Comparing the weights in an onnxruntime-genai graph with the artifact's, value by value.

The artifact is read with the second reader's plain unpacking, not with the code that the toolkit packs with.

Shapes: N out_features, K in_features, G groups along K
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError
from compress.formats import Stored, second_reader
from exporters.genai.graph import Graph, attribute, unpack

_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul(NBits)?")
_ROOM = {"attn": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Codes uint8 `[N, K]`, scales float32 `[N, G]`, zero points uint8 `[N, G]`."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def compare_weights(graph: Graph, folder: Stored) -> dict[str, int]:
    """Check that every linear of the artifact's blocks is in the graph, once, with exactly the artifact's values.

    Returns how many layers were compared: `quantized` and `dense`. Raises ArtifactError at the first difference, for a
    layer that the graph lacks, and for a node that belongs to no layer of the artifact.
    """
    checkpoint = folder.checkpoint
    count = {"quantized": 0, "dense": 0}
    seen: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type != "MatMulNBits" and (node.op_type != "MatMul" or not _NODE.fullmatch(node.name)):
            continue
        sources = node_sources(folder, node.name)
        if node.op_type == "MatMulNBits":
            found, wanted = node_weights(graph, node), [artifact_weights(folder, *s) for s in sources]
            for label in ("codes", "scales", "zeros"):
                meant = np.concatenate([getattr(w, label) for w in wanted])
                _same(getattr(found, label), meant, f"{node.name}: its {label}", checkpoint)
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


def node_weights(graph: Graph, node: onnx.NodeProto) -> Packed:
    """What a MatMulNBits node holds. B is `[N, G, block_size / 2]`, low half first; zero points pad each row to a byte.

    Source: the operator's documentation (ONNX Runtime, `docs/ContribOperators.md`, MatMulNBits).
    """
    inputs = node.input
    n, k, block_size = (attribute(node, name) for name in ("N", "K", "block_size"))
    groups = -(-k // block_size)
    codes = unpack(graph.array(inputs[1])).reshape(n, -1)[:, :k]
    scales = graph.array(inputs[2]).astype(np.float32).reshape(n, groups)
    if len(inputs) > 3 and inputs[3]:
        zeros = unpack(graph.array(inputs[3]).reshape(n, -1))[:, :groups]
    else:
        zeros = np.full((n, groups), 8, np.uint8)
    return Packed(codes=codes, scales=scales, zeros=zeros)


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
