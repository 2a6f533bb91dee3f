"""A small INT4 Llama and its ONNX folder, made once for the tests of the format and of the bundle."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: dict[str, bytes]) -> tuple[Path, Path]:
    """The artifact (asymmetric INT4, group 32, untied) and what the `onnx` format wrote for a context of 128."""
    pytest.importorskip("onnxruntime_genai", reason="ONNXRUNTIME-GENAI ABSENT: the onnx format was not tested")
    import torch
    import transformers

    from compress.quantize.run import AwqRequest, quantize_awq
    from compress.scheme import Scheme
    from compress.workspace import resolve
    from exporters import onnx_genai
    from exporters.format import Job
    from exporters.targets import Target

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
    target = Target(name="cpu", memory_bytes=8 << 30, usable=0.9)
    onnx_genai.write(Job(artifact=artifact, target=target, context=128, batch=1, staged=out))
    return artifact, out
