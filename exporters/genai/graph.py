"""Rewriting the builder's graph for its place on a CPU: weights stored as the artifact has them, nothing repeated.

    embedding    Gather(table in float16 or bfloat16) -> Cast: rows are widened as they are read
    lm_head      FusedMatMul(x, Cast(weight [V, H]), transB): ONNX Runtime widens the weight once, at load
    linears      the same Cast before a dense MatMul whose float32 values are those of the artifact's float16
    attention    each layer's sliding window as the config has it
    cache        the size of a head is in its shape, so that a reader can make an empty past
    logits       from the position on that the input `logits_from` says; it has a value, 0, so nobody needs to give it
    norms, scale Gemma's `1 + weight` and embedding scale in float32, where the builder rounds them
    MatMulNBits  gate_proj and up_proj in one, followed by a Split
                 optionally fed with its input in two parts, which carry 15 bits through the int8 kernel
                 without zero points where all are 8, which is what their absence means

A tied lm_head is stored once. Every widening is exact, and the folded session computes what the builder's would.

Shapes: V vocabulary, H hidden size, K in_features, N out_features
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from compress.errors import ArtifactError
from compress.files import fsync_path, write_bytes_atomically

DATA = "model.onnx.data"
PAGE = 4096  # large tensors start on a page, so that they can be mapped into memory
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
LOGITS_FROM = "logits_from"
IDENTITY = "identity"  # what the names of its constants begin with
CONTRIB = "com.microsoft"


class Graph:
    """A model and the bytes of its initializers, which stay in their file until they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        self.tensors = {t.name: t for t in self.model.graph.initializer}
        self._replaced: dict[str, np.ndarray] = {}

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    def array(self, name: str) -> np.ndarray:
        """An initializer's values, mapped from the file (bfloat16 as ml_dtypes has it)."""
        if name in self._replaced:
            return self._replaced[name]
        tensor = self.tensors[name]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location != TensorProto.EXTERNAL:
            value: np.ndarray = onnx.numpy_helper.to_array(tensor)
            return value
        entry = {e.key: e.value for e in tensor.external_data}
        path = self.folder / entry["location"]
        shape = tuple(tensor.dims)
        return np.memmap(path, dtype, "r", offset=int(entry.get("offset", 0)), shape=shape)

    def set(self, name: str, values: np.ndarray) -> None:
        """Add an initializer or replace its values."""
        old = self.tensors.get(name)
        if old is None:
            old = self.model.graph.initializer.add()
            old.name = name
            self.tensors[name] = old
        data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        old.CopyFrom(TensorProto(name=name, data_type=data_type, dims=values.shape))
        self._replaced[name] = values

    def drop_unused(self) -> None:
        """Remove initializers that no node reads, and the shape records of values that are gone."""
        used = {i for node in self.nodes for i in node.input} | {o.name for o in self.model.graph.output}
        made = {o for node in self.nodes for o in node.output}
        _keep(self.model.graph.initializer, lambda t: t.name in used)
        _keep(self.model.graph.value_info, lambda v: v.name in made)
        self.tensors = {t.name: t for t in self.model.graph.initializer}

    def insert(self, index: int, *nodes: onnx.NodeProto) -> None:
        for offset, node in enumerate(nodes):
            self.nodes.insert(index + offset, node)

    def constant(self, name: str, value: np.ndarray) -> str:
        """The name of a constant, made a node at the start on first use: shapes must not lie in the data file."""
        if not any(node.output[0] == name for node in self.nodes if node.op_type == "Constant"):
            made = helper.make_node("Constant", [], [name], name=name, value=onnx.numpy_helper.from_array(value))
            self.insert(0, made)
        return name

    def save(self, folder: Path, producer_version: str) -> None:
        """Write model.onnx and model.onnx.data, tensors in the graph's order, each aligned. Same graph, same bytes."""
        self.model.producer_version = producer_version
        with open(folder / DATA, "wb") as f:
            for tensor in self.model.graph.initializer:
                values = self.array(tensor.name)
                unit = PAGE if values.nbytes >= PAGE else 64
                offset = -(-f.tell() // unit) * unit
                f.write(b"\0" * (offset - f.tell()))
                f.write(values.tobytes())
                place = {"location": DATA, "offset": str(offset), "length": str(values.nbytes)}
                tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=value)
        write_bytes_atomically(folder / "model.onnx", self.model.SerializeToString(deterministic=True))
        fsync_path(folder)
        self.folder, self._replaced = folder, {}


