"""Folds at the widths of real models: a thousand and more value rows, told apart in one block."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.groups import Group, find_groups

SIZES = {"vocab_size": 32, "hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 1, "pad_token_id": 0}


def groups_of(family: str, sizes: dict[str, Any]) -> list[Group]:
    """The groups of the one block of a randomly initialised model, its norms away from their initial values."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    outputs: list[Tensor] = []
    blocks[0].register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))

    def run() -> Tensor:
        outputs.clear()
        model(torch.arange(16)[None], use_cache=False)
        return outputs[0]

    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2) if p.ndim == 1 else p.mul_(3)
        return find_groups(blocks[0], run)


def of_heads(start: int, value_heads: int, heads: int, size: int) -> list[int]:
    """The value row of each channel when consecutive heads share a value head; rows begin at `start`."""
    return [start + head * value_heads // heads * size + i for head in range(heads) for i in range(size)]


# family, sizes -> the producer's row that feeds each input channel of the output projection
CASES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "Llama-3-8B, 8 x 128": (
        "Llama",
        {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        of_heads(0, 8, 32, 128),
    ),
    "Gemma-2-9B, 8 x 256": (
        "Gemma2",
        {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
        of_heads(0, 8, 16, 256),
    ),
    "Gemma-2-27B, 16 x 128": (
        "Gemma2",
        {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128},
        of_heads(0, 16, 32, 128),
    ),
    "16 value heads, one a head": (
        "Llama",
        {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128},
        of_heads(0, 16, 16, 128),
    ),
    "Qwen3, 8 x 128 with normed queries and keys": (
        "Qwen3",
        {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        of_heads(0, 8, 16, 128),
    ),
    # stacked: 16 query heads, 8 key heads, then 8 value heads
    "Phi-3, fused qkv, 8 x 128": (
        "Phi3",
        {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8},
        of_heads(24 * 128, 8, 16, 128),
    ),
    # for each of 4 groups: 2 query heads, a key head, a value head
    "Falcon-40B style, interleaved qkv, 4 x 128": (
        "Falcon",
        {
            "ffn_hidden_size": 256,
            "num_attention_heads": 8,
            "num_kv_heads": 4,
            "new_decoder_architecture": True,
        },
        [(head // 2 * 4 + 3) * 128 + i for head in range(8) for i in range(128)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_value_rows_are_found_among_a_thousand(case: str) -> None:
    family, sizes, rows = CASES[case]
    group = next(g for g in groups_of(family, sizes) if g.name in ("o_proj", "dense"))
    assert group.fold is not None, group.reason
    assert group.fold.rows.tolist() == rows


def test_a_wide_gated_layer_folds_row_by_row() -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 256, "intermediate_size": 14336}
    group = groups_of("Llama", sizes)[-1]
    assert group.name == "down_proj"
    assert group.fold is not None and group.fold.producer == "mlp.up_proj"
    assert torch.equal(group.fold.rows, torch.arange(14336))
