"""INT8 artifacts as `onnx`: quantizers and products are ours to the bit, weights the artifact's; what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

pytest.importorskip("onnxruntime_genai", reason="ONNXRUNTIME-GENAI ABSENT: the onnx format was not tested")

from compress import activations
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, ConfigError, UnsupportedError
from compress.files import file_sha256
from compress.formats import compressed_tensors, stored
from compress.plan import ActivationScheme, LayerScheme
from compress.quantize.int8_stage import Int8Request, quantize_int8
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme
from compress.workspace import resolve
from exporters.export import ExportRequest
from exporters.export import export as run_export
from exporters.genai import graph as genai_graph
from exporters.genai import int8
from exporters.genai import write as onnx_genai
from exporters.genai.check import compare_weights
from exporters.reader import Job, Written
from exporters.sizing.targets import TARGETS

K, N = 1184, 24  # more than 1024 products, of which float32 sums no more exactly
NAME = "/model/layers.0/mlp/up_proj/MatMul"


# ---- one product ---------------------------------------------------------------------------------------


@pytest.fixture
def one_product(tmp_path: Path) -> genai_graph.Graph:
    """A graph of one dense product, as the builder would name it."""
    float32 = TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.zeros((K, N), np.float32), "w")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name=NAME)],
        "one",
        [helper.make_tensor_value_info("x", float32, [1, "t", K])],
        [helper.make_tensor_value_info("y", float32, [1, "t", N])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), str(tmp_path / "model.onnx"))
    return genai_graph.Graph(tmp_path)


def weight_of(group_size: int = -1) -> QuantizedWeight:
    """Full-range codes: sums of products that 16 bits cannot hold."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, K), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 255
    groups = 1 if group_size == -1 else K // group_size
    return QuantizedWeight(
        codes_OI=codes,
        scale_OG=torch.rand(N, groups, generator=generator) * 1e-2 + 1e-3,
        zero_point_OG=torch.full((N, groups), 128, dtype=torch.uint8),
        scheme=Scheme(num_bits=8, group_size=group_size, symmetric=True),
    )


def inputs_of() -> torch.Tensor:
    """Tokens of every size, of equal values, of zeros, with outliers, and with values in the middle of two codes."""
    x = torch.randn(12, K, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 12).unsqueeze(1)
    x[0], x[1], x[2], x[3] = 0.0, 3.5, -0.25, 1e-36
    x[4, 7] *= 400
    x[5] = (torch.arange(K) % 255 - 127) / 2.0
    x[6] = x[6].abs()
    return x


def run(graph: genai_graph.Graph, x: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    out = tmp_path / "out"
    out.mkdir()
    graph.drop_unused()
    graph.save(out, "test")
    onnx.checker.check_model(str(out / "model.onnx"))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x[None].numpy()})[0])[0]


