"""What exporters read, made in seconds: small artifacts in the AutoAWQ layout, and one exported to `onnx`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import numerics
from compress.formats import awq_gemm
from compress.plan import DENSE, LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme


@pytest.fixture
def awq_folder(build_model: Callable[..., Path]) -> Callable[..., Path]:
    """Builds a model of a family and rounds its blocks' projections to INT4; returns its folder."""

    def make(family: str = "Llama", *, symmetric: bool = True, keep: tuple[str, ...] = (), **changes: Any) -> Path:
        sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, **changes}
        folder = build_model(family, dtype="float16", **sizes)
        scheme = Scheme(group_size=128, symmetric=symmetric)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in load_file(folder / "model.safetensors").items():
            layer = name.removesuffix(".weight")
            if ".layers." not in name or value.ndim != 2 or layer.endswith(keep or ("none",)):
                tensors[name] = value
                continue
            groups = numerics.to_groups(value.float(), scheme)
            scale, zero = numerics.scale_and_zero(*numerics.range_of(groups), scheme)
            codes = numerics.quantize(groups, scale, zero, scheme)
            packed = awq_gemm.tensors(QuantizedWeight.from_parts(codes, scale, zero, scheme))
            tensors.update({f"{layer}.{suffix}": part for suffix, part in packed.items()})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        plan = LayerPlan({**dict.fromkeys(("lm_head", *keep), DENSE), "*": LayerScheme(weight=scheme)})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = awq_gemm.config(plan)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: dict[str, bytes]) -> tuple[Path, Path]:
    """The artifact (asymmetric INT4, group 32, untied) and what the `onnx` format wrote for a context of 128."""
    pytest.importorskip("onnxruntime_genai", reason="ONNXRUNTIME-GENAI ABSENT: the onnx format was not tested")
    import torch
    import transformers

    from compress.quantize.awq_stage import AwqRequest, quantize_awq
    from compress.scheme import Scheme
    from compress.workspace import resolve
    from exporters.genai import write as onnx_genai
    from exporters.reader import Job
    from exporters.sizing.targets import TARGETS

    root = tmp_path_factory.mktemp("exported")
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
            else:
                p.mul_(3)
    model.half().save_pretrained(root / "model")
    for name, content in tokenizer_files.items():
        (root / "model" / name).write_bytes(content)
    text = root / "calib.txt"
    text.write_text("the old house stood by the river and nobody had lived there for years " * 60, encoding="utf-8")
    artifact = quantize_awq(
        AwqRequest(
            source=resolve(str(root / "model")),
            out=root / "int4",
            scheme=Scheme(group_size=32),
            calib=str(text),
            samples=4,
            seq_len=64,
        )  # fmt: skip
    ).out
    out = root / "onnx"
    out.mkdir()
    onnx_genai.write(Job(artifact=artifact, target=TARGETS["cpu"], context=128, batch=1, staged=out))
    return artifact, out
