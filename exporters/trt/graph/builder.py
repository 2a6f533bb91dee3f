"""Collects the nodes and weights of a graph. A node is one line; the name of its output is the value."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporters.trt.graph.external import Stored

# Shapes, axes and scalars stay inside the model file, where shape inference sees them; weights never do.
INLINE_BYTES = 1024


class Graph:
    """float_type: ONNX element type of the activations."""

    def __init__(self, float_type: int) -> None:
        self.float_type = float_type
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.inline: dict[str, onnx.TensorProto] = {}
        self.stored: dict[str, Stored] = {}

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node called after its one output, and return that. What is the same in every layer is made once:
        a second call with the same output adds nothing."""
        node = helper.make_node(kind, inputs, [output], name=output, **attributes)
        assert self.nodes.setdefault(output, node) == node, f"two different nodes called {output}"
        return output

    def split(self, value: str, sizes: list[int], outputs: list[str]) -> list[str]:
        """Cut the last axis into pieces of the given sizes."""
        name = f"{outputs[0]}/split"
        self.nodes[name] = helper.make_node("Split", [value, self.ints(sizes)], outputs, name=name, axis=-1)
        return outputs

    def weight(self, tensor: Stored) -> str:
        """Add a weight; a second one of the same name is the same one."""
        return self.stored.setdefault(tensor.name, tensor).name

    def ints(self, values: list[int] | int) -> str:
        """An int64 constant, a vector or a scalar."""
        text = "_".join(str(v) for v in values) if isinstance(values, list) else f"scalar_{values}"
        return self._constant(f"ints/{text}", np.array(values, dtype=np.int64))

    def scalar(self, value: float, data_type: int | None = None) -> str:
        """A scalar constant in the activations' type, or in `data_type`."""
        dtype = helper.tensor_dtype_to_np_dtype(self.float_type if data_type is None else data_type)
        return self._constant(f"scalar/{dtype}/{value!r}", np.array(value, dtype=dtype))

    def _constant(self, name: str, values: np.ndarray[Any, Any]) -> str:
        assert values.nbytes <= INLINE_BYTES
        if name not in self.inline:
            self.inline[name] = numpy_helper.from_array(values, name)
        return name
