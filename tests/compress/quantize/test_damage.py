import pytest
import torch

from compress.errors import ArtifactError
from compress.quantize.damage import DAMAGED, DROWNING, refuse_damage, refuse_drowning, relative_error


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


def test_a_weight_that_drowns_the_others_is_named() -> None:
    w_OI = torch.full((64, 64), 0.02)
    w_OI[3, 5] = -0.02 * DROWNING * 0.99
    refuse_drowning("q", w_OI)  # the super weights of real models are a tenth of that
    refuse_drowning("q", torch.zeros(4, 4))
    w_OI[3, 5] = 65504.0
    with pytest.raises(
        ArtifactError, match=r"^q: its largest weight, 65504, is 3e\+06 times .*--skip q.*--allow-damage"
    ):
        refuse_drowning("q", w_OI)
