"""Torch-Pruning 1.6 on a decoder: MLP neurons alone, or all that its example for language models cuts.

    run_torch_pruning.py MODEL OUT IDS.npy --importance l2|taylor --scope mlp|all --parameters N

l2: norms of coupled weights, the importance of its language-model example. taylor: first-order, with the gradients of
the loss on the calibration rows. mlp: the rows of gate and up, the hidden state and the heads stay. all: hidden
channels, heads and neurons by one ratio, head sizes stay, as the example does. The ratio is the least that leaves at
most N parameters. OUT is what `save_pretrained` writes. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

import dense
import torch
import torch_pruning as tp

ROUND_TO = {"mlp": 32, "all": 4}


def importance_of(name: str) -> Any:
    if name == "l2":
        return tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    return tp.importance.GroupTaylorImportance()


def add_gradients(model: Any, rows: list[list[int]]) -> None:
    """Sum of the gradients of the loss over the rows."""
    for row in rows:
        ids = torch.tensor([row])
        model(ids, labels=ids, use_cache=False).loss.backward()


def pruned(options: argparse.Namespace, ratio: float, rows: list[list[int]]) -> Any:
    model = dense.load(options.model, torch.float32)
    model.config.use_cache = False  # a cache among the outputs cannot be traced,
    model.set_attn_implementation("eager")  # nor a kernel that repeats keys and values by itself
    if options.importance == "taylor":
        add_gradients(model, rows)
    attention = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    mlps = [m for n, m in model.named_modules() if n.endswith("mlp")]
    heads = {m.q_proj: model.config.num_attention_heads for m in attention}
    heads |= {p: model.config.num_key_value_heads for m in attention for p in (m.k_proj, m.v_proj)}
    whole = options.scope == "all"
    neurons = {p: ratio for m in mlps for p in (m.gate_proj, m.up_proj)}
    pruner = tp.pruner.MetaPruner(
        model, example_inputs=torch.tensor([rows[0][:8]]), importance=importance_of(options.importance),
        global_pruning=False, pruning_ratio=ratio if whole else 0.0, pruning_ratio_dict=None if whole else neurons,
        ignored_layers=[model.lm_head], num_heads=heads, prune_num_heads=whole, prune_head_dims=False,
        head_pruning_ratio=ratio if whole else 0.0, round_to=ROUND_TO[options.scope],
        output_transform=lambda out: out.logits,
    )  # fmt: skip
    for group in pruner.step(interactive=True):
        group.prune()
    config = model.config
    config.hidden_size = model.lm_head.in_features
    config.intermediate_size = mlps[0].gate_proj.out_features
    for m in attention:
        config.num_attention_heads = m.q_proj.out_features // m.head_dim
        config.num_key_value_heads = m.k_proj.out_features // m.head_dim
        m.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    config.head_dim = attention[0].head_dim
    model.zero_grad(set_to_none=True)
    return model


def least_ratio(config: Any, scope: str, parameters: int) -> float:
    """The least ratio, to a thousandth, that leaves at most so many parameters, rounding left out."""
    whole = scope == "all"
    rows = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    for step in range(950):
        left = 1 - step / 1000
        hidden, queries = (
            (width * left, config.num_attention_heads * left) if whole else (width, config.num_attention_heads)
        )
        block = hidden * (3 * inner * left + 2 * head * (queries + config.num_key_value_heads))
        if rows * hidden + config.num_hidden_layers * block <= parameters:
            return step / 1000
    raise SystemExit(f"no ratio leaves {parameters} parameters")


def size_of(model: Any) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--importance", choices=("l2", "taylor"), default="l2")
    parser.add_argument("--scope", choices=("mlp", "all"), default="mlp")
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--rows", type=int, default=32, help="of the calibration rows, for the gradients")
    options = parser.parse_args()
    torch.manual_seed(0)
    clock, rows = dense.Clock(), dense.rows(options.ids)[: options.rows]
    config = dense.load(options.model, torch.float32).config
    ratio = least_ratio(config, options.scope, options.parameters)
    while size_of(model := pruned(options, ratio, rows)) > options.parameters:
        ratio += 0.01  # rounding has left a little more than the formula says
    cost = clock.stop()
    model.save_pretrained(options.out)
    dense.report(ratio=ratio, parameters=size_of(model), version=importlib.metadata.version("torch-pruning"), **cost)


if __name__ == "__main__":
    main()
