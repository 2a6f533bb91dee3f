"""A whole block at the head counts of real models, quantized, and compared with what plain arithmetic says of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import numerics
from compress.block import BlockResult
from compress.blocks import stream
from compress.linear import linears
from compress.model import StreamedModel
from compress.plan import LayerScheme
from compress.quantize.awq_block import AwqOptions, awq_block
from compress.quantize.awq_stage import plan_blocks
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme

SIZES = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1, "pad_token_id": 0}
SCHEME = Scheme(group_size=128)


@dataclass(frozen=True)
class Made:
    """A model of one block, and what became of the block."""

    folder: Path
    result: BlockResult
    ids_NT: Tensor

    @cached_property
    def original(self) -> nn.Module:
        return load(self.folder)

    @cached_property
    def quantized(self) -> nn.Module:
        """The same model with the block's tensors as they were made; codes read group by group."""
        model = load(self.folder)
        block = block_of(model)
        for name, weight in self.result.quantized.items():
            block.get_submodule(name).weight.data = slow_dequantize(weight).float()
        block.load_state_dict({**block.state_dict(), **{n: v.float() for n, v in self.result.dense.items()}})
        return model

    def report(self, layer: str) -> dict[str, Any]:
        return next(r for r in self.result.report["layers"] if r["layer"].endswith(f".{layer}"))

    def group(self, layer: str) -> dict[str, Any]:
        return next(g for g in self.result.report["groups"] if layer in g["layers"])


def load(folder: Path) -> nn.Module:
    import transformers

    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model


def block_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]


def slow_dequantize(weight: QuantizedWeight) -> Tensor:
    size = weight.codes_OI.shape[1] // weight.scale_OG.shape[1]
    parts = []
    for group in range(weight.scale_OG.shape[1]):
        codes = weight.codes_OI[:, group * size : (group + 1) * size].double()
        zero, scale = weight.zero_point_OG[:, group].double(), weight.scale_OG[:, group].double()
        parts.append((codes - zero[:, None]) * scale[:, None])
    return torch.cat(parts, dim=1)


@torch.no_grad()
def inputs_of(model: nn.Module, layer: str, ids_NT: Tensor) -> Tensor:
    """What reaches a layer of the block, float64 `[tokens, I]`."""
    seen: list[Tensor] = []
    handle = block_of(model).get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids_NT, use_cache=False)
    handle.remove()
    return seen[0].double().flatten(0, 1)


@torch.no_grad()
def added(model: nn.Module, ids_NT: Tensor) -> Tensor:
    """What the block adds to its input."""
    seen: list[Tensor] = []
    handle = block_of(model).register_forward_hook(
        lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out) - args[0])
    )
    model(ids_NT, use_cache=False)
    handle.remove()
    return seen[0].double()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama, grouped queries, 8 x 128": (
        "fast", "Llama", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "Gemma-2-9B's heads, 8 x 256": (
        "balanced", "Gemma2", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
    ),
    "Phi-3, fused qkv, 8 x 128": (
        "balanced", "Phi3", {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    import transformers

    effort, family, sizes = CASES[request.param]
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**{**SIZES, **sizes})
    )
    with torch.no_grad():
        for p in model.parameters():  # norms that a wrong fold shows in, inputs of unequal size, heads that attend
            p.add_(torch.randn_like(p) * 0.2) if p.ndim == 1 else p.mul_(3)
        model.get_input_embeddings().weight.mul_(torch.randn(model.config.hidden_size).exp())
    model.save_pretrained(folder)
    opened = StreamedModel.open(folder)
    # Fewer tokens than inputs correlate by chance alone, and nothing of that is believed.
    ids_NT = torch.randint(0, 512, (48 if effort == "fast" else 6, 64), generator=torch.Generator().manual_seed(1))
    plan = plan_blocks(opened, LayerScheme(weight=SCHEME))
    options = AwqOptions(scheme=SCHEME, effort=effort)
    results: list[BlockResult] = []

    def method(loaded: Any) -> BlockResult:
        results.append(awq_block(loaded, plan, options))
        return results[0]

    list(stream(opened, ids_NT, method, plan=plan, paths=options.paths))
    return Made(folder, results[0], ids_NT)


def test_every_input_is_smoothed_by_what_feeds_it(made: Made) -> None:
    folds = {layer: g["fold"] for g in made.result.report["groups"] for layer in g["layers"]}
    assert all(folds.values()), folds
    fused = "self_attn.qkv_proj" in folds
    assert folds["self_attn.o_proj"] == ("self_attn.qkv_proj" if fused else "self_attn.v_proj")
    assert folds["mlp.down_proj"] == ("mlp.gate_up_proj" if fused else "mlp.up_proj")