STATIC = StaticInput(scale=torch.tensor([0.02]), zero_point=torch.tensor([128], dtype=torch.uint8))
SHIFTED = StaticInput(scale=torch.tensor([0.02]), zero_point=torch.tensor([40], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("scheme", "static"),
    [
        (ActivationScheme(), None),
        (ActivationScheme(symmetric=False), None),
        (ActivationScheme(dynamic=False), STATIC),
        (ActivationScheme(dynamic=False, symmetric=False), SHIFTED),
    ],
    ids=lambda value: value.label() if isinstance(value, ActivationScheme) else "",
)
def test_integer_products_are_ours_to_the_bit(
    scheme: ActivationScheme, static: StaticInput | None, one_product: genai_graph.Graph, tmp_path: Path
) -> None:
    weight, x = weight_of(), inputs_of()
    int8.replace(one_product, one_product.nodes[0], weight, int8.Inputs(scheme=scheme, static=static), widened=False)
    found = run(one_product, x, tmp_path)
    wanted = activations.linear(x, weight, None, activations.quantize_inputs(x, scheme, static))
    assert bool(wanted.abs().max() > 0) and torch.equal(found, wanted)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_widened_weights_are_the_artifacts(group_size: int, one_product: genai_graph.Graph, tmp_path: Path) -> None:
    weight, x = weight_of(group_size), inputs_of()[4:8]
    int8.replace(one_product, one_product.nodes[0], weight, None, widened=True)
    found = run(one_product, x, tmp_path)
    wanted = x @ weight.dequantize().t()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("split", [False, True])
def test_products_of_8_bits_do_not_saturate(split: bool, one_product: genai_graph.Graph, tmp_path: Path) -> None:
    """Inputs that int8 holds, the largest and the smallest codes everywhere: integers come out, as int64 sums them."""
    weight = weight_of()
    weight = replace(weight, scale_OG=torch.ones_like(weight.scale_OG))
    x = torch.randint(0, 2, (6, K), generator=torch.Generator().manual_seed(2)) * 254 - 127
    x[0], x[1] = 127, -127
    int8.replace(one_product, one_product.nodes[0], weight, None, widened=False)
    if split:
        assert genai_graph.split_activations(one_product) == 1
    found = run(one_product, x.float(), tmp_path)
    wanted = x @ (weight.codes_OI.to(torch.int64) - 128).t()
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def test_blocks_divide_the_row() -> None:
    assert [int8.block_size(k, -1, "l") for k in (4096, 576, 96, 48)] == [128, 64, 32, 16]
    assert int8.block_size(4096, 32, "l") == 32
    with pytest.raises(UnsupportedError, match="l: 72 inputs are not whole blocks of 16"):
        int8.block_size(72, -1, "l")


# ---- whole models --------------------------------------------------------------------------------------


@pytest.fixture
def make(build_model: Any, calib_text: Path, tmp_path: Path) -> Any:
    def artifact(family: str = "Llama", sizes: dict[str, Any] | None = None, **changes: Any) -> Path:
        options = {"calib": str(calib_text), "samples": 2, "seq_len": 64, "effort": "fast", **changes}
        model = build_model(family, dtype="float16", **(sizes or {}))
        return quantize_int8(Int8Request(source=resolve(str(model)), out=tmp_path / "made", **options)).out

    return artifact


def export(artifact: Path, out: Path, **options: Any) -> Written:
    out.mkdir()
    job = Job(artifact=artifact, target=TARGETS["cpu"], context=128, batch=1, staged=out, options=options)
    return onnx_genai.write(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "changes", "counted", "activations"),
    [
        ("Qwen2", {"drop": ("head_dim",)}, {}, (14, 0), onnx_genai.OWN),
        (
            "Phi3",
            {"drop": ("head_dim",), "original_max_position_embeddings": 256},
            {"static": True, "sym_activations": False},
            (8, 0),
            onnx_genai.OWN,
        ),
        ("Gemma2", {}, {"scheme": "w8a16", "group_size": 32}, (14, 0), "int16"),
        (
            "Llama",
            {},
            {"skip": ("layers.0.self_attn.k_proj",), "sym_activations": False, "keep_inputs": 1},
            (13, 1),
            "int16",
        ),
    ],
    ids=["Qwen2-w8a8", "Phi3-static-asym", "Gemma2-w8a16g32", "Llama-asym-one-dense-one-kept"],
)
def test_families(
    family: str, sizes: Any, changes: Any, counted: tuple[int, int], activations: str, make: Any, tmp_path: Path
) -> None:
    """`write` itself compares weights, quantizers and logits, so reaching the end is most of the assertion."""
    artifact = make(family, sizes, **changes)
    written = export(artifact, tmp_path / "out")
    assert written.record["activations"] == activations
    assert written.record.get("head") == ("int8" if activations == "int16" else None)  # as the weights are
    verified = written.record["verified"]
    assert verified["layers_compared"] == {"quantized": counted[0], "dense": counted[1]}
    assert verified["relative_error"] <= verified["tolerance"] < 0.5
    folder = stored(Checkpoint.open(artifact))
    codes = sum(int(np.prod(folder.shape(layer))) for layer in folder.layers)
    assert codes <= written.parts["decoder linears"] < 1.6 * codes


