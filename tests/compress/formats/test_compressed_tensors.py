"""compressed-tensors' integer layouts: byte for byte what the library writes, read back, and refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from torch import nn

from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, UnsupportedError
from compress.formats import compressed_tensors as ct
from compress.formats import stored
from compress.formats.format import parts_of
from compress.formats.second_reader import digest
from compress.plan import DENSE, ActivationScheme, KvScheme, LayerPlan, LayerScheme
from compress.quantized import QuantizedWeight, StaticInput
from compress.scheme import Scheme
from compress.shards import save_atomically, tensor_sha256

W8A8 = LayerScheme(weight=Scheme(num_bits=8, group_size=-1, symmetric=True), input=ActivationScheme())
STATIC = LayerScheme(weight=W8A8.weight, input=ActivationScheme(dynamic=False, symmetric=False))
W8A16 = LayerScheme(weight=Scheme(num_bits=8, group_size=-1, symmetric=True))
W4 = LayerScheme(weight=Scheme(num_bits=4, group_size=32, symmetric=False))


def layer_of(scheme: LayerScheme, rows: int = 24, columns: int = 96, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Random full-range codes with their scales, and the calibrated input quantizer where the scheme has one."""
    assert scheme.weight is not None
    generator = torch.Generator().manual_seed(scheme.weight.num_bits)
    groups = scheme.weight.groups(columns)
    high = scheme.weight.max_code + 1
    zero = torch.randint(0, high, (rows, groups), dtype=torch.uint8, generator=generator)
    q = QuantizedWeight(
        codes_OI=torch.randint(0, high, (rows, columns), dtype=torch.uint8, generator=generator),
        scale_OG=(torch.rand(rows, groups, generator=generator) + 0.5).to(dtype),
        zero_point_OG=torch.full_like(zero, scheme.weight.symmetric_zero_point) if scheme.weight.symmetric else zero,
        scheme=scheme.weight,
    )
    static = None
    if scheme.input is not None and not scheme.input.dynamic:
        middle = 128 if scheme.input.symmetric else 93
        static = StaticInput(
            scale=torch.tensor([0.125], dtype=dtype), zero_point=torch.tensor([middle], dtype=torch.uint8)
        )
    return q, static


def theirs(q: QuantizedWeight, scheme: LayerScheme, static: StaticInput | None) -> dict[str, torch.Tensor]:
    """What the library's own compressor makes of a float weight that has these codes."""
    group = QuantizationScheme(**{k: v for k, v in ct._group(scheme, ["Linear"]).items()})
    module = nn.Linear(q.codes_OI.shape[1], q.codes_OI.shape[0], bias=False)
    half = q.scheme.symmetric_zero_point
    # float64: the library divides by the scale, which must give the codes back exactly
    scale = q.scale_OG.double()
    module.weight = nn.Parameter(q.dequantize(torch.float64), requires_grad=False)
    module.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
    zero = (q.zero_point_OG.to(torch.int16) - half).to(torch.int8)
    module.register_parameter("weight_zero_point", nn.Parameter(zero, requires_grad=False))
    module.quantization_scheme = group  # type: ignore[assignment]
    compress_module(module, CompressionFormat(ct.format_of(scheme)))
    out = {name: value.detach() for name, value in module.state_dict().items()}
    out["weight_scale"] = out["weight_scale"].to(q.scale_OG.dtype)
    if static is not None:
        out["input_scale"] = static.scale
        assert scheme.input is not None
        if not scheme.input.symmetric:
            out["input_zero_point"] = (static.zero_point.to(torch.int16) - 128).to(torch.int8)
    return out


