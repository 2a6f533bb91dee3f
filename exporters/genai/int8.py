"""INT8 artifacts in the builder's graph: each dense product becomes what the artifact says of its layer.

The builder reads no compressed-tensors folder, so it is given one with the same layers dense (`stand_in`), and every
product that stands for a quantized layer is then replaced:

    weights only     MatMulNBits with 8 bits, or with float32 activations the codes widened once, when the graph is
                     loaded: (Cast(codes) - 128) * scale. ONNX Runtime's own product of 8 bits with float32 widens them
                     at every call (40 times slower, 1536 x 1536, one row)
    inputs as well   the inputs' codes by the rule of `compress.activations`, then MatMulInteger, then the two scales

MatMulInteger gets unsigned numbers on both sides, codes with the zero point 128. With signed weights ONNX Runtime adds
pairs of products in 16 bits where a CPU has no VNNI, and saturates without a word; products of two unsigned numbers are
summed exactly everywhere.

Shapes: B batch, T tokens, K in_features, N out_features, G groups along K
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from compress.artifact import carried_files
from compress.errors import UnsupportedError
from compress.files import json_bytes
from compress.formats import Stored
from compress.plan import ActivationScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.shards import save_atomically
from exporters.genai.graph import CONTRIB, Graph

MIDDLE = 128
# Blocks of MatMulNBits; a row with one scale is cut into the largest that divides it.
BLOCKS = (128, 64, 32, 16)
# What the names of a layer's constants end with, beside its codes'.
LEAVES = ("_scale", ".row_sums")
_TINY = 4e-37  # a token of zeros has no scale, and 127 over less than this is no float32


def stand_in(folder: Stored, out: Path) -> Path:
    """A folder like the artifact, unquantized, with zeros for the weights that `replace` puts in; returns `out`."""
    checkpoint = folder.checkpoint
    out.mkdir()
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (out / "config.json").write_bytes(json_bytes(config))
    for path in carried_files(checkpoint.path):
        shutil.copyfile(path, out / path.name)
    taken = folder.taken()
    tensors = checkpoint.read(name for name in checkpoint.names() if name not in taken)
    for layer in folder.layers:
        tensors[f"{layer}.weight"] = torch.zeros(folder.shape(layer), dtype=torch.float16)
    save_atomically(out / "model.safetensors", tensors)
    return out


def block_size(in_features: int, group_size: int, name: str) -> int:
    """Columns of a block of MatMulNBits. UnsupportedError where none divides the row."""
    if group_size != -1:
        return group_size
    size = next((size for size in BLOCKS if in_features % size == 0), None)
    if size is None:
        raise UnsupportedError(f"{name}: {in_features} inputs are not whole blocks of {BLOCKS[-1]}, as onnx needs")
    return size


def replace(
    graph: Graph, node: onnx.NodeProto, weight: QuantizedWeight, inputs: Inputs | None, *, widened: bool
) -> None:
    """Put a quantized layer in the place of the product `node`. widened: weights of float inputs as float32."""
    if inputs is not None:
        nodes = _integer_product(graph, node, weight, inputs)
    elif widened:
        nodes = _widened_product(graph, node, weight)
    else:
        nodes = [_blocked_product(graph, node, weight)]
    index = list(graph.nodes).index(node)  # constants were put first
    graph.nodes.remove(node)
    graph.insert(index, *nodes)


# ---- weights only --------------------------------------------------------------------------------------


def _blocked_product(graph: Graph, node: onnx.NodeProto, weight: QuantizedWeight) -> onnx.NodeProto:
    """MatMulNBits. Source of the layout: ONNX Runtime, `docs/ContribOperators.md`; no zero points are 128."""
    n, k = weight.codes_OI.shape
    size = block_size(k, weight.scheme.group_size, node.name)
    scale_NG = weight.scale_OG.float().repeat_interleave(k // size // weight.scale_OG.shape[1], dim=1)
    name = _weight_name(node)
    graph.set(name, weight.codes_OI.reshape(n, k // size, size).numpy())
    graph.set(f"{name}_scale", scale_NG.reshape(-1).numpy())
    return helper.make_node(
        "MatMulNBits", [node.input[0], name, f"{name}_scale"], list(node.output), name=f"{node.name}NBits",
        domain=CONTRIB, K=k, N=n, bits=8, block_size=size, accuracy_level=4,
    )  # fmt: skip


def _widened_product(graph: Graph, node: onnx.NodeProto, weight: QuantizedWeight) -> list[onnx.NodeProto]:
    """A product with float32 weights that ONNX Runtime makes of the codes when it loads the graph."""
    n, k = weight.codes_OI.shape
    groups = weight.scale_OG.shape[1]
    name = _weight_name(node)
    graph.set(name, weight.codes_OI.t().reshape(groups, k // groups, n).contiguous().numpy())
    graph.set(f"{name}_scale", weight.scale_OG.float().t().reshape(groups, 1, n).contiguous().numpy())
    middle = graph.constant("/constants/middle", np.array(MIDDLE, np.float32))
    shape = graph.constant(f"/constants/shape/{k}/{n}", np.array([k, n]))
    wide = f"{name}/float32"

    return [
        _node("Cast", [name], f"{name}/codes", to=TensorProto.FLOAT),
        _node("Sub", [f"{name}/codes", middle], f"{name}/steps"),
        _node("Mul", [f"{name}/steps", f"{name}_scale"], f"{name}/grouped"),
        _node("Reshape", [f"{name}/grouped", shape], wide),
        helper.make_node("MatMul", [node.input[0], wide], list(node.output), name=node.name),
    ]


# ---- integer products ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How a layer's inputs become codes. static: where they have one range."""

    scheme: ActivationScheme
    static: StaticInput | None

    @property
    def label(self) -> str:
        if self.static is None:
            return self.scheme.label()
        return f"{self.scheme.label()}/{float(self.static.scale)!r}/{int(self.static.zero_point)}"


