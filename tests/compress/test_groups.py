"""Groups and folds of every family, found without a line of code for any of them, and proven on the whole model."""

from typing import Any

import pytest
import torch

from compress.groups import Group, apply_fold, find_groups, scale_columns
from compress.model import StreamedModel

NO_HEAD = {"drop": ("head_dim",)}
FALCON = {"drop": ("num_key_value_heads", "intermediate_size", "head_dim", "max_position_embeddings")}
# family -> changes to the sizes, and the producer expected for each group, in order of execution
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str | None]]] = {
    "llama": ("Llama", {}, ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]),
    "mistral": ("Mistral", {}, ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]),
    "qwen2": ("Qwen2", NO_HEAD, ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]),
    "qwen3": ("Qwen3", {}, ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj"]),
    "gemma2": ("Gemma2", {}, ["input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"]),
    "gemma3": ("Gemma3Text", {}, ["input_layernorm", "v_proj", "pre_feedforward_layernorm", "up_proj"]),
    "phi3": ("Phi3", NO_HEAD, ["input_layernorm", "qkv_proj", "post_attention_layernorm", "gate_up_proj"]),
    "olmo2": ("Olmo2", NO_HEAD, [None, "v_proj", None, "up_proj"]),
    "gpt-neox": (
        "GPTNeoX",
        {"drop": ("head_dim", "num_key_value_heads")},
        ["input_layernorm", "query_key_value", "post_attention_layernorm", None],
    ),
    "falcon-7b-style": ("Falcon", FALCON, ["input_layernorm", "query_key_value", None]),
    "falcon-40b-style": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        ["ln_attn", "query_key_value", "ln_mlp", None],
    ),
    "gpt2": (
        "GPT2",
        {"drop": tuple(["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
         + ("num_key_value_heads", "max_position_embeddings"), "n_embd": 64, "n_layer": 2, "n_head": 4},
        ["ln_1", "c_attn", "ln_2", None],
    ),
}  # fmt: skip
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(3))


def producers(groups: list[Group]) -> list[str | None]:
    return [g.fold.producer.rsplit(".", 1)[-1] if g.fold else None for g in groups]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_folding_every_group_leaves_the_model_as_it_was(family: str, build_model: Any) -> None:
    """All folds of all blocks at once, with scales over two orders of magnitude: the logits must not move."""
    from transformers import AutoModelForCausalLM

    name, changes, expected = FAMILIES[family]
    folder = build_model(name, **changes)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    model = StreamedModel.open(folder)
    plain, folded = model.embed(IDS), model.embed(IDS)
    probe = IDS[:1, :16]
    generator = torch.Generator().manual_seed(1)
    for index in range(model.num_blocks):
        block = model.load_block(index)
        entering = plain[:1, :16]
        before = {k: v.clone() for k, v in block.state_dict().items()}
        groups = find_groups(block, lambda i=index, x=entering: model.run_block(i, x))
        assert all(torch.equal(before[k], v) for k, v in block.state_dict().items()), "the search left a mark"
        assert producers(groups) == expected
        assert all(g.reason for g in groups if g.fold is None)
        plain = model.run_block(index, plain)
        for group in groups:
            if group.fold is None:
                continue
            shared = group.fold.channels_share()
            s_I = torch.exp(torch.randn(int(shared.max()) + 1, generator=generator))[shared]
            actual = apply_fold(block, group.fold, s_I, torch.float32)
            torch.testing.assert_close(actual, s_I, rtol=1e-5, atol=0)
            for layer in group.layers:
                scale_columns(block.get_submodule(layer), actual)
        folded = model.run_block(index, folded)
        model.release_block(index)
    assert probe.shape == (1, 16)
    streamed, after = model.head(plain), model.head(folded)
    torch.testing.assert_close(streamed, original, rtol=0, atol=0)
    noise = float(original.abs().max()) * 2e-5
    assert float((after - original).abs().max()) < noise


@torch.no_grad()
def test_grouped_query_value_rows_are_shared_by_their_heads(build_model: Any) -> None:
    model = StreamedModel.open(build_model("Llama"))
    hidden = model.embed(IDS)[:1, :16]
    block = model.load_block(0)
    out = next(g for g in find_groups(block, lambda: model.run_block(0, hidden)) if g.name == "o_proj")
    assert out.fold is not None
    # 4 heads of 16 channels over 2 key-value heads: heads 0, 1 read the first value head, heads 2, 3 the second
    head = torch.arange(16)
    assert out.fold.rows.tolist() == torch.cat([head, head, head + 16, head + 16]).tolist()


@torch.no_grad()
def test_rounding_a_norm_to_float16_is_made_up_for_in_the_columns(build_model: Any) -> None:
    model = StreamedModel.open(build_model("Llama"))
    hidden = model.embed(IDS)
    block = model.load_block(0)
    group = find_groups(block, lambda: model.run_block(0, hidden[:1, :16]))[0]
    assert group.fold is not None
    before = model.run_block(0, hidden)
    s_I = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.3
    actual = apply_fold(block, group.fold, s_I, torch.float16)
    weight = block.get_submodule("input_layernorm").weight
    assert torch.equal(weight, weight.half().float())
    for layer in group.layers:
        scale_columns(block.get_submodule(layer), actual)
    torch.testing.assert_close(model.run_block(0, hidden), before, rtol=1e-4, atol=1e-4)


def test_third_party_llama(shared_data: Any) -> None:
    model = StreamedModel.open(shared_data / "stories260K")
    ids = torch.randint(0, model.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.embed(ids)
        block = model.load_block(0)
        groups = find_groups(block, lambda: model.run_block(0, hidden))
    assert producers(groups) == FAMILIES["llama"][2]
