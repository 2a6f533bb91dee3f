"""The format as a whole: what lies in the folder, what is refused, and that a wrong graph is never kept."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.quantize.awq_stage import AwqRequest, quantize_awq
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.scheme import Scheme
from compress.tell import Heard
from compress.workspace import resolve
from exporters.reader import Job, Written
from exporters.trt import write as onnx_trt
from exporters.trt.graph.external import place
from exporters.trt.graph.write import DATA, GRAPH
from exporters.trt.layout import LAYOUT

pytest.importorskip("onnxruntime")
TARGET: Any = SimpleNamespace(name="orin")  # the format asks a target for nothing


def write(artifact: Path, folder: Path, **changes: Any) -> Written:
    folder.mkdir()
    chosen = {"context": 128, "batch": 2, **changes}
    return onnx_trt.write(Job(artifact=artifact, target=TARGET, staged=folder, **chosen))


@pytest.fixture
def quantized(build_model: Any, tmp_path: Path, calib_text: Path) -> Any:
    def build(symmetric: bool, family: str = "Llama") -> Path:
        out = tmp_path / f"artifact-{symmetric}"
        scheme = Scheme(group_size=32, symmetric=symmetric)
        source = resolve(str(build_model(family, dtype="float16")))
        quantize_awq(
            AwqRequest(source=source, out=out, scheme=scheme, calib=str(calib_text), samples=2, seq_len=32)
        )  # fmt: skip
        return out

    return build


def test_folder_of_a_quantized_artifact(quantized: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    tell = Heard()
    written = write(quantized(True), folder, tell=tell)
    assert {p.name for p in folder.iterdir()} == {
        GRAPH, DATA, "build.json", "build_engine.py", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert (written.record["precision"], written.record["opset"]) == ("int4", 24)
    assert written.record["lint"]["quantized_layers_compared"] == 14
    verified = written.record["verified"]
    assert 0 < verified["relative_error"] < verified["tolerance"] == onnx_trt.tolerance(2) < 4e-3
    # every part counts its weights, and the data file holds nothing else but the gaps of alignment
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    places = [p for t in model.graph.initializer if (p := place(t)) is not None]
    assert sum(written.parts.values()) == sum(p.length for p in places)
    linears = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert written.parts["decoder linears"] == 2 * (linears // 2 + linears // 32 * 2)
    assert len(tell.said) == 3 and "no TensorRT engine was built or run" in written.notes[0]
    plan = json.loads((folder / "build.json").read_text())
    assert plan["profiles"]["decode"]["input_ids"] == {"min": [2, 1], "opt": [2, 1], "max": [2, 1]}
    assert plan["profiles"]["prefill"]["past_key_values.1.value"]["max"] == [2, 2, 128, 16]
    assert len(plan["quantized_layers"]) == 8  # four products a layer: q, k, v are one, and gate, up
    inputs = {i.name for i in model.graph.input}
    assert all(set(shapes) == inputs for shapes in plan["profiles"].values())
    assert set(plan["caches"]) == {n for n in inputs if n.startswith("past_")}
    assert set(plan["caches"].values()) | {"logits"} == {o.name for o in model.graph.output}


def test_same_artifact_gives_the_same_bytes(quantized: Any, tmp_path: Path) -> None:
    artifact = quantized(True, "Gemma3Text")
    for name in ("a", "b"):
        assert write(artifact, tmp_path / name, options={"opset": 21}).record["opset"] == 21
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_unquantized_folder_gives_float16(reference_model: Path, tmp_path: Path) -> None:
    written = write(reference_model, tmp_path / "out")
    assert written.record["precision"] == "float16"
    # the tied matrix is stored once: 11 M parameters of two bytes, and tables
    assert written.parts["embedding"] == 4096 * 384 * 2 and "lm_head" not in written.parts
    assert (tmp_path / "out" / DATA).stat().st_size < 23.5e6


def test_a_graph_that_computes_something_else_is_not_kept(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One norm of one layer is another layer's: valid, complete, and wrong."""

    def wrong(artifact: Path, folder: Path, **options: Any) -> dict[str, int]:
        parts = honest(artifact, folder, **options)
        model = onnx.load(str(folder / GRAPH), load_external_data=False)
        norm = next(n for n in model.graph.node if n.name == "model.layers.3.post_attention_layernorm")
        norm.input[1] = "model.layers.2.post_attention_layernorm.weight"
        left = next(t for t in model.graph.initializer if t.name == "model.layers.3.post_attention_layernorm.weight")
        model.graph.initializer.remove(left)
        (folder / GRAPH).write_bytes(model.SerializeToString())
        return parts

    honest = onnx_trt.write_graph
    monkeypatch.setattr(onnx_trt, "write_graph", wrong)
    with pytest.raises(ArtifactError, match="logits differ from the artifact's"):
        write(reference_model, tmp_path / "out")


def test_a_check_that_does_not_fit_is_refused(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_trt, "available_bytes", lambda: 40_000_000)  # of 48 needed
    with pytest.raises(ConfigError, match="takes about 0.05 GB and 0.04 GB are free; .* on a larger machine"):
        write(reference_model, tmp_path / "out")


def test_zero_points_are_refused(quantized: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a zero point is not 8.*--sym"):
        write(quantized(False), tmp_path / "out")
    assert LAYOUT.wants(Scheme(group_size=32)) == Scheme(group_size=32, symmetric=True)
    assert LAYOUT.wants(Scheme(symmetric=True)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 47}, "--context 47: choose 48 .* to 2048"),
        ({"context": 4096}, "--context 4096: choose 48 .* to 2048"),
        ({"options": {"opset": 23}}, "--opset 23: onnx-trt writes 24 .* and 21"),
    ],
)
def test_options_out_of_range(reference_model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(reference_model, tmp_path / "out", **changes)


def test_absent_onnx_is_one_sentence() -> None:
    code = "import sys; sys.modules['onnx'] = None; import exporters.trt.write"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "ConfigError: onnx-trt needs the package onnx; pip install" in run.stderr


def test_int8_that_tensorrt_does_not_take_is_refused(build_model: Any, calib_text: Path, tmp_path: Path) -> None:
    source, options = resolve(str(build_model())), {"calib": str(calib_text), "samples": 2, "seq_len": 64}
    for name, said, changes in (
        ("by-token", "w8-sym-a8-asym", {}),
        ("zeros", "w8-sym-a8-asym-static", {"static": True, "sym_activations": False}),
        ("groups", "w8g32-sym", {"scheme": "w8a16", "group_size": 32}),
    ):
        request = Int8Request(source=source, out=tmp_path / name, effort="fast", **options, **changes)
        with pytest.raises(UnsupportedError, match=f"reads INT8 with one scale a row .*, not {said}"):
            write(quantize_int8(request).out, tmp_path / f"{name}-out")