@pytest.mark.slow
def test_weights_only_in_float32_is_exact_and_repeatable(make: Any, tmp_path: Path) -> None:
    artifact = make(scheme="w8a16")
    written = export(artifact, tmp_path / "first", activations="float32")
    assert written.record["verified"]["relative_error"] < 1e-5
    export(artifact, tmp_path / "second", activations="float32")
    names = [p.name for p in (tmp_path / "first").iterdir()]
    assert all(file_sha256(tmp_path / "first" / n) == file_sha256(tmp_path / "second" / n) for n in names)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> tuple[Path, Path]:
    """The reference model's first block as W8A8 with one range a layer, and its export."""
    folder = tmp_path_factory.mktemp("int8")
    model = folder / "model"
    shutil.copytree(reference_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(model / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or ".layers.0." in n}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    text = folder / "text.txt"
    text.write_text("the old house stood by the river and nobody had lived there for many years " * 60)
    request = Int8Request(
        source=resolve(str(model)), out=folder / "made", calib=str(text), samples=2, seq_len=64, effort="fast",
        static=True, kv_cache="int8",
    )  # fmt: skip
    artifact = quantize_int8(request).out
    source = resolve(str(artifact))
    request_ = ExportRequest(source=source, target=TARGETS["cpu"], out=folder / "out", context=128)
    outcome = run_export(request_)
    assert any("the KV cache" in note and "vLLM" in note for note in outcome.notes)
    return artifact, outcome.out


@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "input_scale"])
def test_one_changed_value_is_found(leaf: str, exported: tuple[Path, Path], tmp_path: Path) -> None:
    artifact, out = exported
    changed = tmp_path / "changed"
    shutil.copytree(artifact, changed)
    tensors = load_file(changed / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{leaf}"
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.int8 if leaf == "weight" else torch.int16).reshape(-1)[0] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    assert compare_weights(genai_graph.Graph(out), stored(Checkpoint.open(artifact)))["quantized"] == 7
    with pytest.raises(ArtifactError, match="up_proj"):
        compare_weights(genai_graph.Graph(out), stored(Checkpoint.open(changed)))


def test_a_quantizer_that_is_gone_is_found(exported: tuple[Path, Path]) -> None:
    artifact, out = exported
    config = json.loads((artifact / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    folder = stored(Checkpoint.open(artifact))
    plan = {layer: LayerScheme(weight=folder.scheme(layer).weight, input=ActivationScheme()) for layer in folder.plan}
    by_token = type(folder)(checkpoint=folder.checkpoint, format=folder.format, plan=type(folder.plan)(plan))
    with pytest.raises(ArtifactError, match="have one range in the graph or in the artifact only"):
        compare_weights(genai_graph.Graph(out), by_token)


def test_what_is_refused_before_any_work(make: Any, tmp_path: Path) -> None:
    made = make()
    with pytest.raises(ConfigError, match=r"--activations int16: .* itself says .*\(w8-sym-a8-asym\); leave it out"):
        export(made, tmp_path / "out", activations="int16")
    folder, four = stored(Checkpoint.open(made)), Scheme(num_bits=4, group_size=32, symmetric=True)
    tensors = load_file(made / "model.safetensors")
    for layer in folder.layers:
        rows, columns = folder.shape(layer)
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        zeros = torch.full((rows, columns // 32), 8, dtype=torch.uint8)
        ones = torch.ones(rows, columns // 32, dtype=torch.float16)
        weight = QuantizedWeight(codes_OI=codes, scale_OG=ones, zero_point_OG=zeros, scheme=four)
        for name in folder.part_names(layer).values():
            del tensors[name]
        parts = compressed_tensors.tensors(weight, LayerScheme(weight=four))
        tensors |= {f"{layer}.{leaf}": value for leaf, value in parts.items()}
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    plan = type(folder.plan)({layer: LayerScheme(weight=four) for layer in folder.layers})
    config["quantization_config"] = compressed_tensors.config(plan) | {"ignore": ["lm_head"]}
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="is w4g32-sym in a compressed-tensors folder, of which onnx takes"):
        export(made, tmp_path / "four")