@dataclass(frozen=True, kw_only=True)
class _Codes:
    """Values of the graph that hold a quantized input.

    codes: uint8 `[B, T, K]`. zero_point: the constant that MatMulInteger takes off them. scale: `[B, T, 1]` or a
    constant. shift: int32 `[B, T, 1]`, what is left to take off each code, or None.
    """

    codes: str
    zero_point: str
    scale: str
    shift: str | None = None


def _integer_product(
    graph: Graph, node: onnx.NodeProto, weight: QuantizedWeight, inputs: Inputs
) -> list[onnx.NodeProto]:
    """`(codes - zero) (W - 128)` in int32, scaled as `compress.activations.linear` does."""
    codes, made = _input_codes(graph, node.input[0], inputs)
    name = _weight_name(node)
    graph.set(name, weight.codes_OI.t().contiguous().numpy())
    graph.set(f"{name}_scale", weight.scale_OG.float().reshape(-1).numpy())
    sums = f"{node.name}/sums"
    product = helper.make_node(
        "MatMulInteger", [codes.codes, name, codes.zero_point, _middle(graph)], [sums], name=f"{node.name}Integer"
    )
    made.append(product)
    if codes.shift is not None:
        rows = (weight.codes_OI.to(torch.int32) - MIDDLE).sum(dim=1, dtype=torch.int32)
        graph.set(f"{name}.row_sums", rows.numpy())
        made.append(_node("Mul", [codes.shift, f"{name}.row_sums"], f"{node.name}/shift"))
        made.append(_node("Sub", [sums, f"{node.name}/shift"], f"{node.name}/shifted"))
        sums = f"{node.name}/shifted"
    made.append(_node("Cast", [sums], f"{node.name}/floats", to=TensorProto.FLOAT))
    made.append(_node("Mul", [f"{node.name}/floats", f"{name}_scale"], f"{node.name}/scaled"))
    made.append(_node("Mul", [f"{node.name}/scaled", codes.scale], node.output[0]))
    return made


def _input_codes(graph: Graph, source: str, inputs: Inputs) -> tuple[_Codes, list[onnx.NodeProto]]:
    """The codes of a value of the graph, and the nodes that make them where they are not there yet."""
    stem = f"{source}/{inputs.label}"
    if inputs.static is not None:
        codes, nodes = _static_codes(graph, source, stem, inputs.static)
    elif inputs.scheme.symmetric:
        codes, nodes = _by_token(graph, source, stem)
    else:
        codes, nodes = _by_token_asymmetric(graph, source, stem)
    there = any(codes.codes in node.output for node in graph.nodes)
    return codes, [] if there else nodes


def _middle(graph: Graph) -> str:
    return graph.constant("/constants/zero_point_128", np.array(MIDDLE, np.uint8))


