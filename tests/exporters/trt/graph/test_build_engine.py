"""NVIDIA's own parser and compiler take what we write: TensorRT-RTX compiles for SM80 without a GPU. Nothing is run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporters.reader import Job
from exporters.trt import write as onnx_trt
from exporters.trt.graph import build_engine

TARGET: Any = SimpleNamespace(name="a100")  # the format asks a target for nothing


def compiler() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tensorrt_rtx", reason="TENSORRT-RTX ABSENT, NOTHING COMPILED: pip install '.[tensorrt-rtx]'")


def export(artifact: Path, folder: Path, opset: int, context: int = 256) -> Path:
    folder.mkdir()
    options = {"opset": opset}
    onnx_trt.write(Job(artifact=artifact, target=TARGET, context=context, batch=1, staged=folder, options=options))
    return folder


@pytest.fixture(scope="module")
def quantized_reference(reference_model: Path, round_to_nearest: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifact: Path = round_to_nearest(reference_model, tmp_path_factory.mktemp("build") / "artifact", 128)
    return artifact


@pytest.mark.parametrize("opset", [24, 21])
def test_reference_model_compiles_for_an_a100(
    opset: int, reference_model: Path, quantized_reference: Path, tmp_path: Path
) -> None:
    """Both precisions and both profiles; every INT4 product is computed from INT4 weights, and the plan is as small.

    Four products a layer: q, k, v are one, and gate, up.
    """
    compiler()
    profiles = ["prefill", "decode"]
    built = {}
    for label, artifact in (("float16", reference_model), ("int4", quantized_reference)):
        folder = export(artifact, tmp_path / label, opset)
        built[label] = build_engine.build(
            folder, folder / "model.engine", profiles=profiles, bindings="tensorrt_rtx", sm=80
        )
        assert (folder / "model.engine").stat().st_size == built[label]["engine_bytes"]
        seconds = built[label].pop("seconds")
        assert seconds > 0 and json.loads((folder / "model.engine.json").read_text()) == built[label]
    assert built["int4"]["int4_unfused"] == [] and built["int4"]["int4_fused"] == 24
    assert built["float16"]["int4_fused"] == 0
    # 18.9 MB of linears become 4.9 MB, in each of two profiles at most; the float16 plan holds them twice
    assert built["int4"]["engine_bytes"] < built["float16"]["engine_bytes"] - 14_000_000


@pytest.mark.parametrize("family", ["Qwen3", "Phi3", "Gemma2"])
def test_other_families_compile_in_both_precisions(
    family: str, build_model: Any, round_to_nearest: Any, tmp_path: Path
) -> None:
    """Norms of queries and keys, fused projections, soft caps with windows; INT4 in groups of 32; one profile."""
    compiler()
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    changes: dict[str, Any] = {
        "Qwen3": {},
        "Phi3": {"drop": ("head_dim",), "rope_parameters": partial},
        "Gemma2": {"sliding_window": 33},
    }[family]
    model = build_model(family, dtype="float16", **changes)
    quantized = round_to_nearest(model, tmp_path / "artifact", 32)
    for label, artifact in (("float16", model), ("int4", quantized)):
        for opset in (24, 21):
            folder = export(artifact, tmp_path / f"{label}-{opset}", opset, context=64)
            report = build_engine.build(
                folder, folder / "model.engine", profiles=["any"], bindings="tensorrt_rtx", sm=80
            )
            assert report["int4_unfused"] == [] and (report["int4_fused"] > 0) == (label == "int4")


def test_script_of_an_export_runs_alone(reference_model: Path, tmp_path: Path) -> None:
    """As on a device: the copied script in a process of its own, with nothing of ours to import."""
    compiler()
    folder = export(reference_model, tmp_path / "out", 24, context=64)
    command = [sys.executable, "-I", "build_engine.py", "--bindings", "tensorrt_rtx", "--sm", "86", "--profiles", "any"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    report = json.loads(run.stdout)
    assert (report["sm"], report["built_on"], report["library"]) == ("8.6", None, "tensorrt_rtx")
    assert (folder / "model.engine").stat().st_size == report["engine_bytes"]


def test_a_graph_that_nvidia_refuses_is_reported_by_node(reference_model: Path, tmp_path: Path) -> None:
    """An operator that it does not have, where the activation was."""
    compiler()
    import onnx

    folder = export(reference_model, tmp_path / "out", 24, context=64)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    next(n for n in model.graph.node if n.op_type == "Sigmoid").op_type = "StringNormalizer"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(build_engine.Refused, match=r"refuses node .*sigmoid"):
        build_engine.build(folder, folder / "model.engine", profiles=["any"], bindings="tensorrt_rtx", sm=80)
    assert not (folder / "model.engine").exists()


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 1000)
    (tmp_path / "build.json").write_text('{"data": "model.onnx.data"}')
    monkeypatch.setattr(build_engine, "load", lambda bindings, plan: None)
    monkeypatch.setattr(build_engine, "available_bytes", lambda: 2999)
    with pytest.raises(build_engine.Refused, match="pass --force"):
        build_engine.build(tmp_path, tmp_path / "e", profiles=["any"])


def test_old_and_absent_tensorrt_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"minimum_tensorrt": [10, 15], "opset": 24}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(build_engine.Refused, match="tensorrt is not installed"):
        build_engine.load("tensorrt", plan)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0.30"))
    with pytest.raises(build_engine.Refused, match="TensorRT 10.3.0.30 is older than 10.15.*--opset 21"):
        build_engine.load("tensorrt", plan)
    assert build_engine.load("tensorrt", {"minimum_tensorrt": [10, 3], "opset": 21}) is sys.modules["tensorrt"]


def test_layer_report_tells_fused_from_unfused() -> None:
    """Lines as TensorRT-RTX 1.7 writes them, shortened: one fused, one dequantized by a layer of its own."""
    fused = (
        "Name: a, LayerType: runtime_fusion, Inputs: [ { Datatype: Half } ], Constants: [ { Name: w, Datatype: Int4 } ]"
        ", Outputs: [ { Datatype: Half } ], Metadata: "
        "[ONNX Layer: l.up_proj/dequantized][ONNX Layer: l.up_proj][ONNX Layer: l.gate_proj]"
    )
    alone = "Name: b, LayerType: kgen, Constants: [ { Datatype: Int4 } ], Metadata: [ONNX Layer: l.o_proj/dequantized]"
    product = "Name: c, LayerType: gemm, Constants: [], Metadata: [ONNX Layer: l.o_proj]"
    report = build_engine.layer_report([fused, alone, product], ["l.up_proj", "l.gate_proj", "l.o_proj"], [])
    none8 = {"int8_fused": 0, "int8_unfused": [], "int8_by_int8": 0}
    assert report == {"layers": 3, "int4_fused": 2, "int4_unfused": ["l.o_proj"], **none8}
    assert build_engine.layer_report([], ["l.o_proj"], [])["int4_fused"] is None
    # two profiles: fused in one of them only is not fused
    assert build_engine.layer_report([fused, alone, product], ["l.up_proj"], [], 2)["int4_unfused"] == ["l.up_proj"]
    assert build_engine.layer_report([fused, fused], ["l.up_proj"], [], 2)["int4_fused"] == 1


def test_layer_report_reads_the_inspector_s_json_too() -> None:
    layer = {
        "Name": "a",
        "Inputs": [{"Name": "x", "Format/Datatype": "Row major INT8"}],
        "Constants": [{"Name": "w", "Format/Datatype": "Row major INT4"}],
        "Metadata": "[ONNX Layer: l.o_proj/dequantized]\x1e[ONNX Layer: l.o_proj]",
    }
    eight = {**layer, "Constants": [{"Name": "w", "Datatype": "Int8"}], "Metadata": "[ONNX Layer: l.k_proj]"}
    half = {**layer, "Constants": [{"Name": "w", "Datatype": "Half"}], "Metadata": "[ONNX Layer: l.up_proj]"}
    lines = [json.dumps(x) for x in (layer, eight, half)]
    report = build_engine.layer_report(lines, ["l.o_proj", "l.up_proj"], ["l.k_proj", "l.up_proj"])
    assert (report["int4_fused"], report["int4_unfused"]) == (1, ["l.up_proj"])
    assert (report["int8_fused"], report["int8_unfused"], report["int8_by_int8"]) == (1, ["l.up_proj"], 1)


def test_layer_report_tells_int8_inputs_from_others() -> None:
    """An INT8 output is another layer's quantizer, and says nothing of a product."""
    line = (
        "Name: {0}, LayerType: gemm, Inputs: [ {{ Datatype: {1} }} ], Constants: [ {{ Datatype: {2} }} ], Outputs: "
        "[ {{ Datatype: {3} }} ], Metadata: [ONNX Layer: l.{0}]"
    )
    lines = [
        line.format("both", "Int8", "Int8", "Half"),
        line.format("weights", "Half", "Int8", "Half"),
        line.format("neither", "Half", "Half", "Int8"),
    ]
    report = build_engine.layer_report(lines, [], ["l.both", "l.weights", "l.neither"])
    assert (report["int8_fused"], report["int8_unfused"], report["int8_by_int8"]) == (2, ["l.neither"], 1)
