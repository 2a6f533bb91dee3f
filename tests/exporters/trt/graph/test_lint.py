"""Graphs broken on purpose, one rule each; every one of them is valid enough to be written, and most would run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import ArtifactError
from exporters.trt.graph.external import place
from exporters.trt.graph.lint import lint
from exporters.trt.graph.write import DATA, GRAPH, write_graph

Break = Callable[[onnx.ModelProto, Path], None]


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, reference_model: Path, round_to_nearest: Any
) -> tuple[Path, Path]:
    """The reference model in INT4 and its graph, opset 24."""
    folder = tmp_path_factory.mktemp("lint")
    artifact = round_to_nearest(reference_model, folder / "artifact", 128)
    (folder / "graph").mkdir()
    write_graph(artifact, folder / "graph", opset=24, capacity=64)
    return artifact, folder / "graph"


def node(model: onnx.ModelProto, kind: str, index: int = 0) -> onnx.NodeProto:
    return [n for n in model.graph.node if n.op_type == kind][index]


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def other_opset(model: onnx.ModelProto, folder: Path) -> None:
    model.opset_import[0].version = 25


def contrib_domain(model: onnx.ModelProto, folder: Path) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def foreign_operator(model: onnx.ModelProto, folder: Path) -> None:
    node(model, "Sigmoid").op_type = "HardSwish"


def zero_point(model: onnx.ModelProto, folder: Path) -> None:
    """All zeros: right in every runtime, and still an input that TensorRT's INT4 must not have."""
    dequantize = node(model, "DequantizeLinear")
    dims = tensor(model, dequantize.input[1]).dims
    data = b"\0" * (int(np.prod(dims)) // 2)
    model.graph.initializer.append(onnx.TensorProto(name="zp", data_type=TensorProto.INT4, dims=dims, raw_data=data))
    dequantize.input.append("zp")


def axis(model: onnx.ModelProto, folder: Path) -> None:
    """Blocks along the outputs of a square weight: same shapes after a transposition, other numbers."""
    square = next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].endswith("o_proj.weight.codes")
    )
    next(a for a in square.attribute if a.name == "axis").i = 1
    scales = tensor(model, square.input[1])
    scales.dims[:] = [scales.dims[1], scales.dims[0]]


def code(model: onnx.ModelProto, folder: Path) -> None:
    flip(model, folder, ".codes")


def scale(model: onnx.ModelProto, folder: Path) -> None:
    flip(model, folder, ".scales")


def flip(model: onnx.ModelProto, folder: Path, suffix: str) -> None:
    """One bit of the last such tensor."""
    where = place([t for t in model.graph.initializer if t.name.endswith(suffix)][-1])
    assert where is not None
    with open(folder / DATA, "r+b") as f:
        f.seek(where.offset + where.length - 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))


def exchanged(model: onnx.ModelProto, folder: Path) -> None:
    """o of two layers swapped: same shapes, every weight present."""
    one = next(n for n in model.graph.node if n.name == "model.layers.2.self_attn.o_proj/dequantized")
    other = next(n for n in model.graph.node if n.name == "model.layers.3.self_attn.o_proj/dequantized")
    a, b = list(one.input), list(other.input)
    for which, names in ((one, b), (other, a)):
        which.input[:] = names


def exchanged_pieces(model: onnx.ModelProto, folder: Path) -> None:
    """k and v of one product swapped: as wide as each other, so no shape tells."""
    split = next(n for n in model.graph.node if "model.layers.2.self_attn.k_proj" in n.output)
    q, k, v = split.output
    split.output[:] = [q, v, k]


def dense_instead(model: onnx.ModelProto, folder: Path) -> None:
    """A layer left in float16, as a reader does that skipped its quantized tensors."""
    dequantize = node(model, "DequantizeLinear", 4)
    codes = tensor(model, dequantize.input[0])
    for name in list(dequantize.input):
        model.graph.initializer.remove(tensor(model, name))
    path, size = folder / "other.data", int(np.prod(codes.dims)) * 2
    path.write_bytes(b"\0" * size)
    dense = onnx.TensorProto(name=dequantize.output[0], data_type=TensorProto.FLOAT16, dims=codes.dims)
    dense.data_location = TensorProto.EXTERNAL
    for key, value in (("location", path.name), ("offset", "0"), ("length", str(size))):
        dense.external_data.add(key=key, value=value)
    model.graph.node.remove(dequantize)
    model.graph.initializer.append(dense)