def test_the_first_errors_reported_are_those_of_the_outputs(made: Made) -> None:
    """Of the linears that the block begins with: their outputs on the calibration tokens, in float64."""
    linear = "self_attn.qkv_proj" if "self_attn.qkv_proj" in made.result.quantized else "self_attn.q_proj"
    before = block_of(made.original).get_submodule(linear).weight.detach().double()
    after = slow_dequantize(made.result.quantized[linear])
    wanted = inputs_of(made.original, linear, made.ids_NT) @ before.t()
    found = inputs_of(made.quantized, linear, made.ids_NT) @ after.t()
    if linear.endswith("qkv_proj"):  # the value rows carry the inverse of what is folded into the output projection
        norm = "input_layernorm"
        s_I, t_I = (block_of(m).get_submodule(norm).weight.detach().double() for m in (made.original, made.quantized))  # type: ignore[operator]
        scaled = before * (s_I / t_I)
        row = scaled.square().sum(1) / (scaled * after).sum(1)  # rounding errors are not like the weights
        rows = torch.where(torch.arange(len(row)) < 24 * 128, torch.ones_like(row), row)
        found = found * rows
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert made.report(linear)["error"] == pytest.approx(error, rel=0.02 if linear.endswith("qkv_proj") else 2e-3)
    assert made.report(linear)["error"] < made.report(linear)["rtn_error"]


def test_the_block_computes_nearly_the_same_and_better_than_rounded_plainly(made: Made) -> None:
    """On tokens that it was not calibrated on."""
    ids_NT = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(2))
    wanted = added(made.original, ids_NT)
    plain = load(made.folder)
    with torch.no_grad():
        for layer in linears(block_of(plain)).values():
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.copy_(numerics.round_to_nearest(weight, SCHEME))
    ours, theirs = (
        float((added(model, ids_NT) - wanted).square().sum() / wanted.square().sum())
        for model in (made.quantized, plain)
    )
    assert ours < 0.9 * theirs < 0.3, (ours, theirs)


@pytest.mark.parametrize("made", ["Llama, grouped queries, 8 x 128"], indirect=True)
def test_codes_are_those_of_error_feedback_column_by_column(made: Made) -> None:
    """Effort `fast`, some rows of the queries, in float64: every range of the grid tried when a group's turn comes,
    then each column's error passed on to all that are left."""
    before, after = block_of(made.original), block_of(made.quantized)
    s_I = (before.input_layernorm.weight / after.input_layernorm.weight).detach().double()  # type: ignore[union-attr, operator]
    weight: Tensor = before.get_submodule("self_attn.q_proj").weight  # type: ignore[assignment]
    left = weight.detach().double()[::256] * s_I
    x_TI = inputs_of(made.original, "self_attn.q_proj", made.ids_NT)
    gram_II = x_TI.t() @ x_TI / len(x_TI)
    kept = 1 - 1024 / len(x_TI)
    hessian_II = kept * gram_II + (1 - kept) * gram_II.diagonal().diag()
    hessian_II.diagonal().add_(0.01 * gram_II.diagonal().mean())
    order = gram_II.diagonal().reshape(8, 128).sum(1).argsort(descending=True)
    columns = torch.arange(1024).reshape(8, 128)[order].flatten()
    inverse = torch.linalg.inv((hessian_II / s_I / s_I[:, None])[columns][:, columns])
    upper = torch.linalg.cholesky(inverse, upper=True)
    importance = (gram_II.diagonal() / s_I.square())[columns]
    left = left[:, columns]
    codes = torch.empty_like(left)
    for row in range(len(left)):
        for first in range(0, 1024, 128):
            there = slice(first, first + 128)
            scale, zero = best_range(left[row, there], importance[there])
            for j in range(first, first + 128):
                codes[row, j] = ((left[row, j] / scale).round() + zero).clamp(0, 15)
                error = (left[row, j] - (codes[row, j] - zero) * scale) / upper[j, j]
                left[row, j:] -= error * upper[j, j:]
    assert kept > 0.5 and gram_II.corrcoef().abs().mean() > 0.05  # or there is nothing to pass on
    found = made.result.quantized["self_attn.q_proj"].codes_OI[::256][:, columns]
    # What float32 rounds to the other of two codes, the rest of its row follows.
    assert float((found == codes).double().mean()) > 0.97


def best_range(w: Tensor, importance: Tensor) -> tuple[float, int]:
    """Scale and zero point of one group of one row, of the full range and 20 narrower ones."""
    found = []
    for step in range(21):
        factor = 1 - 0.5 * step / 20
        low, high = min(0.0, float(w.min())) * factor, max(0.0, float(w.max())) * factor
        scale = float(torch.tensor((high - low) / 15).half())
        zero = min(15, max(0, round(-low / scale)))
        change = (((w / scale).round() + zero).clamp(0, 15) - zero) * scale - w
        found.append((float(change.square() @ importance), step, scale, zero))
    return min(found)[2:]
