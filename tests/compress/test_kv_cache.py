"""The INT8 KV cache against a slow reference, and inside models of several families."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress import kv_cache
from compress.errors import UnsupportedError
from compress.kv_cache import Int8Cache, as_cached
from compress.model import StreamedModel
from compress.plan import KvScheme

Build = Callable[..., Path]


def test_rounding_is_that_of_each_token_and_head() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 1, 2] = 0  # nothing to scale by
    x[1, 0, 0] *= 1e-9  # below the smallest scale
    found = as_cached(x)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                row = [float(v) for v in x[b, h, t]]
                scale = max(max(abs(v) for v in row) / 127, 1e-6)
                codes = [max(-128, min(127, round(v / scale))) for v in row]
                torch.testing.assert_close(found[b, h, t], torch.tensor([c * scale for c in codes]))
    assert float((found - x)[0, 0].abs().max()) <= float(x[0, 0].abs().max()) / 127 / 2 * 1.001


def test_half_a_step_goes_to_the_even_code_and_is_not_cut_off() -> None:
    """Truncation, which a reader had, would err on one side by up to a whole step."""
    x = torch.tensor([127.0, 0.5, 1.5, 0.9, -0.9, -1.5, -127, 3]).reshape(1, 1, 1, 8)
    assert as_cached(x).flatten().tolist() == [127, 0, 2, 1, -1, -2, -127, 3]


def test_dtype_and_shape_stay() -> None:
    x = torch.randn(1, 2, 4, 16, dtype=torch.bfloat16)
    assert as_cached(x).dtype == torch.bfloat16 and as_cached(x).shape == x.shape


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "GPTNeoX", "Falcon", "Phi3"])
def test_a_model_computes_with_rounded_keys_and_values(build_model: Build, family: str) -> None:
    """In every family, and only there: other blocks and the shapes stay; without it nothing changes."""
    no_head = ("head_dim", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    drop = {"Falcon": no_head, "GPTNeoX": no_head[:2], "Phi3": no_head[:1]}.get(family, ())
    folder = build_model(family, drop=drop)
    plain, rounded = StreamedModel.open(folder), StreamedModel.open(folder)
    rounded.kv = KvScheme()
    ids = torch.randint(5, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    outputs = []
    for model in (plain, rounded):
        hidden = model.embed(ids)
        model.load_block(0)
        outputs.append(model.run_block(0, hidden))
        model.release_block(0)
    change = (outputs[1] - outputs[0]).norm() / (outputs[0] - plain.embed(ids)).norm()
    assert 1e-5 < float(change) < 0.05


def test_a_model_with_an_int8_cache_is_transformers_own_with_rounded_keys_and_values(build_model: Build) -> None:
    """The same layer of transformers, its attention rewritten by hand around `as_cached`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    folder = build_model()
    streamed = StreamedModel.open(folder)
    streamed.kv = KvScheme()
    ids = torch.randint(5, 400, (1, 20), generator=torch.Generator().manual_seed(1))
    hidden = streamed.embed(ids)
    streamed.load_block(0)
    found = streamed.run_block(0, hidden)

    layer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    tables = layer.rotary_emb(hidden, torch.arange(20)[None])
    block = layer.layers[0]
    x = block.input_layernorm(hidden)
    q, k, v = (getattr(block.self_attn, f"{c}_proj")(x).view(1, 20, -1, 16).transpose(1, 2) for c in ("q", "k", "v"))
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *tables)
    k, v = (as_cached(y).repeat_interleave(2, dim=1) for y in (k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    hidden = hidden + block.self_attn.o_proj(y.transpose(1, 2).reshape(1, 20, -1))
    expected = hidden + block.mlp(block.post_attention_layernorm(hidden))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_told_apart(build_model: Build) -> None:
    model = StreamedModel.open(build_model())
    hidden = model.embed(torch.randint(5, 400, (2, 24), generator=torch.Generator().manual_seed(1)))
    model.load_block(0)
    errors = kv_cache.relative_errors(lambda cache: model.run_cached(0, hidden, cache), hidden)
    assert set(errors) == {"keys", "values", "both"} and min(errors.values()) > 0
    assert errors["both"] == pytest.approx(errors["keys"] + errors["values"], rel=0.5)


def test_a_block_that_takes_no_cache_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"model.layers.3 is called without a cache \(attention_mask\)"):
        kv_cache.with_cache({"attention_mask": None}, Int8Cache(), "model.layers.3")


def test_token_by_token_it_is_what_whole_sequences_are(build_model: Build) -> None:
    """The resident decoder keeps rounded keys and values; the streamed model rounds them on the way."""
    from compress.runtime.resident import TorchDecoder

    folder = build_model()
    ids = torch.randint(5, 400, (1, 12), generator=torch.Generator().manual_seed(1))
    decoder, streamed = TorchDecoder.open(folder, capacity=16), StreamedModel.open(folder)
    plain = TorchDecoder.open(folder, capacity=16)
    decoder.model.kv = streamed.kv = KvScheme()
    hidden = streamed.embed(ids)
    for i in range(streamed.num_blocks):
        streamed.load_block(i)
        hidden = streamed.run_block(i, hidden)
        streamed.release_block(i)
    expected = streamed.head(hidden)[:, -1]
    decoder.prefill(ids[:, :8])
    plain.prefill(ids[:, :8])
    for t in range(8, 12):
        found, exact = decoder.step(ids[:, t]), plain.step(ids[:, t])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float((found - exact).norm()) > 10 * float((found - expected).norm())