SCHEMES = {
    **{
        f"w{bits}g{size}{'-sym' if sym else ''}": LayerScheme(
            weight=Scheme(num_bits=bits, group_size=size, symmetric=sym)
        )
        for bits in range(2, 9)
        for size, sym in ((32, True), (32, False), (-1, True), (-1, False))
    },
    "w8a8": W8A8,
    "w8a8-static": STATIC,
    "w4a8": LayerScheme(weight=Scheme(num_bits=4, group_size=32, symmetric=True), input=ActivationScheme()),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tensors_are_the_library_s_and_read_back(scheme: LayerScheme) -> None:
    q, static = layer_of(scheme)
    ours, wanted = ct.tensors(q, scheme, static), theirs(q, scheme, static)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in ours.items()} == {
        k: (v.dtype, tuple(v.shape)) for k, v in wanted.items()
    }
    assert all(torch.equal(ours[k], wanted[k]) for k in ours)
    assert set(ours) <= set(ct.LEAVES)
    back = ct.read(ours, scheme, "layer")
    for mine, found in zip(parts_of(q).values(), parts_of(back).values(), strict=True):
        assert torch.equal(mine, found)
    again = {key: digest(value) for key, value in ct.read_again(ours, scheme).items()}
    assert again == {key: tensor_sha256(value) for key, value in parts_of(q, static).items()}
    found = ct.read_static(ours, scheme, "layer")
    assert (found is None) == (static is None)
    if static is not None and found is not None:
        assert torch.equal(found.scale, static.scale) and torch.equal(found.zero_point, static.zero_point)


PLANS = {
    "one scheme": LayerPlan({"lm_head": DENSE, "m.0.q": W8A8, "m.0.k": W8A8}),
    "two packed": LayerPlan({"lm_head": DENSE, "m.0.q": W8A16, "m.0.k": W4, "m.1.q": W8A16}),
    "mixed": LayerPlan({"m.0.q": W8A8, "m.0.k": W8A16, "m.1.q": STATIC, "m.1.k": W8A8, "lm_head": DENSE}),
    "with an INT8 cache": LayerPlan({"m.0.q": W8A8}, KvScheme()),
}


def folder_of(plan: LayerPlan, path: Path, config: dict[str, Any] | None = None) -> Checkpoint:
    tensors: dict[str, torch.Tensor] = {"lm_head.weight": torch.zeros(4, 4), "m.0.norm.weight": torch.ones(4)}
    for name in plan.quantized:
        parts = ct.tensors(layer_of(plan[name])[0], plan[name], layer_of(plan[name])[1])
        tensors |= {f"{name}.{leaf}": value for leaf, value in parts.items()}
    path.mkdir()
    save_atomically(path / "model.safetensors", tensors)
    from compress.files import json_bytes

    (path / "config.json").write_bytes(json_bytes({"quantization_config": config or ct.config(plan)}))
    return Checkpoint.open(path)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_plans_come_back_and_the_library_agrees(plan: LayerPlan, tmp_path: Path) -> None:
    config = ct.config(plan)
    formats = {"one scheme": ct.INT, "two packed": ct.PACKED, "mixed": ct.MIXED, "with an INT8 cache": ct.INT}
    assert config["format"] in formats.values()
    folder = stored(folder_of(plan, tmp_path / "f"))
    assert folder.plan == LayerPlan({name: plan[name] for name in plan.quantized}, plan.kv)
    assert folder.dense_names() == sorted(
        ["lm_head.weight", "m.0.norm.weight", *(f"{n}.weight" for n in plan.quantized)]
    )
    for name in folder.layers:
        assert torch.equal(folder.dense(name), layer_of(plan[name])[0].dequantize())
        assert folder.shape(name) == (24, 96)
    read = QuantizationConfig.model_validate(config)
    for name in plan.quantized:
        by_target = {target: group for group in read.config_groups.values() for target in group.targets}
        found = by_target[match_targets(name, nn.Linear(1, 1), by_target)[0]]
        weights, inputs = found.weights, found.input_activations
        scheme = plan[name]
        assert scheme.weight is not None
        assert (weights.num_bits, weights.symmetric) == (scheme.weight.num_bits, scheme.weight.symmetric)
        assert (inputs is None) == (scheme.input is None)


def test_the_config_is_what_the_library_writes() -> None:
    """Every key that 0.20 writes for W8A8, with its values."""
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    made = QuantizationConfig(
        config_groups={
            "group_0": QuantizationScheme(
                targets=["Linear"],
                weights=QuantizationArgs(strategy="channel", **args),
                input_activations=QuantizationArgs(strategy="token", dynamic=True, observer=None, **args),
                format=ct.INT,
            )
        },
        format=ct.INT,
        quantization_status="compressed",
        ignore=["lm_head"],
    ).to_dict()
    ours = ct.config(PLANS["one scheme"])
    unset = ("observer", "observer_kwargs", "actorder", "block_structure", "scale_dtype", "zp_dtype")
    for group in made["config_groups"].values():
        for key in ("weights", "input_activations"):
            group[key] = {k: v for k, v in group[key].items() if k not in unset}
    assert {k: ours[k] for k in made} == made