def matmul_nbits(graph: Graph) -> Iterator[onnx.NodeProto]:
    """The graph's nodes with quantized weights."""
    return (node for node in graph.nodes if node.op_type == "MatMulNBits")


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def store_embedding(graph: Graph, table_VH: np.ndarray) -> None:
    """Read the embedding from `table_VH`, in whatever float type it has."""
    index, gather = _only(graph, lambda n: n.op_type == "Gather" and n.input[0] == EMBEDDING, "an embedding")
    graph.set(EMBEDDING, table_VH)
    if table_VH.dtype == np.float32:
        return
    wide = gather.output[0]
    gather.output[0] = f"{wide}/stored"
    graph.insert(index + 1, _cast(gather.output[0], wide))


def store_lm_head(graph: Graph, weight_VH: np.ndarray | None) -> None:
    """Multiply by `weight_VH`, or by the embedding where the two are tied (None)."""
    index, matmul = _only(graph, lambda n: n.op_type == "MatMul" and n.name == "/lm_head/MatMul", "an lm_head")
    name = EMBEDDING if weight_VH is None else LM_HEAD
    if weight_VH is not None:
        graph.set(LM_HEAD, weight_VH)
    narrow = graph.array(name).dtype != np.float32
    weight = f"{name}/float32" if narrow else name
    fused = helper.make_node(
        "FusedMatMul", [matmul.input[0], weight], list(matmul.output), name=matmul.name, domain=CONTRIB, transB=1
    )
    del graph.nodes[index]
    graph.insert(index, *([_cast(name, weight)] if narrow else []), fused)


def take_logits_from(graph: Graph) -> None:
    """Let a reader leave out the logits of a prompt's first tokens: an input that has a value, which is all of them.

    Comes after `store_lm_head`. Readers that do not know it see the graph's other inputs only.
    """
    end = graph.constant("/constants/end", np.array([np.iinfo(np.int64).max]))
    axis = graph.constant("/constants/tokens", np.array([1]))
    index, product = _only(graph, lambda n: n.name == "/lm_head/MatMul", "an lm_head")
    graph.set(LOGITS_FROM, np.zeros(1, np.int64))
    graph.model.graph.input.append(helper.make_tensor_value_info(LOGITS_FROM, TensorProto.INT64, [1]))
    source, kept = product.input[0], f"{product.input[0]}/kept"
    product.input[0] = kept
    graph.insert(index, helper.make_node("Slice", [source, LOGITS_FROM, end, axis], [kept], name=f"{kept}/Slice"))


def set_embedding_scale(graph: Graph, scale: float) -> None:
    """Multiply embeddings by `scale` where the builder multiplies by it rounded to two decimals (Gemma)."""
    _, mul = _only(graph, lambda n: n.op_type == "Mul" and n.name == "/model/embed_tokens/Mul", "an embedding scale")
    mul.input[1] = "model.embed_tokens.scale"
    graph.set(mul.input[1], np.array(scale, np.float32))


def fix_head_size(graph: Graph, head_size: int) -> None:
    """Write the size of a head into the shapes of past and present; the builder leaves it open."""
    for value in [*graph.model.graph.input, *graph.model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=head_size))


def set_windows(graph: Graph, windows: Sequence[int | None]) -> None:
    """Let layer i attend to the last `windows[i]` tokens (None: all); the builder drops Mistral's and Phi-3's."""
    seen = 0
    for node in graph.nodes:
        if node.op_type == "GroupQueryAttention":
            layer = int(node.name.removeprefix("/model/layers.").split("/")[0])
            kept = [a for a in node.attribute if a.name != "local_window_size"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("local_window_size", windows[layer] or -1)])
            seen += 1
    if seen != len(windows):
        raise ArtifactError(f"{graph.folder}: {seen} attention nodes for {len(windows)} layers; the graph is not known")