def short_file(model: onnx.ModelProto, folder: Path) -> None:
    with open(folder / DATA, "r+b") as f:
        f.truncate((folder / DATA).stat().st_size - 1)


def overlap(model: onnx.ModelProto, folder: Path) -> None:
    """Two norms at one place: the second is lost, and nothing else notices."""
    first, second = (tensor(model, f"model.layers.{i}.input_layernorm.weight") for i in (0, 1))
    for entry in second.external_data:
        entry.value = next(e.value for e in first.external_data if e.key == entry.key)


def inside(model: onnx.ModelProto, folder: Path) -> None:
    weight = tensor(model, "rope/0/cos")
    where = place(weight)
    assert where is not None
    data = (folder / DATA).read_bytes()[where.offset : where.offset + where.length]
    weight.CopyFrom(onnx.TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims, raw_data=data))


def unused_weight(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "spare"))


def dead_node(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.node.append(helper.make_node("Shape", ["input_ids"], ["nowhere"], name="dead"))


def dynamic_cache(model: onnx.ModelProto, folder: Path) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.endswith(".0.key"):
            value.type.tensor_type.shape.dim[2].dim_param = "past"


def cache_not_in_place(model: onnx.ModelProto, folder: Path) -> None:
    scatter = node(model, "TensorScatter")
    model.graph.node.insert(
        list(model.graph.node).index(scatter) + 1,
        helper.make_node("Mul", ["scattered", "scalar/float16/0.125"], [scatter.output[0]], name="copy"),
    )
    scatter.output[0] = "scattered"


def causal(model: onnx.ModelProto, folder: Path) -> None:
    """Right in prefill, and attends to the first slot only in decode."""
    next(a for a in node(model, "Attention").attribute if a.name == "is_causal").i = 1


def softcap(model: onnx.ModelProto, folder: Path) -> None:
    node(model, "Attention").attribute.append(helper.make_attribute("softcap", 30.0))


def invalid(model: onnx.ModelProto, folder: Path) -> None:
    node(model, "MatMul").input[1] = "nothing"


BROKEN: dict[str, tuple[Break, str]] = {
    "opset": (other_opset, "declares opsets"),
    "contrib domain": (contrib_domain, "without other domains"),
    "foreign operator": (foreign_operator, "is HardSwish, which is not in the dialect"),
    "zero point": (zero_point, "has a zero point input"),
    "block axis": (axis, "blocks must lie along axis 0"),
    "code": (code, "the codes of .* are not the artifact's"),
    "scale": (scale, "the scales of .* are not the artifact's"),
    "exchanged weights": (exchanged, "each belongs to its own layer"),
    "exchanged pieces": (exchanged_pieces, "its columns are .*q_proj, .*k_proj, .*v_proj"),
    "dense layer": (dense_instead, "is not in the graph"),
    "short file": (short_file, "ends at byte"),
    "overlap": (overlap, "share bytes"),
    "weight inside": (inside, "is inside the model file"),
    "unused weight": (unused_weight, "spare is not used"),
    "dead node": (dead_node, "dead leads to no output"),
    "dynamic cache": (dynamic_cache, "all but batch static"),
    "cache not in place": (cache_not_in_place, "must be the TensorScatter of"),
    "causal flag": (causal, "is_causal 0"),
    "soft cap": (softcap, "'softcap': 30.0.*one output, with scale 1.0"),
    "invalid": (invalid, "not valid ONNX"),
}  # fmt: skip


def test_written_graph_passes(written: tuple[Path, Path]) -> None:
    artifact, graph = written
    assert lint(graph / GRAPH, artifact, 24)["quantized_layers_compared"] == 42


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_is_enforced(name: str, written: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, graph = written
    shutil.copytree(graph, tmp_path / "graph")
    model = onnx.load(str(tmp_path / "graph" / GRAPH), load_external_data=False)
    change, message = BROKEN[name]
    change(model, tmp_path / "graph")
    (tmp_path / "graph" / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        lint(tmp_path / "graph" / GRAPH, artifact, 24)


def test_graph_of_another_artifact_is_refused(written: tuple[Path, Path], reference_model: Path) -> None:
    """The unquantized parent has no quantized layers, so a graph that dequantizes is not its."""
    with pytest.raises(ArtifactError, match="has .* columns, but the artifact's quantized layers fill 0"):
        lint(written[1] / GRAPH, reference_model, 24)
