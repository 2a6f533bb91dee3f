"""Plans: patterns by whole parts, the round trip through JSON, and refusals."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ConfigError
from compress.plan import DENSE, ActivationScheme, KvScheme, LayerPlan, LayerScheme, matches
from compress.scheme import Scheme

W4 = LayerScheme(weight=Scheme())
W8A8 = LayerScheme(weight=Scheme(num_bits=8, group_size=-1, symmetric=True), input=ActivationScheme())
NAMES = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ("self_attn.q_proj", "mlp.down_proj")]

schemes = st.builds(
    LayerScheme,
    weight=st.none() | st.builds(Scheme, num_bits=st.integers(2, 8), symmetric=st.booleans()),
    input=st.none() | st.builds(ActivationScheme, symmetric=st.booleans(), dynamic=st.booleans()),
)
plans = st.builds(
    LayerPlan,
    st.dictionaries(st.text("abc.19", min_size=1), schemes, max_size=8),
    st.none() | st.builds(KvScheme),
)


def test_a_pattern_names_whole_parts() -> None:
    assert matches("model.layers.1.mlp.down_proj", "layers.1")
    assert not matches("model.layers.10.mlp.down_proj", "layers.1")
    assert not matches("model.layers.1.mlp.down_proj", "down")
    for pattern in ("down_proj", "*.down_proj", "mlp.*", "model.layers.1.*", "model.layers.1.mlp.down_proj", "down_*"):
        assert matches("model.layers.1.mlp.down_proj", pattern), pattern


def test_skip_of_layer_1_leaves_layers_10_and_11_quantized() -> None:
    plan = LayerPlan.uniform(NAMES, W4, skip=["layers.1"])
    assert plan.left_dense == ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    assert len(plan.quantized) == len(NAMES) - 2


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--skip down matches no layer; layers are called like model\.layers\.0\."):
        LayerPlan.uniform(NAMES, W4, skip=["down"])
    with pytest.raises(ConfigError, match="leaves nothing to quantize: it matches all 24 layers"):
        LayerPlan.uniform(NAMES, W4, skip=["layers"])


def test_groups_keep_the_order_of_the_model() -> None:
    plan = LayerPlan.uniform(NAMES, W8A8).with_layers("down_proj", W4).with_layers("layers.0", DENSE)
    assert list(plan.groups()) == [W8A8, W4]
    assert plan.groups()[W4][0] == "model.layers.1.mlp.down_proj"
    with pytest.raises(ConfigError, match="one scheme for all .* has w8-sym-a8, w4g128"):
        plan.only()


def test_a_plan_cannot_be_changed() -> None:
    plan = LayerPlan.uniform(NAMES, W4)
    with pytest.raises(TypeError):
        plan.layers["x"] = W8A8  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.kv = KvScheme()  # type: ignore[misc]


@given(plans)
def test_json_is_an_inverse(plan: LayerPlan) -> None:
    again = LayerPlan.from_json(plan.to_json())
    assert again == plan and list(again) == list(plan) and again.kv == plan.kv


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"kv": None, "schemes": [], "layers": {"a": 0}},
        {"kv": None, "schemes": [{"weight": {"num_bits": "4"}, "input": None}], "layers": {}},
        {"kv": {"strategy": "tensor"}, "schemes": [], "layers": {}},
        {"kv": None, "schemes": [{"weight": None, "input": {"num_bits": 8, "symmetric": 1}}], "layers": {}},
    ],
    ids=["empty", "no such scheme", "bits as text", "static kv", "symmetric as a number"],
)
def test_what_is_no_plan_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LayerPlan.from_json(value)


def test_schemes_that_nothing_computes_are_refused() -> None:
    with pytest.raises(ConfigError, match="activations of 4 bits are not computed"):
        ActivationScheme(num_bits=4)
    with pytest.raises(ConfigError, match="KV cache of 4 bits is not computed"):
        KvScheme(num_bits=4)
