"""A block made INT8, in the stream that a run makes: what is stored, what it computes, what it reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import blocks
from compress.block import BlockResult, LoadedBlock
from compress.errors import ConfigError
from compress.linear import linears
from compress.model import StreamedModel
from compress.plan import DENSE, ActivationScheme, KvScheme, LayerPlan, LayerScheme
from compress.quantize.int8_block import Int8Options, int8_block
from compress.scheme import Scheme

W8 = Scheme(num_bits=8, group_size=-1, symmetric=True)
DYNAMIC = LayerScheme(weight=W8, input=ActivationScheme())
ASYMMETRIC = LayerScheme(weight=W8, input=ActivationScheme(symmetric=False))
STATIC = LayerScheme(weight=W8, input=ActivationScheme(dynamic=False))
WEIGHTS = LayerScheme(weight=W8)
GROUPS = LayerScheme(weight=Scheme(num_bits=8, group_size=32, symmetric=True))

Build = Callable[..., Path]


def quantized(
    folder: Path,
    scheme: LayerScheme,
    options: Int8Options,
    changed: dict[str, LayerScheme] | None = None,
    kv: KvScheme | None = None,
) -> tuple[list[BlockResult], float]:
    """Every block's result, and the relative error of the last block's output on the calibration rows."""
    model = StreamedModel.open(folder)
    names = [model.block_prefix(i) + n for i in range(model.num_blocks) for n in linears(model.blocks[i])]
    plan = LayerPlan.uniform(names, scheme, kv=kv)
    for pattern, other in (changed or {}).items():
        plan = plan.with_layers(pattern, other)
    ids = torch.randint(5, 4000, (6, 64), generator=torch.Generator().manual_seed(0))
    results: list[BlockResult] = []
    last: dict[str, Any] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        last.update(loaded=loaded, index=loaded.index)
        hidden = loaded.check_output.clone()
        result = int8_block(loaded, plan, options)
        blocks.install(loaded.module, result, plan, loaded.prefix)
        after = loaded.run()
        added = hidden - loaded.check_input
        last["error"] = float((after - hidden).square().sum() / added.square().sum())
        results.append(result)
        return result

    for _ in blocks.stream(model, ids, method, plan=plan, paths=options.paths, wanted=options.wanted):
        pass
    return results, last["error"]


@pytest.fixture
def loud_model(build_model: Build) -> Path:
    """A Llama whose norms have loud channels, so that smoothing has something to do."""
    from safetensors.torch import load_file, save_file

    folder = build_model()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if "layernorm" in name:
            value[::9] *= 30
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", [DYNAMIC, ASYMMETRIC, STATIC, WEIGHTS, GROUPS], ids=LayerScheme.label)
def test_every_scheme_loses_less_than_rounding_to_nearest(loud_model: Path, scheme: LayerScheme) -> None:
    results, error = quantized(loud_model, scheme, Int8Options())
    reports = [layer for result in results for layer in result.report["layers"]]
    assert len(reports) == 14 and all(layer["error"] < layer["rtn_error"] for layer in reports)
    assert error < 1e-2
    for result in results:
        assert bool(result.inputs) == (scheme is STATIC)
        for weight in result.quantized.values():
            weight.check("layer")
            assert weight.scale_OG.dtype == torch.float16


def test_all_four_groups_of_a_llama_are_smoothed(loud_model: Path) -> None:
    results, _ = quantized(loud_model, DYNAMIC, Int8Options(effort="fast"))
    for result in results:
        folds = {tuple(g["layers"]): g["fold"] for g in result.report["groups"]}
        assert folds[("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")] == "input_layernorm"
        assert folds[("self_attn.o_proj",)] == "self_attn.v_proj"
        assert folds[("mlp.down_proj",)] == "mlp.up_proj"
        loud = [g for g in result.report["groups"] if g["fold"].endswith("layernorm")]
        assert len(loud) == 2 and all(g["descended"] and g["gain"] < 0.5 for g in loud)


def test_smoothing_and_feedback_each_lower_what_is_lost(loud_model: Path) -> None:
    plain = quantized(loud_model, DYNAMIC, Int8Options(effort="fast", strength=0.0))[1]
    fast = quantized(loud_model, DYNAMIC, Int8Options(effort="fast"))[1]
    assert fast < 0.5 * plain


def test_the_error_reported_is_that_of_the_layer_in_the_block(loud_model: Path) -> None:
    """Seen from outside: the first layer of the first block, run with its codes on the inputs that it gets."""
    results, _ = quantized(loud_model, DYNAMIC, Int8Options(effort="fast", strength=0.0))
    report = results[0].report["layers"][0]
    assert report["layer"].endswith("q_proj") and report["strength"] == 0
    assert report["inputs_error"] < report["error"]
    # Without smoothing or feedback only the fitted ranges tell it from rounding to nearest.
    assert report["error"] <= 1.05 * report["rtn_error"]


def test_layers_left_out_stay_as_they_are_and_share_no_quantizer(loud_model: Path) -> None:
    results, _ = quantized(loud_model, DYNAMIC, Int8Options(effort="fast"), {"*down_proj": DENSE})
    for result in results:
        assert "mlp.down_proj" not in result.quantized and "mlp.down_proj.weight" in result.dense
        notes = {g["layers"][0]: g["note"] for g in result.report["groups"]}
        assert notes["mlp.down_proj"] == "every layer of the group is listed in --skip"


def test_layers_with_one_input_and_two_schemes_are_refused(loud_model: Path) -> None:
    with pytest.raises(ConfigError, match="share their inputs"):
        quantized(loud_model, DYNAMIC, Int8Options(effort="fast"), {"*q_proj": WEIGHTS})


def test_a_scale_is_held_in_the_dtype_of_the_model(loud_model: Path) -> None:
    results, _ = quantized(loud_model, DYNAMIC, Int8Options(effort="fast", dtype=torch.bfloat16))
    assert results[0].quantized["mlp.down_proj"].scale_OG.dtype == torch.bfloat16
    assert results[0].dense["input_layernorm.weight"].dtype == torch.bfloat16


def test_an_int8_cache_is_reported_by_keys_and_by_values(loud_model: Path) -> None:
    reports = [r.report["kv_cache"] for r in quantized(loud_model, DYNAMIC, Int8Options(), kv=KvScheme())[0]]
    assert all(set(r) == {"keys", "values", "both"} and 0 < r["both"] < 1e-2 for r in reports)
    without = quantized(loud_model, DYNAMIC, Int8Options(effort="fast"))[0]
    assert all("kv_cache" not in r.report for r in without)


def test_options_out_of_range_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="outside 0..1"):
        Int8Options(strength=1.5)
    with pytest.raises(ConfigError, match="not one of"):
        Int8Options(effort="best")


def test_two_runs_give_equal_bytes(loud_model: Path) -> None:
    first, second = (quantized(loud_model, STATIC, Int8Options())[0] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for name, weight in a.quantized.items():
            assert torch.equal(weight.codes_OI, b.quantized[name].codes_OI)
            assert torch.equal(weight.scale_OG, b.quantized[name].scale_OG)
            assert torch.equal(a.inputs[name].scale, b.inputs[name].scale)
