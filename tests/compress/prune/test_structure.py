"""What is found in a block is checked by what it is for: rows that are not kept may hold anything."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.linear import weight_OI
from compress.model import StreamedModel
from compress.prune.structure import Section, Structure, find_structure

Build = Callable[..., Path]

# family, config changes, the MLP's and the attention's output linear (None: not found), key-value groups
FAMILIES: list[tuple[str, dict[str, Any], str | None, str | None, int]] = [
    ("Llama", {}, "mlp.down_proj", "self_attn.o_proj", 2),
    ("Llama", {"attention_bias": True, "mlp_bias": True}, "mlp.down_proj", "self_attn.o_proj", 2),
    ("Mistral", {"num_key_value_heads": 4}, "mlp.down_proj", "self_attn.o_proj", 4),
    ("Qwen2", {"drop": ("head_dim",)}, "mlp.down_proj", "self_attn.o_proj", 2),
    ("Qwen3", {"num_key_value_heads": 1}, "mlp.down_proj", "self_attn.o_proj", 1),
    ("Gemma2", {}, "mlp.down_proj", "self_attn.o_proj", 2),
    ("Gemma3Text", {}, "mlp.down_proj", "self_attn.o_proj", 2),
    ("Phi3", {"drop": ("head_dim",)}, "mlp.down_proj", "self_attn.o_proj", 2),
    ("Olmo2", {"drop": ("head_dim",)}, "mlp.down_proj", None, 0),  # its q_norm mixes the heads
    ("GPTNeoX", {"drop": ("head_dim", "num_key_value_heads")}, "mlp.dense_4h_to_h", "attention.dense", 4),
    ("GPT2", {"drop": ("head_dim", "num_key_value_heads")}, "mlp.c_proj", "attn.c_proj", 4),
]


def opened(folder: Path) -> tuple[nn.Module, Callable[[], torch.Tensor], Structure]:
    model = StreamedModel.open(folder)
    hidden = model.embed(torch.arange(16)[None] * 37 % model.vocab_size)
    block = model.load_block(0)
    run = partial(model.run_exact, 0, hidden)
    with torch.no_grad():
        return block, run, find_structure(block, run, 16)


@pytest.mark.parametrize(("family", "changes", "mlp", "attention", "groups"), FAMILIES)
def test_finds_sections_of_families(
    build_model: Build, family: str, changes: dict[str, Any], mlp: str | None, attention: str | None, groups: int
) -> None:
    block, run, found = opened(build_model(family, **changes))
    assert (found.neurons and found.neurons.consumer) == mlp
    assert (found.heads and found.heads.consumer) == attention
    for section in (found.neurons, found.heads):
        if section is not None:
            dropped_rows_do_not_matter(block, run, section)
    if found.heads is not None:
        assert found.heads.num_groups == groups and found.heads.num_units == 4


@torch.no_grad()
def dropped_rows_do_not_matter(block: nn.Module, run: Callable[[], torch.Tensor], section: Section) -> None:
    """With the columns of half the units at zero, rows that are not kept change nothing, and every kept row does."""
    per_group = section.num_units // section.num_groups
    first = [u for u in range(section.num_units) if int(section.group_U[u]) < (section.num_groups + 1) // 2]
    units = torch.tensor(first if per_group == 1 or len(first) < section.num_units else first[: len(first) // 2])
    gone = torch.ones(weight_OI(block.get_submodule(section.consumer)).shape[1], dtype=torch.bool)
    gone[section.channels(units)] = False
    weight_OI(block.get_submodule(section.consumer))[:, gone] = 0
    before = run()
    for name, kept in section.kept_rows(units).items():
        w_OI = weight_OI(block.get_submodule(name))
        dropped = torch.ones(len(w_OI), dtype=torch.bool)
        dropped[kept] = False
        old = w_OI.clone()
        w_OI[dropped] = torch.randn_like(w_OI[dropped])
        assert torch.equal(run(), before), name
        w_OI.copy_(old)
        for row in kept[:: max(1, len(kept) // 4)]:
            w_OI[row] += 1
            assert not torch.equal(run(), before), (name, int(row))
            w_OI.copy_(old)


def test_neurons_in_another_order_are_found(build_model: Build) -> None:
    """The map is read off the block: rows of gate and up need not lie in the order of down's columns."""
    model = StreamedModel.open(build_model())
    hidden = model.embed(torch.arange(16)[None])
    block = model.load_block(0)
    with torch.no_grad():
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))

        class Shuffled(nn.Module):
            def __init__(self, mlp: Any) -> None:
                super().__init__()
                self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                made = nn.functional.silu(self.gate(x)) * self.up(x)
                result: torch.Tensor = self.down(made[..., order])
                return result

        block.mlp = Shuffled(block.mlp)
        section = find_structure(block, partial(model.run_exact, 0, hidden), 16).neurons
    assert section is not None
    for producer in section.producers:
        assert torch.equal(producer.feeds[order], torch.arange(128))


def test_kept_rows_of_a_shared_run_stay_while_any_head_does() -> None:
    from compress.prune.structure import Producer

    k = Producer(name="k", run_rows=2, feeds=torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool())
    heads = Section(consumer="o", unit_size=2, group_U=torch.tensor([0, 0, 1, 1]), producers=(k,))
    assert heads.kept_rows(torch.tensor([1]))["k"].tolist() == [0, 1]
    assert heads.kept_rows(torch.tensor([1, 3]))["k"].tolist() == [0, 1, 2, 3]
    assert heads.channels(torch.tensor([1, 3])).tolist() == [2, 3, 6, 7]
