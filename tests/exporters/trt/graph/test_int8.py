"""INT8 artifacts as TensorRT graphs: compiled for SM80 from INT8 weights, and INT8 inputs where they have a range."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from compress.errors import ArtifactError
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.runtime.ort import open_session
from compress.workspace import resolve
from exporters import reference
from exporters.reader import Job
from exporters.trt import write as onnx_trt
from exporters.trt.graph import build_engine, run
from exporters.trt.graph.external import place
from exporters.trt.graph.lint import lint
from exporters.trt.graph.write import DATA, GRAPH, write_graph

TARGET: Any = SimpleNamespace(name="a100")  # the format asks a target for nothing
TEXT = "the old house stood by the river and nobody had lived there for many years since the war " * 60


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> dict[str, Path]:
    """The reference model as W8A16 and as W8A8 with one range of inputs a layer."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "text.txt").write_text(TEXT)
    options: dict[str, Any] = {"calib": str(folder / "text.txt"), "samples": 2, "seq_len": 64, "effort": "fast"}
    source = resolve(str(reference_model))
    return {
        name: quantize_int8(Int8Request(source=source, out=folder / name, **options, **changes)).out
        for name, changes in (("w8a16", {"scheme": "w8a16"}), ("static", {"static": True}))
    }


@pytest.mark.parametrize("opset", [24, 21])
@pytest.mark.parametrize(("name", "precision", "by_int8"), [("w8a16", "int8", 0), ("static", "int8 x int8", 24)])
def test_both_kinds_compile_for_an_a100(
    opset: int, name: str, precision: str, by_int8: int, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """Every product from INT8 weights; W8A8 multiplies INT8 by INT8. The logits were compared on the way."""
    pytest.importorskip("tensorrt_rtx", reason="TENSORRT-RTX ABSENT, NOTHING COMPILED: pip install '.[tensorrt-rtx]'")
    job = Job(artifact=artifacts[name], target=TARGET, context=64, batch=1, staged=tmp_path, options={"opset": opset})
    written = onnx_trt.write(job)
    assert written.record["precision"] == precision
    assert written.record["lint"]["quantized_layers_compared"] == 42
    assert written.parts["decoder linears"] < 9_500_000 + 100_000  # a byte a weight
    report = build_engine.build(tmp_path, tmp_path / "model.engine", profiles=["any"], bindings="tensorrt_rtx", sm=80)
    assert (report["int8_fused"], report["int8_unfused"], report["int8_by_int8"]) == (24, [], by_int8)
    assert report["int4_fused"] == 0


@pytest.mark.parametrize("name", ["w8a16", "static"])
def test_in_float32_it_computes_the_artifact(name: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """To float32's rounding; where inputs are rounded, as far as values between two codes let it."""
    write_graph(artifacts[name], tmp_path, opset=24, capacity=64, float_type=onnx.TensorProto.FLOAT)
    wanted = reference.of_artifact(artifacts[name])
    found = run.logits_TV(open_session(tmp_path / GRAPH), wanted.ids_T, wanted.prefill)
    error = float((found - wanted.logits_TV).norm() / wanted.logits_TV.norm())
    noise = reference.input_noise(artifacts[name], wanted)
    assert (noise > 0) == (name == "static")
    assert error < 1e-5 + 0.5 * noise


# ---- rules, broken one at a time -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, artifacts: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    write_graph(artifacts["static"], folder, opset=24, capacity=64)
    return folder


def node(model: onnx.ModelProto, kind: str, ends: str = "") -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind and n.name.endswith(ends))


def flip(model: onnx.ModelProto, folder: Path, suffix: str) -> None:
    where = place(next(t for t in model.graph.initializer if t.name.endswith(suffix)))
    assert where is not None
    data = bytearray((folder / DATA).read_bytes())
    data[where.offset] ^= 1
    (folder / DATA).write_bytes(data)


def other_axis(model: onnx.ModelProto, folder: Path) -> None:
    square = node(model, "DequantizeLinear", "o_proj/dequantized")
    next(a for a in square.attribute if a.name == "axis").i = 0


def zero_of_inputs(model: onnx.ModelProto, folder: Path) -> None:
    zero = next(t for t in model.graph.initializer if t.name == "scalar/int8/0")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(1, np.int8), zero.name))


def other_step(model: onnx.ModelProto, folder: Path) -> None:
    scale = next(t for t in model.graph.initializer if t.name == node(model, "QuantizeLinear").input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float16(1.01), scale.name))


def no_quantizer(model: onnx.ModelProto, folder: Path) -> None:
    """Every runtime takes it: one product simply gets its inputs as they were."""
    codes = node(model, "QuantizeLinear", "")
    back = next(n for n in model.graph.node if codes.output[0] in n.input)
    for user in model.graph.node:
        for i, name in enumerate(user.input):
            if name == back.output[0]:
                user.input[i] = codes.input[0]
    model.graph.node.remove(codes)
    model.graph.node.remove(back)
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == codes.input[1]))


BROKEN = {
    "code": (lambda m, f: flip(m, f, "up_proj.weight.codes"), "the codes of .* are not the artifact's"),
    "scale": (lambda m, f: flip(m, f, "up_proj.weight.scales"), "the scales of .* are not the artifact's"),
    "axis": (other_axis, "has axis 0, block_size 0 and scales .* for INT8 codes"),
    "zero of inputs": (zero_of_inputs, "with one constant scale and a zero point of 0"),
    "step": (other_step, "are rounded with a step of .*, those of the artifact with"),
    "no quantizer": (no_quantizer, "are rounded with a step of None, those of the artifact with"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_is_enforced(name: str, written: Path, artifacts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "graph")
    model = onnx.load(str(tmp_path / "graph" / GRAPH), load_external_data=False)
    change, message = BROKEN[name]
    change(model, tmp_path / "graph")
    (tmp_path / "graph" / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        lint(tmp_path / "graph" / GRAPH, artifacts["static"], 24)


def test_a_written_graph_passes_and_belongs_to_its_artifact(written: Path, artifacts: dict[str, Path]) -> None:
    assert lint(written / GRAPH, artifacts["static"], 24)["quantized_layers_compared"] == 42
    with pytest.raises(ArtifactError, match="not the artifact's|a step of .*, those of the artifact with None"):
        lint(written / GRAPH, artifacts["w8a16"], 24)


def test_siblings_of_two_kinds_stay_apart(build_model: Any, calib_text: Path, tmp_path: Path) -> None:
    """k_proj is dense beside quantized q and v: a product each, and the check of the export passes."""
    request = Int8Request(
        source=resolve(str(build_model("Qwen2", dtype="float16", drop=("head_dim",)))), out=tmp_path / "made",
        calib=str(calib_text), samples=2, seq_len=64, effort="fast", static=True, skip=("layers.0.self_attn.k_proj",),
    )  # fmt: skip
    artifact = quantize_int8(request).out
    (tmp_path / "out").mkdir()
    written = onnx_trt.write(Job(artifact=artifact, target=TARGET, context=64, batch=1, staged=tmp_path / "out"))
    assert written.record["lint"]["quantized_layers_compared"] == 13
