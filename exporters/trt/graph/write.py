"""A model folder into `model.onnx` and `model.onnx.data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from compress.model import StreamedModel
from exporters.trt.graph import architecture, decoder
from exporters.trt.graph.external import DataFile
from exporters.trt.graph.weights import Weights

GRAPH = "model.onnx"
DATA = "model.onnx.data"


def write_graph(
    artifact: Path,
    folder: Path,
    *,
    opset: int,
    capacity: int,
    float_type: int = onnx.TensorProto.FLOAT16,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write both files into `folder`; returns bytes by part. One tensor, or slice of one, is in memory at a time.

    float_type FLOAT gives the same graph in float32, to compare with the artifact exactly. on_bytes gets
    the bytes written and their total after every tensor. Raises UnsupportedError for a model that the graph cannot
    express, and ArtifactError for weights that do not fit their config or float16.
    """
    model = StreamedModel.open(artifact)
    arch = architecture.read(model)
    graph, proto = decoder.build(arch, Weights(model, float_type), opset=opset, capacity=capacity)
    parts: dict[str, int] = {}
    total = sum(tensor.num_bytes for tensor in graph.stored.values())
    with DataFile(folder / DATA) as data:
        for tensor in graph.stored.values():
            proto.graph.initializer.append(data.append(tensor))
            parts[tensor.part] = parts.get(tensor.part, 0) + tensor.num_bytes
            on_bytes(sum(parts.values()), total)
    onnx.save_model(proto, str(folder / GRAPH))
    return parts
