"""A block with the heads of real models, pruned, beside least squares in float64 on what a plain model computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.block import BlockResult
from compress.blocks import stream
from compress.model import StreamedModel
from compress.prune.cut import Cut, plan_cut
from compress.prune.decide import find_whole_structure
from compress.prune.judge import WANTED, reshaping_of, stored_dtype
from compress.prune.prune_block import READER_STRENGTH, PruneOptions, prune_block
from compress.prune.repair import DAMPING
from compress.prune.shape import shape_of
from compress.statistics import kept_share

HIDDEN, HEAD, HEADS, KV = 512, 128, 16, 8
INNER, KEPT = 1792, 1536  # as 14336 and 12288, an eighth of both
ROWS, TOKENS = 12, 256
OPTIONS = PruneOptions(strength=0.5)


class Made:
    """A model of one block, what became of the block, and the tokens."""

    def __init__(self, folder: Path) -> None:
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=HEADS,
            num_key_value_heads=KV, head_dim=HEAD, pad_token_id=0,
        )  # fmt: skip
        self.original = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in self.original.parameters():
                p.add_(torch.randn_like(p) * 0.2) if p.ndim == 1 else p.mul_(3)
        self.original.save_pretrained(folder)
        opened = StreamedModel.open(folder)
        shape = replace(shape_of(opened), heads=HEADS // 2, intermediate=KEPT)
        self.cut: Cut = plan_cut(opened, shape, [0], find_whole_structure(opened))
        self.ids_NT = torch.randint(0, 512, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
        results: list[BlockResult] = []

        def method(loaded: Any) -> BlockResult:
            results.append(prune_block(loaded, self.cut, OPTIONS, stored_dtype(opened, 0)))
            return results[0]

        list(stream(opened, self.ids_NT, method, paths=2, wanted=WANTED, reshaping=reshaping_of(self.cut)))
        self.dense = results[0].dense
        self.sections = {s["layer"]: s for s in results[0].report["sections"]}

    def units(self, layer: str) -> list[int]:
        """The units of a section that stayed, as the manifest says."""
        found = self.sections[layer]
        return found.get("kept") or [i for i in range(found["units"]) if int(found["kept_mask"], 16) >> i & 1]

    def without_heads(self, **mlp: Tensor) -> nn.Module:
        """The model as transformers builds it with the attention as it was made; of the MLP what is given, or was."""
        import transformers

        config = transformers.LlamaConfig.from_dict(
            {**self.original.config.to_dict(), "num_attention_heads": HEADS // 2}
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        made = {f"model.layers.0.{n}": v for n, v in self.dense.items() if n.startswith("self_attn.")}
        made |= {f"model.layers.0.mlp.{n}.weight": v.float() for n, v in mlp.items()}
        model.load_state_dict({**self.original.state_dict(), **made})
        return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("wide"))


@torch.no_grad()
def seen(model: nn.Module, layer: str, ids_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the block, what a layer of it reads, and what leaves the block; float64, a row a token."""
    block = model.model.layers[0]  # type: ignore[union-attr, index]
    found: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.update(x=args[0])),
        block.register_forward_hook(
            lambda _, args, y: found.update(entering=args[0], out=y[0] if isinstance(y, tuple) else y)
        ),
    ]
    model(ids_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    entering, x, out = (found[name].double().flatten(0, 1) for name in ("entering", "x", "out"))
    return entering, x, out


def slow_rows(x_TI: Tensor, kept: Tensor) -> tuple[Tensor, float, Tensor]:
    """The rows of a least-squares problem whose Gram matrix is `repair.hessian`'s: tokens, then the ridge.

    Also what targets of tokens are multiplied by, and the ridge of each channel.
    """
    tokens, size = x_TI.shape
    share = kept_share(size, tokens)
    energy_I = x_TI.square().mean(0)
    ridge_I = ((1 - share) * energy_I + DAMPING * energy_I.mean()).sqrt()
    times = (share / tokens) ** 0.5
    return torch.cat([times * x_TI[:, kept], torch.diag(ridge_I[kept])]), times, ridge_I


def slow_refit(x_TI: Tensor, w_OI: Tensor, kept: Tensor) -> Tensor:
    """The weight on some channels that gives what all gave."""
    rows, times, ridge_I = slow_rows(x_TI, kept)
    own = torch.cat([times * x_TI @ w_OI.t(), ridge_I[kept, None] * w_OI.t()[kept]])
    found: Tensor = torch.linalg.lstsq(rows, own).solution.t()
    return found


def slow_move(x_TI: Tensor, moved_TO: Tensor, kept: Tensor) -> Tensor:
    """What added to a weight moves its outputs."""
    rows, times, _ = slow_rows(x_TI, kept)
    found: Tensor = torch.linalg.lstsq(
        rows, torch.cat([times * moved_TO, torch.zeros(len(kept), moved_TO.shape[1], dtype=torch.float64)])
    ).solution.t()
    return found


def close(found: Tensor, wanted: Tensor) -> float:
    """How far two matrices are apart, as a share of the second."""
    return float((found.double() - wanted).norm() / wanted.norm())


def test_shapes_and_what_stays(made: Made) -> None:
    heads, neurons = made.units("self_attn.o_proj"), made.units("mlp.down_proj")
    assert sorted(h * KV // HEADS for h in heads) == list(range(KV))  # one of two from every group
    assert len(neurons) == KEPT
    old = made.original.model.layers[0].state_dict()
    rows = torch.cat([torch.arange(h * HEAD, (h + 1) * HEAD) for h in heads])
    assert torch.equal(made.dense["self_attn.q_proj.weight"], old["self_attn.q_proj.weight"][rows])
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        assert torch.equal(made.dense[name], old[name])
    assert made.dense["mlp.gate_proj.weight"].shape == made.dense["mlp.up_proj.weight"].shape == (KEPT, HIDDEN)


def test_the_output_projection_is_the_least_squares_solution(made: Made) -> None:
    entering, x_TI, _ = seen(made.original, "self_attn.o_proj", made.ids_NT)
    w_OI = made.original.model.layers[0].self_attn.o_proj.weight.detach().double()
    each = (entering + x_TI @ w_OI.t()).square().mean(1, keepdim=True).rsqrt()
    kept = torch.cat([torch.arange(h * HEAD, (h + 1) * HEAD) for h in made.units("self_attn.o_proj")])
    wanted = slow_refit(x_TI * each, w_OI, kept)
    assert close(made.dense["self_attn.o_proj.weight"], wanted) < 1e-3
    assert close(w_OI[:, kept], wanted) > 0.02  # cutting alone is something else


def refitted_readers(made: Made) -> dict[str, Tensor]:
    """Gate and up, all rows: as they were, moved by what the heads that are gone have changed in what they read."""
    _, before, _ = seen(made.original, "mlp.gate_proj", made.ids_NT)
    _, x_TI, _ = seen(made.without_heads(), "mlp.gate_proj", made.ids_NT)
    out = {}
    for name in ("gate_proj", "up_proj"):
        w_OI = made.original.model.layers[0].mlp.get_submodule(name).weight.detach().double()
        moved_TO = (before - x_TI) @ w_OI.t()
        out[name] = w_OI + READER_STRENGTH * slow_move(x_TI, moved_TO, torch.arange(HIDDEN))
    return out


def test_readers_make_up_for_what_they_read(made: Made) -> None:
    neurons = made.units("mlp.down_proj")
    for name, wanted in refitted_readers(made).items():
        old = made.original.model.layers[0].mlp.get_submodule(name).weight.detach().double()
        assert close(made.dense[f"mlp.{name}.weight"], wanted[neurons]) < 1e-3
        assert close(old[neurons], wanted[neurons]) > 0.02


def test_the_last_linear_is_that_and_aims_at_the_original(made: Made) -> None:
    _, x_TI, now = seen(made.without_heads(**refitted_readers(made)), "mlp.down_proj", made.ids_NT)
    _, _, target = seen(made.original, "mlp.down_proj", made.ids_NT)
    w_OI = made.original.model.layers[0].mlp.down_proj.weight.detach().double()
    each = target.square().mean(1, keepdim=True).rsqrt()
    kept = torch.tensor(made.units("mlp.down_proj"))
    own = slow_refit(x_TI * each, w_OI, kept)
    wanted = own + OPTIONS.strength * slow_move(x_TI * each, (target - now) * each, kept)
    assert close(made.dense["mlp.down_proj.weight"], wanted) < 1e-3
    assert close(made.dense["mlp.down_proj.weight"], own) > 0.02