EXACT, LOW, HIGH, CLASS = "m.0.q", "re:.*a", "re:.*z|.*q", "Linear"


def test_the_most_specific_target_decides_as_in_the_library() -> None:
    module = nn.Linear(1, 1)
    for targets in ([EXACT, LOW, HIGH, CLASS], [HIGH, CLASS], ["re:m.*", "re:.*q"], [CLASS], ["m.0"], []):
        for order in (targets, targets[::-1]):
            matched = match_targets(EXACT, module, order)
            assert ct._group_of(EXACT, order) == (matched[0] if matched else None)


def changed(**changes: Any) -> dict[str, Any]:
    return {**ct.config(PLANS["one scheme"]), **changes}


def group_changed(part: str | None, **changes: Any) -> dict[str, Any]:
    config = ct.config(PLANS["one scheme"])
    group = config["config_groups"]["group_0"]
    (group if part is None else group[part]).update(changes)
    return config


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (changed(kv_cache_scheme={"num_bits": 8, "dynamic": False}), "kv_cache_scheme .a calibrated KV cache"),
        (changed(transform_config={"config_groups": {"R1": {}}}), "transform_config .rotations"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config of format 'sparse-24-bitmask'"),
        (changed(quantization_status="frozen"), "quantization_status 'frozen'"),
        (changed(config_groups={"W8A8": ["Linear"]}), "config group W8A8 states no scheme"),
        (group_changed("weights", type="float"), "weights of type 'float'"),
        (group_changed("weights", strategy="block"), "strategy 'block'"),
        (group_changed("weights", actorder="group"), "actorder 'group'"),
        (group_changed("weights", num_bits=16), "weights of 16 bits"),
        (group_changed("weights", strategy="group", group_size=None), "group_size None"),
        (group_changed("input_activations", dynamic="local"), "dynamic 'local'"),
        (group_changed("input_activations", num_bits=4), "input_activations of 4 bits"),
        (group_changed(None, output_activations={"num_bits": 8}), "output_activations"),
        (group_changed(None, format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_computed_is_refused_by_name(config: dict[str, Any], names: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=names):
        stored(folder_of(PLANS["one scheme"], tmp_path / "f", config))


@pytest.mark.parametrize("leaf", ["weight_g_idx", "k_scale", "weight_global_scale"])
def test_tensors_that_belong_to_it_are_refused_by_name(leaf: str, tmp_path: Path) -> None:
    folder = folder_of(PLANS["one scheme"], tmp_path / "f").path
    tensors = {n: Checkpoint.open(folder).tensor(n) for n in Checkpoint.open(folder).names()}
    save_atomically(folder / "model.safetensors", {**tensors, f"m.0.q.{leaf}": torch.ones(1)})
    with pytest.raises(UnsupportedError, match=f"tensor m.0.q.{leaf} belongs to"):
        stored(Checkpoint.open(folder))


def test_a_config_of_other_weights_is_an_error(tmp_path: Path) -> None:
    config = changed(ignore=["m.0.k"])
    with pytest.raises(ArtifactError, match="m.0.k is stored quantized, but `ignore` lists it"):
        stored(folder_of(PLANS["one scheme"], tmp_path / "a", config))
    config = group_changed(None, targets=["m.0.q"])
    with pytest.raises(ArtifactError, match="m.0.k is stored quantized, but no config group names it"):
        stored(folder_of(PLANS["one scheme"], tmp_path / "b", config))
    config = group_changed("weights", strategy="group", group_size=32)
    folder = stored(folder_of(PLANS["one scheme"], tmp_path / "c", config))
    with pytest.raises(ArtifactError, match=r"weight_scale has shape \(24, 1\), but \(24, 3\) follows"):
        folder.weight("m.0.q")


def test_what_readers_cannot_take_is_refused_before_work() -> None:
    asymmetric = LayerScheme(weight=Scheme(num_bits=8, group_size=-1), input=ActivationScheme())
    with pytest.raises(UnsupportedError, match="symmetric weights only"):
        ct.check(LayerPlan({"l": asymmetric}), {"l": (8, 8)})
    with pytest.raises(UnsupportedError, match="quantized inputs with a weight in floating point"):
        ct.check(LayerPlan({"l": LayerScheme(input=ActivationScheme())}), {"l": (8, 8)})
