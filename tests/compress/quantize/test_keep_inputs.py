"""Which layers keep their inputs: chosen by what is lost, siblings together, and the rest of the run as without."""

import pytest

from compress.errors import ConfigError
from compress.plan import ActivationScheme, LayerPlan, LayerScheme
from compress.quantize import keep_inputs
from compress.scheme import Scheme

W8 = Scheme(num_bits=8, group_size=-1, symmetric=True)
GROUPS = [
    {"layers": ["0.q", "0.k"], "error": 2e-5},
    {"layers": ["0.down"], "error": 9e-4},
    {"layers": ["1.q", "1.k"], "error": 3e-5},
    {"layers": ["1.down"], "error": 4e-4},
    {"layers": ["1.gate", "1.up"], "error": 2.5e-5},
]


def test_the_worst_are_kept_and_auto_those_that_stand_out() -> None:
    assert [g["layers"] for g in keep_inputs.chosen(GROUPS, 1)] == [["0.down"]]
    assert [g["layers"] for g in keep_inputs.chosen(GROUPS, 3)] == [["0.down"], ["1.down"], ["1.q", "1.k"]]
    assert [g["layers"] for g in keep_inputs.chosen(GROUPS, None)] == [["0.down"], ["1.down"]]
    assert keep_inputs.chosen(GROUPS, 0) == [] and keep_inputs.chosen([], None) == []
    assert keep_inputs.chosen([{**g, "error": 1e-5} for g in GROUPS], None) == []
    with pytest.raises(ConfigError, match="--keep-inputs 5 keeps the inputs of all 5 groups"):
        keep_inputs.chosen(GROUPS, 5)


def test_a_plan_changes_only_in_what_is_kept() -> None:
    both = LayerScheme(weight=W8, input=ActivationScheme())
    plan = LayerPlan({name: both for group in GROUPS for name in group["layers"]} | {"head": LayerScheme()})
    found = keep_inputs.kept(plan, keep_inputs.chosen(GROUPS, 3))
    assert {n for n in plan if found[n] != plan[n]} == {"0.down", "1.down", "1.q", "1.k"}
    assert found["1.q"] == LayerScheme(weight=W8) and found["head"].is_dense and found.kv is plan.kv
