"""Format `tensorrt` as a whole: real engines for absent cards, compiled by TensorRT-RTX without a GPU. None is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError, ConfigError
from compress.workspace import resolve
from exporters.engine import choose, write
from exporters.engine.choose import Builder
from exporters.export import ExportOutcome, ExportRequest, export
from exporters.sizing.targets import TARGETS
from exporters.trt.graph.build_engine import sha256_of

pytest.importorskip("onnxruntime")
ABSENT = "TENSORRT-RTX ABSENT, NOTHING COMPILED: pip install '.[tensorrt-rtx]'"


def run(artifact: Path, out: Path, target: str = "a100", **options: Any) -> ExportOutcome:
    source = resolve(str(artifact))
    return export(
        ExportRequest(
            source=source, target=TARGETS[target], format="tensorrt", context=128, out=out, force=True, options=options
        )
    )


def test_engine_of_an_int4_artifact(awq_folder: Any, tmp_path: Path) -> None:
    """For an A100 that is not here: every product from INT4 weights in both profiles, stamped."""
    pytest.importorskip("tensorrt_rtx", reason=ABSENT)
    artifact = awq_folder()
    made = run(artifact, tmp_path / "out")
    assert {p.name for p in made.out.iterdir()} == {
        "README.md", "compress.json", "generation_config.json", "model.engine", "model.engine.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    stamp = json.loads((made.out / write.STAMP).read_text())
    assert (stamp["library"], stamp["sm"], stamp["built_on"]) == ("tensorrt_rtx", "8.0", None)
    assert stamp["int4_fused"] == 8 and stamp["int4_unfused"] == []
    assert stamp["sha256"] == sha256_of(made.out / write.ENGINE) and len(stamp["onnx"]) == 2
    assert stamp["shapes"]["prefill"]["input_ids"] == {"min": [1, 1], "opt": [1, 64], "max": [1, 128]}
    assert stamp["shapes"]["decode"]["past_key_values.1.key"]["max"] == [1, 2, 128, 64]
    engine = made.record["written"]["engine"]
    assert engine["onnx"] == stamp["onnx"] and engine["version"] == stamp["version"]
    assert engine["profiles"]["decode"] == {"min": [1, 1], "opt": [1, 1], "max": [1, 1]}
    assert made.record["written"]["verified"]["int4_fused"] == 8
    said = " ".join(made.notes)
    assert "built and not run" in said and "times its weights" in said and "whether the engine runs there" in said
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "scratch folders were left"


def test_engine_of_a_float16_model_with_one_profile(reference_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=ABSENT)
    made = run(reference_model, tmp_path / "out", profiles="one", opset=21, builder="tensorrt-rtx")
    stamp = json.loads((made.out / write.STAMP).read_text())
    assert stamp["profiles"] == ["any"] and stamp["int4_fused"] == 0
    # the embedding and the linears once, and kernels
    assert stamp["onnx_data_bytes"] < stamp["engine_bytes"] < 1.3 * stamp["onnx_data_bytes"]
    assert "| `any` | 1 to 128 | 1 |" in (made.out / "README.md").read_text()


def test_a_card_that_nothing_here_builds_for_gives_the_folder(reference_model: Path, tmp_path: Path) -> None:
    made = run(reference_model, tmp_path / "out", target="orin")
    assert (made.out / "build_engine.py").exists() and not (made.out / write.ENGINE).exists()
    assert made.record["written"]["engine"] is None
    assert "no engine was built: orin is SM 8.7" in made.notes[0] and "python3 build_engine.py" in made.notes[0]


def test_what_the_compiler_refuses_leaves_nothing(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that is not there when the script asks for it: its sentence arrives, and no folder."""
    monkeypatch.setattr(write, "choose", lambda *a, **k: Builder(library="absent", bindings="tensorrt", sm=None))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "tensorrt.py").write_text("raise ImportError('no libnvinfer.so here')")
    with pytest.raises(ArtifactError, match=r"absent built no engine \(tensorrt is not installed for .*no libnvinfer"):
        run(reference_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfused_linears_fail_the_export() -> None:
    builder = Builder(library="tensorrt", bindings="tensorrt", sm=None)
    none8 = {"int8_fused": 0, "int8_unfused": []}
    stamp: dict[str, Any] = {"version": "10.16", "int4_fused": 23, "int4_unfused": ["layers.0.o_proj"], **none8}
    with pytest.raises(ArtifactError, match=r"10.16 dequantizes 1 of 24 INT4 linears .*layers.0.o_proj first"):
        write.refuse_unfused(stamp, builder)
    with pytest.raises(ArtifactError, match="does not describe the engine's layers"):
        write.refuse_unfused({**stamp, "int4_unfused": None}, builder)
    write.refuse_unfused({**stamp, "int4_unfused": []}, builder)
    with pytest.raises(ArtifactError, match=r"dequantizes 2 of 2 INT8 linears"):
        write.refuse_unfused({**stamp, "int4_unfused": [], "int8_unfused": ["a", "b"]}, builder)


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 1000)
    monkeypatch.setattr(write, "available_bytes", lambda: 2999)
    with pytest.raises(ConfigError, match="--format onnx-trt and build on a larger machine"):
        write.build(tmp_path, Builder(library="tensorrt", bindings="tensorrt", sm=None), ["any"])


def test_this_machine_s_card_comes_from_the_driver() -> None:
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (None, None)
    assert choose.sm_here() == (None if major is None else f"{major}.{minor}")
