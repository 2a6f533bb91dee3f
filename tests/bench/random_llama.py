"""A Llama of random blocks in a folder, one shard a block, with the reference tokenizer; never whole in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

import calibration_data

VOCAB = 4096  # that of the reference tokenizer


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


LLAMA_3_8B = Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128)
LLAMA_3_70B = Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128)


def build(folder: Path, shape: Shape, depth: int, *, scale: float = 0.03, dtype: torch.dtype = torch.float16) -> None:
    """Write the model; weights are normal with standard deviation `scale`, from seed 0."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=depth,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((calibration_data.reference_model() / name).read_bytes())
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    weight_map: dict[str, str] = {}

    def shard(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shard(
        "outside.safetensors",
        {"model.embed_tokens.weight": random(VOCAB, hidden), "model.norm.weight": random(hidden) + 1},
    )
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden),
        "mlp.down_proj": (hidden, shape.intermediate),
    }
    for i in range(depth):
        prefix = f"model.layers.{i}."
        norms = {f"{prefix}{n}_layernorm.weight": random(hidden) + 1 for n in ("input", "post_attention")}
        matrices = {f"{prefix}{name}.weight": random(*size) for name, size in sizes.items()}
        shard(f"block-{i:03d}.safetensors", norms | matrices)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
