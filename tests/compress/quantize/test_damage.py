import pytest

from compress.errors import ArtifactError
from compress.quantize.damage import DAMAGED, refuse_damage, relative_error


def test_what_is_not_a_number_is_never_an_error_of_zero() -> None:
    for error, signal in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ArtifactError, match=r"model\.layers\.3\.q"):
            relative_error(error, signal, "model.layers.3.q")


def test_rounding_below_zero_is_zero_and_a_silent_layer_loses_nothing() -> None:
    assert relative_error(-1e-12, 4.0, "q") == 0.0
    assert relative_error(0.0, 0.0, "q") == 0.0
    assert relative_error(1.0, 4.0, "q") == 0.25


def test_a_destroyed_layer_is_named() -> None:
    refuse_damage("q", DAMAGED * 0.99, 1.0)
    with pytest.raises(ArtifactError, match=r"^q: .*--skip q.*--allow-damage"):
        refuse_damage("q", DAMAGED, 1.0)
