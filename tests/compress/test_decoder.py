"""The decoder is what the language model runs; what cannot be run a block at a time is refused, never wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.decoder import find_decoder
from compress.errors import UnsupportedError
from compress.model import StreamedModel

IDS = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
        return self.linear(hidden_states)


class Tiny(nn.Module):
    """A language model whose way from block to block is `walk`."""

    base_model_prefix = ""
    config = None

    def __init__(self, walk: Any, vision: int = 0, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.table = nn.Embedding(16, 8)
        self.vision = nn.ModuleList(Block() for _ in range(vision))
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.walk = walk

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.walk(self, self.embed(input_ids), input_ids)


def straight(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    for layer in model.layers:
        hidden = layer(hidden)
    return hidden


def one_twice(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    return model.layers[0](straight(model, hidden, ids))


def one_left_out(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    return model.layers[1](model.layers[0](hidden))


def backwards(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    for layer in reversed(model.layers):
        hidden = layer(hidden)
    return hidden


def changed_between(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    for layer in model.layers:
        hidden = layer(hidden) * 2
    return hidden


def both_lists(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    for layer in model.vision:
        hidden = layer(hidden)
    return straight(model, hidden, ids)


def by_ids(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    for layer in model.layers:
        hidden = layer(hidden, model.table(ids))
    return hidden


def states(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    for layer in model.layers:
        hidden, state = layer(hidden)
    return hidden


def on_meta(walk: Any, vision: int = 0) -> Tiny:
    with torch.device("meta"):
        return Tiny(walk, vision)


@pytest.mark.parametrize("vision", [0, 7])
def test_the_list_that_runs_not_the_longest(vision: int) -> None:
    model = on_meta(straight, vision)
    found = find_decoder(model)
    assert found.name == "layers" and list(found.blocks) == list(model.layers) and not found.returns_tuple
    assert all(p.is_meta for p in model.parameters())  # as it was
    assert all("forward" not in vars(b) for b in model.layers)


@pytest.mark.parametrize(
    ("walk", "says"),
    [
        (one_twice, "in the order"),
        (one_left_out, "in the order"),
        (backwards, "in the order"),
        (changed_between, "changes the hidden states between the blocks 0 and 1"),
        (both_lists, "runs 2 lists of blocks .vision, layers."),
        (by_ids, "given extra, which depends on the tokens"),
        (states, "expects of its blocks more than hidden states"),
        (lambda model, hidden, ids: hidden, "runs none of its lists"),
    ],
)
def test_what_cannot_be_streamed(walk: Any, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        find_decoder(on_meta(walk, vision=2))


@torch.no_grad()
def streamed_and_whole(folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of `IDS` by blocks, after another batch of the same shape, and transformers' own."""
    from transformers import AutoModelForCausalLM

    model = StreamedModel.open(folder)
    hidden = [model.embed(IDS), model.embed(IDS.flip(0, 1))]
    for i in range(model.num_blocks):
        model.load_block(i)
        hidden = [model.run_block(i, h) for h in hidden]
        model.release_block(i)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.head(hidden[0]), whole(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Gemma3Text", "Qwen3", "Bloom", "Phi", "GPTNeoXJapanese"])
def test_by_blocks_as_transformers(build_model: Any, family: str) -> None:
    drop = {
        "GPT2": ("num_key_value_heads", "head_dim", "intermediate_size"),
        "OPT": ("intermediate_size", "num_key_value_heads", "head_dim"),
        "Bloom": ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"),
        "GPTNeoXJapanese": ("num_key_value_heads", "head_dim", "intermediate_size"),
    }.get(family, ())
    more = {"OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64}}.get(family, {})
    ours, theirs = streamed_and_whole(build_model(family, drop=drop, **more))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_second_table_of_ids(build_model: Any) -> None:
    """Gemma 4's per-layer embeddings are looked up by token: its blocks do not see hidden states alone."""
    sizes = {
        "vocab_size_per_layer_input": 4096,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    folder = build_model("Gemma4Text", hidden_size_per_layer_input=16, **sizes)
    with pytest.raises(
        UnsupportedError, match="block model.layers.0 is given per_layer_input, which depends on the tokens"
    ):
        StreamedModel.open(folder)


def test_ids_are_given_as_they_are(build_model: Any) -> None:
    """A model may do more with ids than look them up: here it adds a second table's rows before the blocks."""
    folder = build_model()
    model = StreamedModel.open(folder)
    seen: list[Tensor] = []
    model.base.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    model.embed(IDS)
    assert torch.equal(seen[0], IDS)