def set_norms(graph: Graph, weights: Mapping[str, np.ndarray]) -> None:
    """Replace norm weights by float32 ones. The builder adds Gemma's 1 in float16, which costs 11 bits of 24."""
    for name, values in weights.items():
        if name not in graph.tensors:
            raise ArtifactError(f"{graph.folder}: the builder's graph has no {name}; its names have changed")
        graph.set(name, values.astype(np.float32))


def narrow_linears(graph: Graph, dtype: np.dtype[Any]) -> int:
    """Store each dense linear's weight `[K, N]` as `dtype` where that is exact; how many were."""
    count = 0
    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        if node.op_type != "MatMul" or node.input[1] not in graph.tensors:
            continue
        name = node.input[1]
        wide = graph.array(name)
        if wide.dtype != np.float32 or wide.ndim != 2:
            continue
        narrow = wide.astype(dtype)
        if not np.array_equal(narrow.astype(np.float32), wide):
            continue
        graph.set(name, narrow)
        node.input[1] = f"{name}/float32"
        graph.insert(index, _cast(name, node.input[1]))
        count += 1
    return count


def fuse_gate_up(graph: Graph) -> int:
    """Make gate_proj and up_proj one MatMulNBits and a Split, as q, k and v are one already; how many pairs were.

    They read the same activations: one call less to start, and in the int8 case one quantization less.
    """
    named = {node.name: node for node in graph.nodes}
    count = 0
    for name, gate in named.items():
        up = named.get(name.replace("/gate_proj/", "/up_proj/"))
        if gate.op_type != "MatMulNBits" or up is None or up is gate or up.op_type != "MatMulNBits":
            continue
        if len(gate.input) != len(up.input) or gate.input[0] != up.input[0] or gate.attribute != up.attribute:
            continue
        inputs = [gate.input[0]]
        for mine, other in zip(gate.input[1:], up.input[1:], strict=True):
            both = mine.replace(".gate_proj.", ".gate_up_proj.")
            graph.set(both, np.concatenate([graph.array(mine), graph.array(other)]))
            inputs.append(both)
        fused = name.replace("/gate_proj/", "/gate_up_proj/")
        changed = {a.name: helper.get_attribute_value(a) for a in gate.attribute}
        changed["N"] *= 2
        halves = [gate.output[0], up.output[0]]
        index = list(graph.nodes).index(gate)
        graph.nodes.remove(gate)
        graph.nodes.remove(up)
        graph.insert(
            index,
            helper.make_node("MatMulNBits", inputs, [f"{fused}/output_0"], name=fused, domain=CONTRIB, **changed),
            helper.make_node("Split", [f"{fused}/output_0"], halves, name=f"{fused}/Split", axis=-1, num_outputs=2),
        )
        count += 1
    return count


def make_dense(graph: Graph, node: onnx.NodeProto, weight_KN: np.ndarray) -> None:
    """Replace a MatMulNBits by a product with `weight_KN`, widened at load where it is narrow."""
    index = list(graph.nodes).index(node)
    name = f"{node.name[1:].replace('/', '.').removesuffix('NBits')}.weight"
    graph.set(name, weight_KN)
    narrow = weight_KN.dtype != np.float32
    weight = f"{name}/float32" if narrow else name
    product = helper.make_node(
        "MatMul", [node.input[0], weight], list(node.output), name=node.name.removesuffix("NBits")
    )
    graph.nodes.remove(node)
    graph.insert(index, *([_cast(name, weight)] if narrow else []), product)


