"""Quantization against a loop over single weights, and its invariants."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import numerics
from compress.errors import ConfigError
from compress.quantized import QuantizedWeight
from compress.scheme import Scheme


def one_by_one(w_OI: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round-to-nearest, one weight at a time, in Python floats with the float16 scale the file holds."""
    out = torch.empty_like(w_OI)
    size = scheme.group_size
    for o in range(w_OI.shape[0]):
        for start in range(0, w_OI.shape[1], size):
            group = w_OI[o, start : start + size].tolist()
            lo, hi = min(0.0, *group), max(0.0, *group)
            raw = max(-lo, hi) / 8 if scheme.symmetric else (hi - lo) / 15
            scale = float(torch.tensor(max(raw, 2.0**-14)).to(torch.float16))
            zero = 8 if scheme.symmetric else min(15, max(0, round(float(torch.tensor(-lo) / torch.tensor(scale)))))
            for j, w in enumerate(group):
                q = min(15, max(0, round(float(torch.tensor(w) / torch.tensor(scale))) + zero))
                out[o, start + j] = (q - zero) * scale
    return out


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_round_to_nearest_is_the_loop(symmetric: bool) -> None:
    w_OI = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(group_size=16, symmetric=symmetric)
    torch.testing.assert_close(numerics.round_to_nearest(w_OI, scheme), one_by_one(w_OI, scheme), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-3, 100.0),
    shift=st.floats(-3.0, 3.0),
    symmetric=st.booleans(),
)
def test_error_is_at_most_half_a_step(seed: int, spread: float, shift: float, symmetric: bool) -> None:
    """Inside the range no weight moves by more than half a step, plus what rounding the scale to float16 adds."""
    w_OI = (torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) + shift) * spread
    scheme = Scheme(group_size=32, symmetric=symmetric)
    w_OGg = numerics.to_groups(w_OI, scheme)
    scale, zero = numerics.scale_and_zero(*numerics.range_of(w_OGg), scheme)
    error = (numerics.fake_quantize(w_OGg, scale, zero, scheme) - w_OGg).abs()
    # symmetric codes reach 7 above and 8 below zero: the largest positive weight may be clipped by one step; the
    # zero point's own rounding moves an asymmetric range by half a step
    assert bool((error <= scale.unsqueeze(-1) * 1.02 + 1e-6).all())


@given(value=st.floats(-8, 8, width=32))
def test_zero_is_exact_and_constant_groups_survive(value: float) -> None:
    w_OI = torch.full((1, 16), value)
    w_OI[0, 0] = 0.0
    got = numerics.round_to_nearest(w_OI, Scheme(group_size=16))
    assert got[0, 0] == 0
    assert float((got - w_OI).abs().max()) <= max(1e-3 * abs(value), 2.0**-14)


def test_all_positive_group_is_not_saturated() -> None:
    """AutoAWQ's reference loses such groups, because its range leaves zero out."""
    w_OI = torch.linspace(5.0, 6.0, 16)[None]
    assert float((numerics.round_to_nearest(w_OI, Scheme(group_size=16)) - w_OI).abs().max()) < 0.25


def test_quantized_weight_round_trip_and_checks() -> None:
    scheme = Scheme(group_size=16)
    w_OI = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    w_OGg = numerics.to_groups(w_OI, scheme)
    scale, zero = numerics.scale_and_zero(*numerics.range_of(w_OGg), scheme)
    q = QuantizedWeight.from_parts(numerics.quantize(w_OGg, scale, zero, scheme), scale, zero, scheme)
    q.check("layer")
    torch.testing.assert_close(q.dequantize(), numerics.round_to_nearest(w_OI, scheme), rtol=0, atol=0)
    assert q.num_bytes == (8 * 32 + 8 * 2) // 2 + 2 * 8 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_bits": 1}, "outside 2..8"), ({"group_size": 4}, "less than 8"), ({"group_size": 0}, "less than 8")],
)
def test_scheme_refuses(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme(**changes)


def test_groups_must_divide() -> None:
    with pytest.raises(ConfigError, match="in_features=100 is not a multiple of group_size=64"):
        Scheme(group_size=64).groups(100, "q_proj")


# What a GPU adds in the order in which its threads come, and where it is used all the same.
UNORDERED = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "put_", "bincount", "histc",
    "cumsum", "cumprod", "logcumsumexp",
}  # fmt: skip
HARMLESS = {
    "numerics": "the place for it",
    "quantize.retarget": "no index comes twice",
    "quantize.lift": "integers",
    "quantize.descent": "integers, on the CPU",
    "prune.structure": "integers, on the CPU",
    "prune.importance": "booleans",
    "prune.prune_block": "on the CPU",
    "losses.in_blocks": "of training, as all of distill",
    "drawing": "of whole rows, each by one block of threads",
    "runtime.generate": "nothing that it finds is an artifact",
}


def test_no_sum_of_an_artifact_has_a_gpus_order() -> None:
    """Bytes are the same twice only if sums have one order; some operations of a GPU take another every time."""
    package = Path(numerics.__file__).parent
    users = set()
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if any(isinstance(call, ast.Attribute) and call.attr in UNORDERED for call in calls):
            users.add(name)
    assert {name for name in users if not name.startswith("distill.")} == set(HARMLESS)


def test_values_are_added_at_their_index_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 5, (200,), generator=generator)
    values = torch.randn(200, generator=generator) * torch.randn(200, generator=generator).exp()
    total = torch.randn(5, generator=generator)
    expected = total.clone()
    for i, value in zip(index.tolist(), values, strict=True):
        expected[i] += value
    found = numerics.add_by_index_(total, index, values)
    assert found is total and torch.equal(found, expected)


def test_the_widest_symmetric_range_cuts_off_nothing() -> None:
    four, eight = Scheme(symmetric=True), Scheme(num_bits=8, symmetric=True)
    plain = numerics.range_factors(Scheme(), 0.5, 20)
    assert (plain[0], plain[-1], len(plain)) == (1.0, 0.5, 21)
    wide = numerics.range_factors(four, 0.5, 20)
    assert wide[:21] == plain and wide[-1] == pytest.approx(8 / 7) and len(wide) == 26
    assert numerics.range_factors(eight, 0.5, 20) == plain
    w_OGg = torch.linspace(0.0, 7.0, 8).reshape(1, 1, 8)  # a positive group: the widest range holds it exactly
    scale, zero = numerics.scale_and_zero(*(wide[-1] * end for end in numerics.range_of(w_OGg)), four)
    torch.testing.assert_close(numerics.fake_quantize(w_OGg, scale, zero, four), w_OGg, rtol=1e-3, atol=0)


def test_widening_symmetric_ranges_lowers_what_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.quantize import feedback

    narrower = numerics.range_factors(Scheme(), feedback.RANGE_MIN, feedback.RANGE_STEPS)

    scheme = Scheme(group_size=32, symmetric=True)
    w_OI = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    importance_g = torch.linspace(0.5, 2.0, 32)

    def row_errors() -> torch.Tensor:
        scale, zero, _ = feedback.fit_range(w_OI, importance_g, scheme)
        return (numerics.fake_quantize(w_OI, scale, zero, scheme) - w_OI).square() @ importance_g

    after = row_errors()
    monkeypatch.setattr(numerics, "range_factors", lambda *_: narrower)
    before = row_errors()
    assert (after <= before + 1e-6).all() and after.sum() < 0.97 * before.sum()
