"""INT8 artifacts for TensorRT Edge-LLM: ModelOpt's layout; the exporter's graph followed from weights to inputs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import stored
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.workspace import resolve
from exporters.edge import check as edge_check
from exporters.edge import env as edge_env
from exporters.edge import folder as edge_folder
from exporters.edge import graph as edge_graph
from exporters.edge import int8
from exporters.edge import write as edge
from exporters.reader import Job
from exporters.sizing.targets import TARGETS

SKIPPED = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def make(build_model: Any, calib_text: Path, tmp_path: Path) -> Any:
    def artifact(family: str = "Qwen3", **changes: Any) -> Path:
        options = {"calib": str(calib_text), "samples": 2, "seq_len": 64, "effort": "fast", "static": True, **changes}
        drop = ("head_dim",) if family == "Phi3" else ()
        source = resolve(str(build_model(family, dtype="float16", drop=drop)))
        return quantize_int8(Int8Request(source=source, out=tmp_path / "made", **options)).out

    return artifact


def test_the_folder_that_is_handed_over(make: Any, tmp_path: Path) -> None:
    artifact = make(skip=(SKIPPED,))
    checkpoint, out = Checkpoint.open(artifact), tmp_path / "in"
    out.mkdir()
    handed = edge_folder.hand_over(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    said = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert "quantization_config" not in config and said["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    assert said["exclude_modules"] == ["lm_head", SKIPPED]
    tensors, folder = load_file(out / "model.safetensors"), stored(checkpoint)
    assert len(tensors) == handed.tensors
    for layer in folder.layers:
        weight, static = folder.weight(layer), folder.static(layer)
        assert static is not None
        found = {leaf: tensors.pop(f"{layer}.{leaf}") for leaf in ("weight", "weight_scale", "input_scale")}
        assert [t.dtype for t in found.values()] == [torch.int8, torch.float32, torch.float32]
        assert torch.equal(found["weight"].float() * found["weight_scale"][:, None], weight.dequantize())
        assert float(found["input_scale"]) == float(static.scale)
        smooth = tensors.pop(f"{layer}.pre_quant_scale")
        assert smooth.dtype == torch.float16 and bool((smooth == 1).all()), "a missing one is dropped without a word"
    assert {n for n, t in tensors.items() if t.dtype != torch.float16} == set()


def test_what_it_does_not_take(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="compressed-tensors.*or `compress int8 --static`"):
        edge_folder.check_model(Checkpoint.open(make(static=False)), 64)


def test_fused_projections_are_cut_between_rows(make: Any, tmp_path: Path) -> None:
    """Phi-3 as a Llama: the same codes, scales and ranges under the names of its parts, quantized or not."""
    checkpoint, out = Checkpoint.open(make("Phi3", skip=("model.layers.1.mlp.gate_up_proj",))), tmp_path / "in"
    out.mkdir()
    edge_folder.check_model(checkpoint, 64)
    handed = edge_folder.hand_over(checkpoint, out)
    config = json.loads((out / "config.json").read_text())
    said = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert said["exclude_modules"] == ["lm_head", *(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up"))]
    found, source = load_file(out / "model.safetensors"), stored(checkpoint)
    assert len(found) == handed.tensors and not any("qkv" in n or "gate_up" in n for n in found)
    for fused, names in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        layer, above = f"model.layers.0.{fused}", f"model.layers.0.{fused.split('.')[0]}"
        made = {leaf: [found[f"{above}.{n}_proj.{leaf}"] for n in names] for leaf in ("weight", "weight_scale")}
        rows = torch.cat(made["weight"]).float() * torch.cat(made["weight_scale"])[:, None]
        static = source.static(layer)
        assert static is not None and torch.equal(rows, source.weight(layer).dequantize())
        assert {float(found[f"{above}.{n}_proj.input_scale"]) for n in names} == {float(static.scale)}
    parts = [found[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up")]
    assert torch.equal(torch.cat(parts), checkpoint.tensor("model.layers.1.mlp.gate_up_proj.weight"))
    assert {name for name, _ in int8.expected(checkpoint)} == {n[:-12] for n in found if n.endswith(".input_scale")}


def test_quantizers_of_the_graph_are_computed_as_onnx_says() -> None:
    x = torch.tensor([[-3.0, 0.25, 0.75, 500.0]])
    scale = torch.tensor([0.5])
    codes = edge_graph._OPERATORS["", "QuantizeLinear"]([x, scale], {"output_dtype": 3})[0]
    assert codes.tolist() == [[-6.0, 0.0, 2.0, 127.0]]  # half to even
    back = edge_graph._OPERATORS["", "DequantizeLinear"]([codes, scale], {})[0]
    assert back.tolist() == [[-3.0, 0.0, 1.0, 63.5]]
    rows = edge_graph._OPERATORS["", "DequantizeLinear"](
        [torch.ones(2, 3, dtype=torch.int8), torch.tensor([2.0, 3.0])], {"axis": 0}
    )[0]
    assert rows.tolist() == [[2.0] * 3, [3.0] * 3]
    with pytest.raises(UnsupportedError, match="no definition here"):
        edge_graph._OPERATORS["", "QuantizeLinear"]([x, scale], {"output_dtype": 2})


@pytest.mark.slow
def test_an_export_is_followed_and_one_changed_value_is_found(make: Any, tmp_path: Path) -> None:
    found = edge_env.ready()
    if found is None and os.environ.get("COMPRESS_EDGE_TEST") != "1":
        pytest.skip("EDGE-LLM ABSENT: its exporter was not run; COMPRESS_EDGE_TEST=1 makes its environment (2 GB)")
    artifact = make(skip=(SKIPPED,))
    staged = tmp_path / "staged"
    staged.mkdir()
    written = edge.write(Job(artifact=artifact, target=TARGETS["orin"], context=64, batch=1, staged=staged))
    verified = written.record["verified"]
    assert verified["equal"]["int8_layers"] == 13 and verified["equal"]["int4_layers"] == 0
    assert verified["relative_error"] <= verified["tolerance"]
    tensors = load_file(artifact / "model.safetensors")
    for leaf in ("weight", "weight_scale", "input_scale"):
        name = f"model.layers.1.mlp.down_proj.{leaf}"
        changed = {n: t.clone() for n, t in tensors.items()}
        changed[name].view(torch.int8 if leaf == "weight" else torch.int16).reshape(-1)[0] += 1
        folder = tmp_path / leaf
        folder.mkdir()
        (folder / "config.json").write_bytes((artifact / "config.json").read_bytes())
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ArtifactError, match=f"model.layers.1.mlp.down_proj {leaf} differs from the artifact in 1"):
            edge_check.check_weights(Checkpoint.open(folder), staged / "llm")
