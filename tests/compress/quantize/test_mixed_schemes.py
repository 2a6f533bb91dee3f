"""A block whose inputs' linears become different things: each group of linears in its own scheme, siblings in one."""

from typing import Any

import pytest
import torch

from compress.block import BlockResult, LoadedBlock
from compress.blocks import stream
from compress.errors import ConfigError
from compress.model import StreamedModel
from compress.plan import DENSE, LayerScheme
from compress.quantize.awq_block import AwqOptions, awq_block
from compress.quantize.awq_stage import plan_blocks
from compress.scheme import Scheme

G32, G64 = Scheme(group_size=32), Scheme(group_size=64)
INT8 = Scheme(num_bits=8, group_size=32, symmetric=True)
IDS = torch.randint(0, 4096, (6, 32), generator=torch.Generator().manual_seed(3))


def quantized(folder: Any, effort: str, **schemes: LayerScheme) -> dict[int, BlockResult]:
    """Every block, in g32 but for the layers named by the last part of their names."""
    model = StreamedModel.open(folder)
    plan = plan_blocks(model, LayerScheme(weight=G32))
    for leaf, scheme in schemes.items():
        plan = plan.with_layers(leaf, scheme)
    options = AwqOptions(scheme=G32, effort=effort)
    found: dict[int, BlockResult] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        found[loaded.index] = awq_block(loaded, plan, options)
        return found[loaded.index]

    list(stream(model, IDS, method, plan=plan, paths=options.paths))
    return found


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_each_group_of_linears_has_its_own_scheme(effort: str, build_model: Any) -> None:
    folder = build_model()
    uniform = quantized(folder, effort)
    mixed = quantized(
        folder, effort, o_proj=LayerScheme(weight=INT8), down_proj=LayerScheme(weight=G64), gate_proj=DENSE,
        up_proj=DENSE,
    )  # fmt: skip
    for index, result in mixed.items():
        assert {n: q.scheme for n, q in result.quantized.items()} == {
            "self_attn.q_proj": G32, "self_attn.k_proj": G32, "self_attn.v_proj": G32, "self_attn.o_proj": INT8,
            "mlp.down_proj": G64,
        }  # fmt: skip
        assert {"mlp.gate_proj.weight", "mlp.up_proj.weight"} <= result.dense.keys()
        errors = {layer["layer"].split(".", 3)[-1]: layer["error"] for layer in result.report["layers"]}
        assert errors["self_attn.o_proj"] < 0.02 * errors["self_attn.q_proj"], index
    for name in ("self_attn.q_proj", "self_attn.k_proj"):  # nothing of the others reaches them
        assert torch.equal(mixed[0].quantized[name].codes_OI, uniform[0].quantized[name].codes_OI)
        assert torch.equal(mixed[0].quantized[name].scale_OG, uniform[0].quantized[name].scale_OG)


def test_linears_of_one_input_have_one_scheme(build_model: Any) -> None:
    with pytest.raises(ConfigError, match="share their inputs and are planned as w4g32 and w8g32-sym; they must"):
        quantized(build_model(), "fast", k_proj=LayerScheme(weight=INT8))