def _by_token(graph: Graph, source: str, stem: str) -> tuple[_Codes, list[onnx.NodeProto]]:
    """`scale = amax / 127`, `codes = round(x * (127 / amax)) + 128`."""
    last = graph.constant("/constants/last_axis", np.array([-1]))
    levels = graph.constant("/constants/127", np.array(127, np.float32))
    tiny = graph.constant("/constants/tiny", np.array(_TINY, np.float32))
    middle = graph.constant("/constants/middle", np.array(MIDDLE, np.float32))
    codes = _Codes(codes=f"{stem}/codes", zero_point=_middle(graph), scale=f"{stem}/scale")
    return codes, [
        _node("Abs", [source], f"{stem}/magnitude"),
        _node("ReduceMax", [f"{stem}/magnitude", last], f"{stem}/largest", keepdims=1),
        _node("Div", [f"{stem}/largest", levels], codes.scale),
        _node("Max", [f"{stem}/largest", tiny], f"{stem}/positive"),
        _node("Div", [levels, f"{stem}/positive"], f"{stem}/inverse"),
        _node("Mul", [source, f"{stem}/inverse"], f"{stem}/scaled"),
        _node("Round", [f"{stem}/scaled"], f"{stem}/rounded"),
        _node("Add", [f"{stem}/rounded", middle], f"{stem}/shifted"),
        _node("Cast", [f"{stem}/shifted"], codes.codes, to=TensorProto.UINT8),
    ]


def _by_token_asymmetric(graph: Graph, source: str, stem: str) -> tuple[_Codes, list[onnx.NodeProto]]:
    """`scale = (max - min) / 255`, `zero = round(-128 - min / scale)`, `codes = clamp(round(x / scale) + zero) + 128`;
    a token of equal values takes its own size for the step."""
    last = graph.constant("/constants/last_axis", np.array([-1]))
    levels = graph.constant("/constants/255", np.array(255, np.float32))
    zero, one = (graph.constant(f"/constants/float_{v}", np.array(v, np.float32)) for v in (0, 1))
    lowest = graph.constant("/constants/lowest", np.array(-MIDDLE, np.float32))
    highest = graph.constant("/constants/highest", np.array(MIDDLE - 1, np.float32))
    middle = graph.constant("/constants/middle", np.array(MIDDLE, np.float32))
    codes = _Codes(codes=f"{stem}/codes", zero_point=_middle(graph), scale=f"{stem}/scale", shift=f"{stem}/zero_point")
    return codes, [
        _node("ReduceMin", [source, last], f"{stem}/low", keepdims=1),
        _node("ReduceMax", [source, last], f"{stem}/high", keepdims=1),
        _node("Sub", [f"{stem}/high", f"{stem}/low"], f"{stem}/range"),
        _node("Div", [f"{stem}/range", levels], f"{stem}/step"),
        _node("Equal", [f"{stem}/step", zero], f"{stem}/flat"),
        _node("Abs", [f"{stem}/low"], f"{stem}/size"),
        _node("Equal", [f"{stem}/size", zero], f"{stem}/nothing"),
        _node("Where", [f"{stem}/nothing", one, f"{stem}/size"], f"{stem}/own"),
        _node("Where", [f"{stem}/flat", f"{stem}/own", f"{stem}/step"], codes.scale),
        _node("Div", [f"{stem}/low", codes.scale], f"{stem}/low_steps"),
        _node("Sub", [lowest, f"{stem}/low_steps"], f"{stem}/wanted"),
        _node("Round", [f"{stem}/wanted"], f"{stem}/zero_rounded"),
        _node("Where", [f"{stem}/flat", zero, f"{stem}/zero_rounded"], f"{stem}/zero"),
        _node("Cast", [f"{stem}/zero"], f"{stem}/zero_point", to=TensorProto.INT32),
        _node("Div", [source, codes.scale], f"{stem}/scaled"),
        _node("Round", [f"{stem}/scaled"], f"{stem}/rounded"),
        _node("Add", [f"{stem}/rounded", f"{stem}/zero"], f"{stem}/moved"),
        _node("Clip", [f"{stem}/moved", lowest, highest], f"{stem}/clamped"),
        _node("Add", [f"{stem}/clamped", middle], f"{stem}/shifted"),
        _node("Cast", [f"{stem}/shifted"], codes.codes, to=TensorProto.UINT8),
    ]


def _static_codes(graph: Graph, source: str, stem: str, static: StaticInput) -> tuple[_Codes, list[onnx.NodeProto]]:
    """`codes = round(x / scale) + zero_point`, saturated: QuantizeLinear, which rounds half to even as well."""
    scale, zero = float(static.scale.float()), int(static.zero_point)
    codes = _Codes(
        codes=f"{stem}/codes",
        zero_point=graph.constant(f"/constants/zero_point_{zero}", np.array(zero, np.uint8)),
        scale=graph.constant(f"/constants/input_scale/{scale!r}", np.array(scale, np.float32)),
    )
    return codes, [_node("QuantizeLinear", [source, codes.scale, codes.zero_point], codes.codes)]


def _node(op: str, inputs: Sequence[str], output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)


def _weight_name(node: onnx.NodeProto) -> str:
    return f"{node.name[1:].replace('/', '.')}.weight"
