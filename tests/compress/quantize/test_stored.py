import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ArtifactError
from compress.quantize.stored import to_stored


@given(st.integers(-40, 10), st.sampled_from([torch.float16, torch.bfloat16]))
def test_stored_or_refused(power: int, dtype: torch.dtype) -> None:
    """Whatever the scale: what is stored is the tensor within a cast's error, or the tensor is refused by name."""
    value = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 2.0**power
    try:
        stored = to_stored(value, "lm_head.weight", dtype)
    except ArtifactError as e:
        assert dtype == torch.float16 and power < -14 and "tensor lm_head.weight: its values" in str(e)
    else:
        assert stored.dtype == dtype
        assert float((stored.double() - value.double()).norm() / value.double().norm()) < 2**-6


def test_float8() -> None:
    value = torch.ones(4, 4).to(torch.float8_e4m3fn)
    assert bool((to_stored(value, "w", torch.float16) == 1).all())


def test_zeros_and_a_few_small_values_pass() -> None:
    value = torch.zeros(8, 8)
    assert not to_stored(value, "bias", torch.float16).any()
    value[0] = 1.0
    value[1] = 1e-9  # lost, but nothing beside the others
    assert float(to_stored(value, "bias", torch.float16).sum()) == 8.0


@pytest.mark.parametrize(
    ("worst", "says"), [(1e6, r"reaches 1e\+06, beyond float16's 65504"), (float("nan"), "is not finite")]
)
def test_what_float16_cannot_hold(worst: float, says: str) -> None:
    with pytest.raises(ArtifactError, match=f"tensor w {says}"):
        to_stored(torch.tensor([1.0, worst]), "w", torch.float16)