def split_activations(graph: Graph) -> int:
    """Give each MatMulNBits its input as two rows, x and what the kernel loses of it, and add the two products; how
    many inputs were.

    At accuracy level 4 the kernel quantizes a row to int8, block by block. What that makes of x is what a product with
    an identity gives, and the rest is at most half a step: together they carry 15 bits of x through the int8 kernel.
    The kernel reads the weights once for both rows, which is why this is faster than float32 activations although it
    multiplies twice.
    """
    rows: dict[tuple[str, int, int], str] = {}
    for node in list(matmul_nbits(graph)):
        out, k, size, bits = node.output[0], *(attribute(node, name) for name in ("K", "block_size", "bits"))
        if k % size:
            raise ArtifactError(f"{node.name}: {k} inputs are not whole blocks of {size}; its input cannot be split")
        key = (node.input[0], size, bits)
        if key not in rows:
            nodes = _split_into_rows(graph, node.input[0], k, size, bits)
            rows[key] = nodes[-1].output[0]
            graph.insert(list(graph.nodes).index(node), *nodes)
        node.input[0], node.output[0] = rows[key], f"{out}/rows"
        graph.insert(
            list(graph.nodes).index(node) + 1,
            helper.make_node(
                "Split", [f"{out}/rows"], [f"{out}/high", f"{out}/low"], name=f"{out}/Split", axis=0, num_outputs=2
            ),
            helper.make_node("Add", [f"{out}/high", f"{out}/low"], [out], name=f"{out}/Add"),
        )
    return len(rows)


def _split_into_rows(graph: Graph, source: str, k: int, size: int, bits: int) -> list[onnx.NodeProto]:
    """Nodes from `source` `[B, T, K]` to `[2B, T, K]`: x, then what is left of it."""
    blocks = graph.constant(f"/constants/blocks/{k}/{size}", np.array([0, 0, k // size, size]))
    flat = graph.constant(f"/constants/flat/{k}", np.array([0, 0, k]))
    stem = f"{source}/{bits}/{size}"

    def node(op: str, inputs: Sequence[str], name: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [f"{stem}/{name}"], name=f"{stem}/{name}/{op}", **attributes)

    return [
        node("Reshape", [source, blocks], "blocks"),
        node(
            "MatMulNBits", [f"{stem}/blocks", *_identity(graph, size, bits)], "kept",
            domain=CONTRIB, K=size, N=size, bits=bits, block_size=size, accuracy_level=4,
        ),
        node("Sub", [f"{stem}/blocks", f"{stem}/kept"], "rest"),
        node("Concat", [f"{stem}/blocks", f"{stem}/rest"], "both", axis=0),
        node("Reshape", [f"{stem}/both", flat], "rows"),
    ]  # fmt: skip


def _identity(graph: Graph, size: int, bits: int) -> list[str]:
    """Codes, scales and zero points of a MatMulNBits that multiplies a block by 1.

    With zero points of 0: those of the middle code are taken off as a product of their own, whose rounding would show.
    """
    names = [f"{IDENTITY}.{bits}.{size}.{leaf}" for leaf in ("codes", "scales", "zero_points")]
    if names[0] not in graph.tensors:
        codes = np.eye(size, dtype=np.uint8)
        packed = codes[:, ::2] | codes[:, 1::2] << 4 if bits == 4 else codes
        for name, values in zip(
            names, (packed[:, None], np.ones(size, np.float32), np.zeros(size, np.uint8)), strict=True
        ):
            graph.set(name, values)
    return names


def is_identity(node: onnx.NodeProto) -> bool:
    """Whether a MatMulNBits shows what its kernel keeps of a block (`split_activations`)."""
    return bool(node.op_type == "MatMulNBits" and node.input[1].startswith(f"{IDENTITY}."))


def drop_symmetric_zero_points(graph: Graph) -> int:
    """Leave out the zero points of each MatMulNBits where all are 2**(bits - 1); how many were left out."""
    count = 0
    for node in matmul_nbits(graph):
        if len(node.input) > 3 and node.input[3] and attribute(node, "bits") == 4:
            if bool((unpack(graph.array(node.input[3])) == 8).all()):
                del node.input[3:]
                count += 1
    return count


def unpack(packed: np.ndarray) -> np.ndarray:
    """4-bit codes of bytes, low half first; the last axis doubles."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _cast(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=TensorProto.FLOAT)


def _only(graph: Graph, fits: Callable[[onnx.NodeProto], bool], what: str) -> tuple[int, onnx.NodeProto]:
    found = [(i, n) for i, n in enumerate(graph.nodes) if fits(n)]
    if len(found) != 1:
        raise ArtifactError(
            f"{graph.folder}: the builder's graph has {len(found)} nodes where {what} is meant; expected 1"
        )
    return found[0]


def _keep(field: Any, fits: Callable[[Any], bool]) -> None:
    kept = [item for item in field if fits(item)]
    del field[:]
    field.extend(kept)
