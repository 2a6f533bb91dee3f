"""What choices are predicted to cost, against models with just one set of linears rounded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import numerics
from compress.errors import ConfigError
from compress.model import StreamedModel
from compress.plan import DENSE, LayerScheme
from compress.quantize.awq_stage import plan_blocks
from compress.quantize.menu import Menu, label, num_bytes
from compress.quantize.sensitivity import _Set, interpolated, measure, monotone, probe_of, probed_blocks, shares_of
from compress.scheme import Scheme
from compress.tell import SILENT

IDS = torch.randint(0, 4096, (24, 64), generator=torch.Generator().manual_seed(2))
MENU = Menu(int4=(64, 32))


@torch.no_grad()
def true_kl(folder: Path, layers: list[str], scheme: Scheme) -> float:
    """KL from the original of a model in which these linears alone are rounded to nearest, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = model(IDS[12:]).logits.double().log_softmax(-1)
    for name in layers:
        weight = model.get_submodule(name).weight
        weight.copy_(numerics.round_to_nearest(weight, scheme))
    after = model(IDS[12:]).logits.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().double()


def test_sets_are_told_apart_as_true_models_tell_them(build_model: Any) -> None:
    folder = build_model(num_hidden_layers=3)
    model = StreamedModel.open(folder)
    plan = plan_blocks(model, LayerScheme(weight=Scheme(group_size=32)), skip=["layers.1.mlp.down_proj"])
    found = measure(model, IDS, plan, MENU, SILENT)
    sets = found["sets"]
    assert [len(one["layers"]) for one in sets] == [3, 1, 2, 1, 3, 1, 2, 3, 1, 2, 1], (
        "the skipped one is not chosen for"
    )
    assert list(sets[0]["kl"]) == ["w4g64", "w4g32", "w8g64-sym", "float16"]
    for one in sets:
        kl = one["kl"]
        eight = next(name for name in kl if name.startswith("w8"))
        assert kl["float16"] == 0 < kl[eight] < 0.02 * kl["w4g32"] <= 0.02 * kl["w4g64"]
    probe = Scheme(group_size=64)
    true = [true_kl(folder, one["layers"], probe) for one in sets]
    told = [one["kl"][label(LayerScheme(weight=probe))] for one in sets]
    correlation = float(torch.corrcoef(torch.stack([ranks(true), ranks(told)]))[0, 1])
    assert correlation > 0.9, (true, told)
    assert 0.2 < sum(told) / sum(true) < 2, "error feedback does better than rounding to nearest"
    assert sum(told) == pytest.approx(found["all_rounded"], rel=1e-3)


def test_sets_of_one_block_share_its_cost_by_what_each_costs_alone() -> None:
    """Where they were not measured, by what they move, times what that costs in the blocks around them."""

    def one(block: int, name: str, moved: float) -> _Set:
        return _Set(block=block, layers=[f"model.layers.{block}.{name}"], errors={}, moved=moved)

    sets = [one(block, name, moved) for block in range(3) for name, moved in (("o", 1.0), ("down", 99.0))]
    assert [round(s, 2) for s in shares_of(sets, {})] == [0.01, 0.99] * 3, "nothing is known but what they move"
    known = {(0, "o"): 3.0, (0, "down"): 1.0, (2, "o"): 3.0, (2, "down"): 1.0}
    assert shares_of(sets, known) == pytest.approx([0.75, 0.25] * 3)
    del known[2, "down"]
    assert [round(s, 2) for s in shares_of(sets, known)] == [0.01, 0.99] * 3
    assert shares_of([*sets, one(3, "o", 5.0)], known)[-1] == 1.0, "a place that is not known at the end"
    lone = _Set(block=3, layers=["lm_head"], errors={}, moved=0.3, behind=True)
    assert shares_of([*sets, lone], known)[-1] == 1.0 and lone.place == ""


def test_few_rows_are_refused(build_model: Any) -> None:
    model = StreamedModel.open(build_model())
    plan = plan_blocks(model, LayerScheme(weight=Scheme(group_size=32)))
    with pytest.raises(ConfigError, match="3 calibration rows are too few to measure what can be spared, 4 are needed"):
        measure(model, IDS[:3], plan, MENU, SILENT)


def test_blocks_between_probes() -> None:
    assert probed_blocks(6) == list(range(6))
    assert probed_blocks(31, 4) == [0, 10, 20, 30]
    moved = {0: 1.0, 1: 2.0, 2: 1.0, 3: 0.5, 4: 1.0}
    found = interpolated({0: 0.01, 4: 0.04}, moved)
    assert found[0] == 0.01 and found[4] == 0.04
    assert found[2] == pytest.approx(0.02), "the gain is the geometric mean half-way"
    assert found[1] == pytest.approx(2 * 0.01 * 4**0.25) and found[3] == pytest.approx(0.5 * 0.01 * 4**0.75)


def test_no_option_costs_more_than_a_smaller_one() -> None:
    errors = {"w4g64": 1.0, "w4g32": 1.1, "w8g64-sym": 0.01, "float16": 0.0}
    assert monotone(errors) == {**errors, "w4g32": 1.0}


def test_the_probe_is_in_the_middle_of_the_fewest_bits() -> None:
    options = Menu().options(256)
    assert [label(o) for o in options] == [
        "w4g128", "w4g64", "w4g32", "w8g128-sym", "float16",
    ]  # fmt: skip
    assert probe_of([o.weight for o in options if o.weight]) == Scheme(group_size=64)
    assert [label(o) for o in Menu(int8=False).options(72)] == ["float16"]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (LayerScheme(weight=Scheme(group_size=32)), 128 * 256 // 2 + 128 * 8 * 2 + 128 * 8 // 2 + 16),
        (LayerScheme(weight=Scheme(group_size=64, symmetric=True)), 128 * 256 // 2 + 128 * 4 * 2 + 16),
        (LayerScheme(weight=Scheme(num_bits=8, group_size=128, symmetric=True)), 128 * 256 + 128 * 2 * 2 + 16),
        (DENSE, 2 * 128 * 256),
    ],
)
def test_bytes_of_a_layer(scheme: LayerScheme, expected: int) -> None:
    assert num_bytes(scheme, (128, 256)) == expected
