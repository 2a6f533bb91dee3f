"""The plugin operators' meaning, against transformers and torch, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from compress.errors import UnsupportedError
from exporters.edge import graph as edge_graph

onnx = pytest.importorskip("onnx")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3], ids=["default", "llama3"])
def test_rope_table_is_transformers(rope: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=2048, rope_parameters=dict(rope)
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1, 1, 1), torch.arange(600)[None])
    written = {"head_dim": 64, "rope_theta": rope["rope_theta"], "rope_scaling": {**rope, "type": rope["rope_type"]}}
    table = edge_graph.rope_table(written, 600)
    # transformers computes the angles in float32: at position 600 they are off by 600 * 2**-24
    torch.testing.assert_close(table, torch.cat([cos[0, :, :32], sin[0, :, :32]], -1), atol=2e-4, rtol=0)


def test_attention_over_pages_is_causal_attention() -> None:
    """130 tokens at once and 3 one by one, so that a page ends inside the prompt; grouped queries; a norm of heads."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, total = 4, 2, 16, 133
    qkv = torch.randn(total, (heads + 2 * kv_heads) * dim, generator=generator)
    gamma_q, gamma_k = torch.rand(dim, generator=generator) + 0.5, torch.rand(dim, generator=generator) + 0.5
    table = edge_graph.rope_table({"head_dim": dim, "rope_theta": 10000.0}, total)
    keywords = {
        "num_q_heads": heads, "num_kv_heads": kv_heads, "head_size": dim, "attention_scale": 0.3,
        "enable_qk_norm": 1, "rms_norm_eps": 1e-5, "sliding_window_size": -1,
    }  # fmt: skip
    pages = torch.zeros(2, 3, edge_graph.PAGE_TOKENS, kv_heads, dim)
    page_table = torch.tensor([[[2, 0], [5, 3]]])  # keys in pages 2 and 0 of three, values three rows further
    found = []
    for start, end in [(0, 130), (130, 131), (131, 132), (132, 133)]:
        arguments = [
            qkv[start:end], pages, None, table[start:end], torch.tensor([start]), page_table, gamma_q, gamma_k
        ]  # fmt: skip
        out, pages = edge_graph.attention(arguments, keywords)
        found.append(out)

    def normed(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (dim,), gamma, 1e-5)

    q, k, v = qkv.reshape(total, -1, dim).split([heads, kv_heads, kv_heads], 1)
    q, k = edge_graph.rotate(normed(q, gamma_q), table), edge_graph.rotate(normed(k, gamma_k), table)
    wanted = scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(torch.cat(found), wanted.transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert not pages[:, 1].any()  # a page that the table does not name stays as it was


def test_features_and_operators_without_a_definition_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="enable_fp8_kv_cache=1 has no definition"):
        edge_graph.attention([], {"enable_fp8_kv_cache": 1})
    with pytest.raises(UnsupportedError, match="rope type 'yarn'"):
        edge_graph.rope_table({"head_dim": 8, "rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}, 3)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Softsign", ["x"], ["x2"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [value])), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="ai.onnx.Softsign has no definition here"):
        edge_graph._run(edge_graph.Graph(tmp_path), [{"x": torch.ones(1)}])
